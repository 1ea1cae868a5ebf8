"""hub.py: data sets of the hub, read through `datasets` from folders that are laid out like them."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from corpus import LONG, POINTER, TEXTS, json_lines, parquet, read, write

from flatgpt.data import sources
from flatgpt.data.hub import hub_parts
from flatgpt.data.sources import SourceConfig, find_parts, wikitext_articles


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
    (PLAIN, {"split": "nosuch"}, "no split 'nosuch', only train, validation"),
    (PLAIN, {"split": "all"}, "'all'"), (PLAIN, {"split": "train+validation"}, "'train+validation'"),
    (PLAIN, {"subset": "xx"}, "BuilderConfig 'xx' not found"),
    (PLAIN, {"text_column": "body"}, "hub/corpus has no column 'body', only id, text; --text_column=NAME says"),
    (PLAIN, {"text_column": "id"}, "column 'id' holds int64, not text"),
    (LANGUAGES, {"text_column": "body"}, "Please pick one among the available configs: ['en', 'de']"),
    (LANGUAGES, {"subset": "fr"}, "BuilderConfig 'fr' not found. Available: ['en', 'de']"),
    (LANGUAGES, {"subset": "en"}, "has no column 'text', only id, body"),
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


ARROW_TEXTS = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(),
               pyarrow.large_binary(), pyarrow.binary_view()]


@pytest.mark.parametrize("kind", [*ARROW_TEXTS, *(pyarrow.dictionary(pyarrow.int32(), kind) for kind in ARROW_TEXTS
                                                  if "view" not in str(kind))], ids=str)
@pytest.mark.parametrize("through", ["input", "hf"])
def test_every_kind_of_text_column_is_read(hub, kind, through):
    plain = pyarrow.array([text or None for text in TEXTS], pyarrow.string())
    column = plain.dictionary_encode().cast(kind) if "dictionary" in str(kind) else plain.cast(kind)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": column}), sink)
    folder = hub({"train.parquet": sink.getvalue().to_pybytes()})
    assert read(find_parts(SourceConfig(**{through: folder}))) == (TEXTS, [])


def test_a_pointer_or_a_pattern_in_a_hub_folder_is_said(hub):
    with pytest.raises(ValueError, match=r"train\.parquet is a Git LFS pointer"):
        find_parts(SourceConfig(hf=hub({"train.parquet": POINTER})))
    half = hub({"train-0.parquet": parquet(["one"]), "train-1.parquet": POINTER}, "half")
    found, [fault] = read(find_parts(SourceConfig(hf=half)))
    assert found == ["one"]
    assert "train-1.parquet is a Git LFS pointer" in fault
    with pytest.raises(OSError, match=r"datasets reads \[ \] \* \? in a folder's name as a pattern: rename it"):
        find_parts(SourceConfig(hf=hub({"train.parquet": parquet(["one"])}, "corpus [1]")))


def test_what_is_left_out_of_a_hub_folder_is_counted(hub):
    folder = hub({**PLAIN, "more.jsonl": json_lines(["x"]), "table.csv": "text\nx\n", ".gitattributes": ""})
    config = SourceConfig(hf=folder)
    assert {why: group["named"] for why, group in sources.skipped_files(config, find_parts(config)).items()} == {
        ".csv": ["table.csv"], "hidden": [".gitattributes"],
        "not of the split": ["more.jsonl", "validation-00000-of-00001.parquet"]}


def test_a_wikitext_folder_gives_articles(hub):
    rows = [row for i in range(400) for row in ("", f" = Article {i} = \n", "", f" text of {i} \n")]
    folder = hub({"train-0.parquet": parquet(rows[:804]), "train-1.parquet": parquet(rows[804:])})
    parts = hub_parts(folder, "", "train", "", "text", wikitext_articles)
    assert len(parts) == 2
    articles = [article for article in read(parts)[0] if article]
    assert articles == [f" = Article {i} = \n text of {i} \n" for i in range(400)]
