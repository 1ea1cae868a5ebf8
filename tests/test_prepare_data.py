"""prepare_data.py: every text comes back from the shards it was made into, and what cannot be made leaves no trace."""

import hashlib
import itertools
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT, files_of

import prepare_data
from data import open_shard
from tokenizer import load_tokenizer
from weights import read_json

EOT = "<|endoftext|>"


@pytest.fixture
def prepare(cli, tmp_path):
    """`prepare("--tokenizer=byte")` makes data/NAME of TEXT, or of the file or folder given, and returns it."""
    def call(*args: str, source: str = "text.txt", name: str = "made") -> Path:
        if not Path(source).exists():
            Path(source).write_text(TEXT)
        result = cli("prepare_data", f"--input={source}", f"--name={name}", *args)
        assert result.code == 0, result.err
        assert [path.name for path in (tmp_path / "data").iterdir() if path.name.startswith(".")] == []
        return tmp_path / "data" / name

    return call


@pytest.fixture
def offline(monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    prepare_data.download.cache_clear()


def tokens_of(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([open_shard(path) for path in sorted(folder.glob(f"{split}_*.bin"))])


def text_of(folder: Path, split: str) -> str:
    return load_tokenizer(folder).decode(tokens_of(folder, split))


def documents_of(folder: Path, split: str) -> list[str]:
    """The documents of a split, each of which an end of text precedes."""
    first, *documents = text_of(folder, split).split(EOT)
    assert first == ""
    return documents


def write_documents(folder: str, documents: dict[str, str]) -> str:
    for name, text in documents.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# Splits


def test_a_text_is_cut_where_nanogpt_cuts_it(prepare):
    folder = prepare("--tokenizer=char")
    at = int(len(TEXT) * 0.9)
    assert (text_of(folder, "train"), text_of(folder, "val")) == (TEXT[:at], TEXT[at:])
    assert not list(folder.glob("test_*"))


@pytest.mark.parametrize("kind", ["gpt2", "char", "byte", "bpe"])
def test_train_test_and_val_are_the_text_in_this_order(prepare, request, kind):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_tokenizer")
    folder = prepare(f"--tokenizer={kind}", "--vocab_size=300", "--val_fraction=0.25", "--test_fraction=0.15")
    parts = [text_of(folder, split) for split in ("train", "test", "val")]
    if kind != "char":
        assert {part.count(EOT) for part in parts} == {1}
        parts = [part.removeprefix(EOT) for part in parts]
    assert "".join(parts) == TEXT
    assert [len(part) / len(TEXT) for part in parts] == pytest.approx([0.6, 0.15, 0.25], abs=1e-3)


def test_tiny_shakespeare_has_nanogpts_counts(cli, shakespeare, gpt2_tokenizer):
    """The counts are those in nanoGPT's own readme files; ours have an end of text before each split of words."""
    for source, vocab_size, train, val in (("shakespeare_char", 65, 1_003_854, 111_540),
                                           ("shakespeare", 50257, 301_966 + 1, 36_059 + 1)):
        assert cli("prepare_data", source, f"--input={shakespeare}").code == 0
        assert read_json(Path("data", source, "dataset.json"))["tokenizer"]["vocab_size"] == vocab_size
        assert [len(tokens_of(Path("data", source), split)) for split in ("train", "val")] == [train, val]


def test_the_text_files_of_a_folder_are_read_in_sorted_order(prepare):
    documents = {"b.txt": "second " * 20, "c/a.py": "third " * 20, "a.md": "first " * 20, "z.csv": "not me"}
    folder = prepare("--tokenizer=byte", "--val_fraction=0.5", source=write_documents("texts", documents))
    texts = [train + val for train, val in zip(documents_of(folder, "train"), documents_of(folder, "val"))]
    assert texts == [documents[name] for name in ("a.md", "b.txt", "c/a.py")]


def test_a_hundred_documents_are_split_whole_by_what_they_say(prepare):
    texts = [f"document {i} " * (i % 3 + 1) for i in range(200)]
    named = {f"{i:03d}.txt": text for i, text in enumerate(texts)}
    renamed = {f"{i % 7}/{i}.md": text for i, text in enumerate(reversed(texts))}
    folders = [prepare("--tokenizer=byte", "--val_fraction=0.3", "--test_fraction=0.2", name=name,
                       source=write_documents(f"texts_{name}", documents))
               for name, documents in (("named", named), ("renamed", renamed))]
    splits, others = ([sorted(documents_of(folder, split)) for split in ("train", "test", "val")] for folder in folders)
    assert splits == others
    assert sorted(itertools.chain(*splits)) == sorted(texts)
    assert [len(split) / 200 for split in splits] == pytest.approx([0.5, 0.2, 0.3], abs=0.1)


# The folder


def test_the_manifest_says_what_is_in_the_folder(prepare):
    documents = {"a.txt": "première " * 30, "b.txt": "", "c.md": "second " * 30}
    folder = prepare("--tokenizer=bpe", "--vocab-size=270", "--shard_tokens=100",
                     source=write_documents("texts", documents))
    manifest = read_json(folder / "dataset.json")
    assert {key: manifest[key] for key in ("format_version", "tokenizer", "dtype", "documents", "bytes")} == {
        "format_version": 1, "tokenizer": {"kind": "bpe", "vocab_size": 270}, "dtype": "uint16", "documents": 2,
        "bytes": 10 * 30 + 7 * 30}
    assert manifest["arguments"] == {
        "source": "", "input": "texts", "tokenizer": "bpe", "vocab_size": 270, "val_fraction": 0.1,
        "test_fraction": 0.0, "shard_tokens": 100, "input_sha256": manifest["arguments"]["input_sha256"]}
    assert [shard["file"] for shard in manifest["shards"]] == [
        path.name for split in ("train", "val") for path in sorted(folder.glob(f"{split}_*.bin"))]
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        assert path.name.startswith(f"{shard['split']}_0")
        assert shard["tokens"] == len(open_shard(path))
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {path.suffix for path in folder.iterdir()} == {".bin", ".json"}


def test_shards_have_the_size_asked_for_and_keep_the_order(prepare):
    whole, cut = prepare("--tokenizer=char"), prepare("--tokenizer=char", "--shard_tokens=1000", name="cut")
    for split in ("train", "val"):
        assert np.array_equal(tokens_of(whole, split), tokens_of(cut, split))
        sizes = [len(open_shard(path)) for path in sorted(cut.glob(f"{split}_*.bin"))]
        assert set(sizes[:-1]) == {1000}
        assert 0 < sizes[-1] <= 1000
        assert len(list(whole.glob(f"{split}_*.bin"))) == 1


def test_a_split_that_fills_its_shards_makes_no_empty_one(prepare):
    Path("text.txt").write_text("ab" * 1000)
    folder = prepare("--tokenizer=char", "--shard_tokens=200", "--val_fraction=0.2")
    assert sorted(path.name for path in folder.glob("*.bin")) == [
        *(f"train_{i:06d}.bin" for i in range(8)), "val_000000.bin", "val_000001.bin"]


def test_the_same_command_again_touches_nothing_and_says_so(prepare, cli):
    folder = prepare("--tokenizer=byte")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    result = cli("prepare_data", "--input=text.txt", "--name=made", "--tokenizer=byte")
    assert result.code == 0
    assert "data/made is there already" in result.out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_other_arguments_do_not_replace_what_is_there(prepare, refused):
    folder = prepare("--tokenizer=byte")
    before = files_of(folder)
    line = refused("prepare_data", "--input=text.txt", "--name=made", "--tokenizer=char", "--val_fraction=0.2")
    for part in ("data/made", "tokenizer was byte, is char", "val_fraction was 0.1, is 0.2", "--name"):
        assert part in line
    assert "input was" not in line
    assert files_of(folder) == before


def test_a_folder_of_somebody_else_is_left_alone(refused):
    write_documents("data/mine", {"notes.txt": "dear diary"})
    Path("text.txt").write_text(TEXT)
    assert "data/mine exists and was not made by" in refused("prepare_data", "--input=text.txt", "--name=mine",
                                                             "--tokenizer=byte")
    assert files_of(Path("data")) == {"mine/notes.txt": b"dear diary"}


# What cannot be made


@pytest.mark.parametrize(("args", "words"), [
    ([], "nothing to read: name a source (shakespeare_char, shakespeare, python_stdlib) or pass --input="),
    (["shakespear_char"], "no source 'shakespear_char'; did you mean 'shakespeare_char'?"),
    (["novel.txt"], "--input="),
    (["--input=nowhere.txt"], "--input=nowhere.txt: no such file or folder"),
    (["--input=folder"], "--input=folder: the folder has no .txt, .md, .py files"),
    (["--input=empty.txt", "--tokenizer=char"], "empty.txt is empty"),
    (["--input=empty.txt", "--tokenizer=bpe"], "empty.txt is empty"),
    (["--input=short.txt", "--tokenizer=char"], "train split came out empty"),
    (["--input=text.txt", "--tokenizer=char", "--test_fraction=1e-9"], "test split came out empty"),
    (["--input=text.txt", "--tokenizer=bpe", "--vocab_size=100"], "vocab_size=100"),
    (["--input=text.txt", "--tokenizer=word"], "one of auto, gpt2, char, byte, bpe"),
    (["--input=text.txt", "--val_fraction=0"], "val_fraction=0.0 must be above 0"),
    (["--input=text.txt", "--val_fraction=-0.1"], "val_fraction=-0.1 must be above 0"),
    (["--input=text.txt", "--test_fraction=-0.1"], "test_fraction=-0.1"),
    (["--input=text.txt", "--val_fraction=0.5", "--test_fraction=0.5"], "below 1"),
    (["--input=text.txt", "--shard_tokens=0"], "shard_tokens=0 must be positive"),
    (["--input=text.txt", "--name=../up"], "name='../up' must be a plain folder name"),
    (["shakespear", "--shard_tokens=-1", "--val_fraction=2"], "val_fraction=2.0 must be above 0")])
def test_what_cannot_be_made_is_one_line_and_leaves_nothing(refused, args, words):
    write_documents(".", {"text.txt": "four", "empty.txt": "", "short.txt": "x", "folder/data.csv": "1,2"})
    before = files_of(Path())
    assert words in refused("prepare_data", *args)
    assert files_of(Path()) == before
    assert not list(Path().glob("data/*"))


def test_all_faults_of_the_options_are_shown_at_once(refused):
    line = refused("prepare_data", "shakespear", "--shard_tokens=-1", "--val_fraction=2", "--name=a/b")
    for part in ("'shakespeare'?", "shard_tokens=-1", "val_fraction=2.0", "'a/b'"):
        assert part in line


def test_an_interrupted_run_leaves_nothing(cli, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    Path("text.txt").write_text(TEXT)
    monkeypatch.setattr(prepare_data, "write_json", interrupt)  # the last thing written, when the shards are there
    assert cli("prepare_data", "--input=text.txt", "--tokenizer=byte").code == 130
    assert not list(Path("data").iterdir())


# Sources


@pytest.mark.usefixtures("offline")
def test_a_failed_download_names_the_url_and_the_way_out(refused):
    line = refused("prepare_data", "shakespeare_char")
    assert prepare_data.SHAKESPEARE_URL in line
    assert "no network" in line
    assert "--input=FILE" in line
    assert not list(Path("data").iterdir())


@pytest.mark.usefixtures("offline")
def test_a_named_source_can_be_read_from_a_file(cli):
    Path("input.txt").write_text(TEXT)
    assert cli("prepare_data", "shakespeare_char", "--input=input.txt").code == 0
    manifest = read_json(Path("data/shakespeare_char/dataset.json"))
    assert manifest["tokenizer"] == {"kind": "char", "vocab_size": len(set(TEXT))}
    assert manifest["arguments"]["source"] == "shakespeare_char"
    assert text_of(Path("data/shakespeare_char"), "train") + text_of(Path("data/shakespeare_char"), "val") == TEXT


def test_the_standard_library_is_read_as_python_reads_it(cli, monkeypatch):
    write_documents("lib", {"plain.py": "a = 'ü'\n", "site-packages/other.py": "not mine\n", "notes.txt": "no code\n"})
    Path("lib/latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    Path("lib/broken.py").write_bytes(b"x = '\xe9'\n")
    Path("lib/unknown.py").write_bytes(b"# -*- coding: klingon -*-\n")
    monkeypatch.setattr(prepare_data.sysconfig, "get_paths", lambda: {"stdlib": str(Path("lib").resolve())})
    assert cli("prepare_data", "python_stdlib", "--val_fraction=0.5").code == 0
    folder = Path("data/python_stdlib")
    manifest = read_json(folder / "dataset.json")
    assert (manifest["documents"], manifest["skipped_documents"], manifest["tokenizer"]["kind"]) == (2, 2, "bpe")
    documents = [train + val for train, val in zip(documents_of(folder, "train"), documents_of(folder, "val"))]
    assert documents == ["# -*- coding: latin-1 -*-\nx = 'é'\n", "a = 'ü'\n"]


def test_bytes_that_are_no_utf8_are_replaced_and_the_rest_is_kept(prepare):
    Path("text.txt").write_bytes(b"\xef\xbb\xbfone\r\n\xff two \xc3\xa9\xc3 \x00 three")
    folder = prepare("--tokenizer=char", "--val_fraction=0.5")
    assert text_of(folder, "train") + text_of(folder, "val") == "one\r\n\ufffd two é\ufffd \x00 three"


def test_a_text_that_spells_end_of_text_does_not_end(prepare):
    Path("text.txt").write_text(f"one {EOT} two " * 20)
    folder = prepare("--tokenizer=byte")
    assert [list(tokens_of(folder, split)).count(256) for split in ("train", "val")] == [1, 1]
