"""sources.py: every kind of file and data set gives its documents in their order, and what is broken says where."""

import gzip
import json
import os
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import HfApi

import sources
from sources import (
    SOURCES,
    Part,
    SourceConfig,
    find_parts,
    fingerprint,
    hub_parts,
    local_parts,
    python_parts,
    text_of,
    wikitext_articles,
)

TEXTS = ["first", "zweites: ü", "", "third\nof two lines", "🎉" * 9]


def json_lines(texts: Iterable[str | None], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(texts: Iterable[str | None], column: str = "text", **options: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    texts = list(texts)
    table = pyarrow.table({"id": range(len(texts)), column: pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


MAKERS: dict[str, Callable[..., bytes]] = {  # ending -> the content of a file with these documents
    ".jsonl": json_lines, ".jsonl.gz": lambda texts, *key: gzip.compress(json_lines(texts, *key)),
    ".jsonl.zst": lambda texts, *key: zstd(json_lines(texts, *key)), ".parquet": parquet}


def write(path: str | Path, content: bytes | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(parts: list[Part], text_column: str = "text") -> tuple[list[str], list[str]]:
    """The texts of a source, and what is wrong with the records that have none."""
    found, faults = [], []
    for part in parts:
        for record in part.read():
            try:
                found.append(text_of(record, text_column)[0])
            except ValueError as error:
                faults.append(str(error))
    return found, faults


def texts_in(pattern: str | Path, text_column: str = "text") -> list[str]:
    found, faults = read(local_parts(str(pattern), text_column), text_column)
    assert faults == []
    return found


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Local files


@pytest.mark.parametrize("ending", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document(ending):
    assert texts_in(write(f"a{ending}", "two lines: ü\nand 🎉\n")) == ["two lines: ü\nand 🎉\n"]


@pytest.mark.parametrize("key", ["text", "body"])
@pytest.mark.parametrize("ending", MAKERS)
def test_each_line_or_row_is_a_document(ending, key):
    write(f"a{ending}", MAKERS[ending](TEXTS, key))
    assert texts_in(f"a{ending}", key) == TEXTS


@pytest.mark.parametrize("ending", MAKERS)
def test_nothing_under_the_key_is_an_empty_document(ending):
    write(f"a{ending}", MAKERS[ending](["one", None, "two"]))
    assert texts_in(f"a{ending}") == ["one", "", "two"]


def test_every_ending_is_tried_here():
    assert {".txt", ".md", ".py", *MAKERS} == set(sources.READERS)


def test_a_folders_files_come_in_sorted_order_and_others_are_left_out():
    contents = {"b.txt": "3", "a/z.md": "1", "a/c/y.py": "0", "c.jsonl": json_lines(["4", "5"]), "B.txt": "2",
                "d.parquet": parquet(["6"]), "e.csv": "no", "f.json": "no", "g.txt.bak": "no", ".hidden.txt.swp": "no"}
    for name in random.Random(0).sample(sorted(contents), len(contents)):
        write(Path("texts", name), contents[name])
    parts = local_parts("texts", "text")
    assert [part.name for part in parts] == ["B.txt", "a/c/y.py", "a/z.md", "b.txt", "c.jsonl", "d.parquet"]
    assert read(parts)[0] == ["2", "0", "1", "3", "4", "5", "6"]


@pytest.mark.parametrize(("pattern", "names"), [
    ("texts/*.md", ["a.md", "c.md"]), ("texts/**/*.md", ["a.md", "c.md", "sub/b.md"]), ("texts/[ab].*", ["a.md"]),
    ("texts/s*", ["b.md", "d.txt"]), ("text?", ["a.md", "c.md", "sub/b.md", "sub/d.txt"]),
    ("texts/sub/b.md", ["b.md"])])
def test_globs_name_files_and_folders(pattern, names):
    for name in ("c.md", "a.md", "sub/b.md", "sub/d.txt", "a.csv"):
        write(Path("texts", name), name)
    for prefix in ("", f"{Path.cwd()}/"):
        parts = local_parts(prefix + pattern, "text")
        assert [part.name for part in parts] == names
        assert [Path(text).name for text in read(parts)[0]] == [Path(name).name for name in names]


def test_a_file_that_is_named_is_read_whatever_its_ending():
    assert texts_in(write("notes.log", "as it is")) == ["as it is"]


@pytest.mark.parametrize(("pattern", "words"), [
    ("none.txt", r"--input=none\.txt: no such file or folder"), ("*.md", r"--input=\*\.md: no such file or folder"),
    ("folder", r"--input=folder: there are no \.txt, \.md, \.py, \.jsonl, .*\.parquet files"),
    ("fold*", r"--input=fold\*: there are no")])
def test_what_names_no_text_is_refused(pattern, words):
    write("folder/table.csv", "1,2")
    with pytest.raises(FileNotFoundError, match=words):
        local_parts(pattern, "text")


def test_a_compressed_file_of_several_members_is_read_to_its_end():
    """As `cat a.gz b.gz` and parallel compressors make it."""
    members = [json_lines([f"{i} of member {m}" for i in range(2000)]) for m in range(3)]
    for ending, compress in ((".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)):
        write(f"a{ending}", b"".join(map(compress, members)))
        assert texts_in(f"a{ending}") == [f"{i} of member {m}" for m in range(3) for i in range(2000)]


@pytest.mark.parametrize("ending", [".txt", *MAKERS])
def test_reading_ends_where_the_parts_size_says(ending):
    """Progress is told by it."""
    texts = [f"document {i} " * 50 for i in range(3000)]
    write(f"a{ending}", MAKERS[ending](texts) if ending in MAKERS else "".join(texts))
    [part] = local_parts(f"a{ending}", "text")
    ends = [record.end for record in part.read()]
    assert ends == sorted(ends)
    assert ends[-1] == part.size == Path(f"a{ending}").stat().st_size


def test_the_fingerprint_is_that_of_names_and_contents():
    def of(folder: str, contents: dict[str, str]) -> str:
        for name, text in contents.items():
            write(Path(folder, name), text)
        return fingerprint(local_parts(folder, "text"))

    contents = {"a.txt": "one", "b.txt": "two"}
    marks = [of("texts", contents), of("moved", contents), of("changed", contents | {"a.txt": "eno"}),
             of("renamed", {"a.txt": "one", "c.txt": "two"}), of("less", {"a.txt": "one"})]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 4


# What is broken


LONG = [f"document {i} {random.Random(i).getrandbits(4000):x}" for i in range(6000)]  # 6 MB that hardly compress


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_stream_gives_what_it_has_and_then_says_where_it_broke(ending):
    content = MAKERS[ending](LONG)
    write(f"a{ending}", content[:len(content) * 2 // 3])
    found, faults = read(local_parts(f"a{ending}", "text"))
    assert found == LONG[:len(found)]
    assert len(found) > 2000
    assert len(faults) == 1
    assert re.match(rf"a{ending} is broken behind line {len(found)}: .*[Tt]runcated", faults[0])


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("length", [1, 20, -4])
def test_a_short_stream_that_is_torn_is_never_taken_for_whole(ending, length):
    write(f"a{ending}", MAKERS[ending](TEXTS)[:length])
    found, faults = read(local_parts(f"a{ending}", "text"))
    assert found == TEXTS[:len(found)]
    assert len(faults) == 1
    assert f"a{ending} is broken behind line {len(found)}" in faults[0]


def test_a_compressed_file_that_is_none_is_named():
    write("a.jsonl.gz", json_lines(TEXTS))
    assert "a.jsonl.gz is broken behind line 0" in read(local_parts("a.jsonl.gz", "text"))[1][0]


def test_a_damaged_stream_gives_what_comes_before():
    content = bytearray(MAKERS[".jsonl.gz"](LONG))
    content[len(content) * 2 // 3] ^= 0xFF
    write("a.jsonl.gz", bytes(content))
    found, faults = read(local_parts("a.jsonl.gz", "text"))
    assert 2000 < len(found) < 6000
    assert found[:2000] == LONG[:2000]
    assert "a.jsonl.gz" in faults[-1]


def test_a_torn_parquet_file_says_so_and_a_damaged_one_gives_the_rows_before():
    content = parquet(LONG, row_group_size=1000, use_dictionary=False, compression="gzip")
    write("torn.parquet", content[:len(content) // 2])
    found, faults = read(local_parts("torn.parquet", "text"))
    assert found == []
    assert len(faults) == 1
    assert "torn.parquet is broken behind row 0: Parquet magic bytes not found" in faults[0]
    place = len(content) * 7 // 10
    write("damaged.parquet", content[:place] + bytes(500) + content[place + 500:])
    found, faults = read(local_parts("damaged.parquet", "text"))
    assert found == LONG[:len(found)]
    assert 2000 < len(found) < 6000
    assert f"damaged.parquet is broken behind row {len(found)}: " in faults[0]


@pytest.mark.parametrize(("line", "words"), [
    (b'{"text": "torn', "is not JSON: Unterminated string starting at, character 10"), (b"{bad}", "is not JSON"),
    (b"\x00", "is not JSON"),
    (b'{"text": "one"} {"text": "two"}', "is not JSON: Extra data"), (b"[" * 100_000, "is not JSON"),
    (b'{"body": "x", "id": 1}', "has no text under 'text', but 'body', 'id'; --text_column names the key"),
    (b'{"text": 3}', "has no text under 'text'"), (b'{"text": ["x"]}', "has no text under 'text'"),
    (b'["text"]', "has no text under 'text', but list"), (b"3", "has no text under 'text', but int"),
    (b"null", "has no text under 'text', but NoneType"), (b"{}", "has no text under 'text'")])
def test_a_line_that_holds_no_text_is_named(line, words):
    write("a.jsonl", json_lines(["one"]) + b"\n" + line + b"\n" + json_lines(["two"]))  # a blank line counts as one
    found, faults = read(local_parts("a.jsonl", "text"))
    assert found == ["one", "two"]
    assert len(faults) == 1
    assert faults[0].startswith(f"a.jsonl:3 {words}")


def test_a_column_that_is_not_there_or_holds_no_text_is_refused():
    write("a.parquet", parquet(TEXTS, "body"))
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text', but id, body; --text_column names"):
        texts_in("a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'id' holds int64, not text"):
        texts_in("a.parquet", "id")


# Bytes that are no text


def replaced_in(path: Path) -> list[tuple[str, bool]]:
    return [text_of(record, "text") for part in local_parts(str(path), "text") for record in part.read()]


def test_bytes_that_are_no_utf8_are_replaced_and_that_is_said():
    assert replaced_in(write("a.txt", b"caf\xe9 \xc3\xa9\xc3")) == [("caf\ufffd é\ufffd", True)]
    assert replaced_in(write("b.md", "café\ufffd")) == [("café\ufffd", False)]
    assert replaced_in(write("c.jsonl", b'{"text": "\xff"}\n{"text": "\xc3\xa9"}\n')) == [
        ("\ufffd", True), ("é", False)]


def test_bytes_that_are_no_utf8_are_replaced_in_a_parquet_file_too():
    values = pyarrow.array([b"one", b"caf\xe9", "café".encode()])
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())  # Parquet does not check it either
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "a.parquet")
    assert replaced_in(Path("a.parquet")) == [("one", False), ("caf\ufffd", True), ("café", False)]


def test_halves_of_surrogate_pairs_are_replaced_and_whole_pairs_kept():
    lines = [rb'"\ud83d\ude00"', rb'"a\ud800b"', rb'"\ude00\ud83d"', rb'"\ud83d"']
    write("a.jsonl", b"".join(b'{"text": %b}\n' % line for line in lines))
    assert replaced_in(Path("a.jsonl")) == [("😀", False), ("a\ufffdb", True), ("\ufffd\ufffd", True), ("\ufffd", True)]


def test_a_byte_order_mark_is_no_text():
    assert replaced_in(write("a.txt", b"\xef\xbb\xbfone\r\n")) == [("one\r\n", False)]
    assert replaced_in(write("b.jsonl", b"\xef\xbb\xbf" + json_lines(["one"]))) == [("one", False)]


# Python's own sources


@pytest.mark.parametrize(("content", "text", "replaced"), [
    (b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", "# -*- coding: latin-1 -*-\nx = 'é'\n", False),
    (b"\xef\xbb\xbfa\r\nb\rc\n", "a\nb\nc\n", False), ("a = 'ü'\n".encode(), "a = 'ü'\n", False),
    (b"x = '\xe9'\n", "x = '\ufffd'\n", True),
    (b"# -*- coding: klingon -*-\n", "# -*- coding: klingon -*-\n", False),
    (b"# -*- coding: ascii -*-\n\xff\n", "# -*- coding: ascii -*-\n\ufffd\n", True)])
def test_python_is_read_as_python_reads_it(content, text, replaced):
    assert replaced_in(write("a.py", content)) == [(text, replaced)]


STDLIB, ALL = ("stdlib",), ("stdlib", "purelib", "platlib")


@pytest.fixture
def python(monkeypatch) -> Callable[..., None]:
    """Pretends that this interpreter's folders are others."""
    def pretend(**paths: str) -> None:
        found = {key: str(Path(path).absolute()) for key, path in paths.items()}
        monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: found)

    return pretend


def test_no_file_of_python_is_counted_twice(python):
    for name in ("lib/os.py", "lib/json/decoder.py", "lib/site-packages/a.py", "lib/site-packages/b/__init__.py",
                 "lib/dist-packages/c.py", "lib64/fast.py", "lib/notes.txt"):
        write(name, f"# {name}\n")
    os.symlink("lib", "same")
    os.symlink("nowhere.py", "lib/dangling.py")
    python(stdlib="lib", purelib="lib/site-packages", platlib="same/site-packages")  # two names of one folder
    assert [part.name for part in python_parts(ALL)] == [
        "purelib/a.py", "purelib/b/__init__.py", "stdlib/json/decoder.py", "stdlib/os.py"]
    assert [part.name for part in python_parts(STDLIB)] == ["stdlib/json/decoder.py", "stdlib/os.py"]
    python(stdlib="lib", purelib="lib/site-packages", platlib="lib64")
    parts = python_parts(ALL)
    assert [part.name for part in parts] == ["platlib/fast.py", "purelib/a.py", "purelib/b/__init__.py",
                                             "stdlib/json/decoder.py", "stdlib/os.py"]
    assert read(parts)[0][0] == "# lib64/fast.py\n"


def test_this_pythons_library_and_packages_are_found_once():
    parts = find_parts(SourceConfig(dataset="python_source"))
    names = [part.name for part in parts]
    assert names == sorted(set(names))
    assert "stdlib/json/decoder.py" in names
    assert any(name.endswith("lib/numpy/__init__.py") for name in names)
    library = find_parts(SourceConfig(dataset="python_stdlib"))
    assert [part.name for part in library] == [name for name in names if name.startswith("stdlib/")]
    assert sum(part.size for part in library) < sum(part.size for part in parts)
    [decoder] = (part for part in library if part.name == "stdlib/json/decoder.py")
    assert read([decoder])[0] == [Path(json.decoder.__file__).read_text(encoding="utf-8")]


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Callable[[dict[str, bytes | str]], str]:
    """Makes a folder laid out like a data set on the hub; `datasets` keeps what it keeps in tmp_path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def make(contents: dict[str, bytes | str], name: str = "corpus") -> str:
        for path, content in contents.items():
            write(Path("hub", name, path), content)
        return f"hub/{name}"

    return make


PLAIN = {"train-00000-of-00002.parquet": parquet(["a", "b", ""]), "train-00001-of-00002.parquet": parquet([None, "c"]),
         "validation-00000-of-00001.parquet": parquet(["v"])}
CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*.parquet
- config_name: de
  data_files:
  - split: train
    path: de/train-*.parquet
  - split: test
    path: de/test-*.parquet
---
Two languages.
"""
LANGUAGES = {"README.md": CARD, "en/train-0.parquet": parquet(["hello"], "body"),
             "de/train-0.parquet": parquet(["hallo"], "body"), "de/test-0.parquet": parquet(["probe"], "body")}


def test_a_folder_of_parquet_files_is_read_through_datasets(hub):
    parts = find_parts(SourceConfig(hf=hub(PLAIN)))
    assert [Path(part.name).name for part in parts] == [*PLAIN][:2]
    assert read(parts)[0] == ["a", "b", "", "", "c"]
    records = [record for part in parts for record in part.read()]
    assert [Path(record.where).name for record in records] == [
        f"{name}: document {i}" for name, count in zip(PLAIN, (3, 2)) for i in range(1, count + 1)]
    assert all(part.size > 0 for part in parts)


def test_subset_split_and_column_are_those_of_the_card(hub):
    folder = hub(LANGUAGES)
    for options, texts in (({"subset": "en"}, ["hello"]), ({"subset": "de"}, ["hallo"]),
                           ({"subset": "de", "split": "test"}, ["probe"])):
        assert read(find_parts(SourceConfig(hf=folder, text_column="body", **options)))[0] == texts
    assert read(find_parts(SourceConfig(hf=hub(PLAIN, "plain"), split="validation")))[0] == ["v"]


def test_other_formats_of_the_hub_are_read_too(hub):
    assert read(find_parts(SourceConfig(hf=hub({"train.jsonl": json_lines(["one", "two"])}))))[0] == ["one", "two"]


@pytest.mark.parametrize(("contents", "options", "words"), [
    (PLAIN, {"split": "nosuch"}, "no split 'nosuch', but train, validation"),
    (PLAIN, {"split": "all"}, "'all'"), (PLAIN, {"split": "train+validation"}, "'train+validation'"),
    (PLAIN, {"subset": "xx"}, "BuilderConfig 'xx' not found"),
    (PLAIN, {"text_column": "body"}, "hub/corpus has no column 'body', but id, text; --text_column names the one"),
    (PLAIN, {"text_column": "id"}, "column 'id' holds int64, not text"),
    (LANGUAGES, {"text_column": "body"}, "Please pick one among the available configs: ['en', 'de']"),
    (LANGUAGES, {"subset": "fr"}, "BuilderConfig 'fr' not found. Available: ['en', 'de']"),
    (LANGUAGES, {"subset": "en"}, "has no column 'text', but id, body"),
    ({"corpus.py": "open('ran', 'w')"}, {}, "could not open the data set 'hub/corpus'")])
def test_what_a_data_set_lacks_is_one_line(cli, refused, hub, contents, options, words):
    arguments = [f"--{key}={value}" for key, value in options.items()]
    line = refused("prepare_data", f"--hf={hub(contents)}", "--tokenizer=byte", *arguments)
    assert words in line
    assert "hub/corpus" in line
    assert not Path("ran").exists()
    assert not list(Path("data").glob("*"))


def test_a_data_set_that_cannot_be_reached_is_one_line(refused):
    assert "could not open the data set 'someone/something'" in refused(
        "prepare_data", "--hf=someone/something", "--tokenizer=byte")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_torn_file_of_a_data_set_is_named_or_counted(cli, hub, skip_bad):
    torn = parquet(LONG[:100])
    folder = hub({"train-0.parquet": parquet(["one", "two", "three"]), "train-1.parquet": torn[:len(torn) // 2]})
    result = cli("prepare_data", f"--hf={folder}", "--tokenizer=byte", f"--skip_bad={skip_bad}")
    if skip_bad:
        manifest = json.loads(Path("data/corpus/dataset.json").read_text())
        assert (result.code, manifest["documents"], manifest["bad_records"]) == (0, 3, 1)
    else:
        assert result.code == 2
        assert "train-1.parquet" in result.err.splitlines()[-1]


@pytest.fixture
def asked(monkeypatch) -> list[tuple[tuple, dict]]:
    """What `datasets` is asked for; it gives nothing."""
    calls = []

    def load_dataset_builder(*args: object, **kwargs: object) -> None:
        calls.append((args, kwargs))
        raise ConnectionError("asked")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return calls


@pytest.mark.parametrize(("name", "repo", "subset"), [
    ("openwebtext", "Skylion007/openwebtext", None), ("fineweb", "HuggingFaceFW/fineweb", "sample-10BT"),
    ("fineweb_edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"), ("tinystories", "roneneldan/TinyStories", None),
    ("wikitext", "Salesforce/wikitext", "wikitext-103-raw-v1")])
def test_named_sources_are_data_sets_of_the_hub(refused, asked, monkeypatch, name, repo, subset):
    commits = {None: "newest", "v1": "older"}
    monkeypatch.setattr(HfApi, "dataset_info", lambda api, repo, revision: SimpleNamespace(sha=commits[revision]))
    assert f"could not open the data set '{repo}'" in refused("prepare_data", name, "--tokenizer=byte")
    refused("prepare_data", name, "--subset=other", "--revision=v1", "--tokenizer=byte")
    assert asked == [((repo, subset), {"revision": "newest"}), ((repo, "other"), {"revision": "older"})]


def test_the_table_of_sources_has_all_that_were_promised():
    assert set(SOURCES) == {"shakespeare_char", "shakespeare", "python_stdlib", "python_source", "tinystories",
                            "wikitext", "openwebtext", "fineweb", "fineweb_edu"}


# WikiText


def test_wikitexts_lines_become_articles():
    rows = ["", " = First = \n", "", " One line . \n", " = = A section = = \n", " Another . \n", "",
            " = Second , a title = \n", " x = y = z \n", " = = = Deep = = = \n"]
    assert [article for article in wikitext_articles(iter(rows)) if article] == [
        " = First = \n One line . \n = = A section = = \n Another . \n",
        " = Second , a title = \n x = y = z \n = = = Deep = = = \n"]


def test_a_wikitext_folder_gives_articles(hub):
    rows = [row for i in range(400) for row in ("", f" = Article {i} = \n", "", f" text of {i} \n")]
    folder = hub({"train-0.parquet": parquet(rows[:804]), "train-1.parquet": parquet(rows[804:])})
    parts = hub_parts(folder, "", "train", "", "text", wikitext_articles)
    assert len(parts) == 2
    articles = [article for article in read(parts)[0] if article]
    assert articles == [f" = Article {i} = \n text of {i} \n" for i in range(400)]
