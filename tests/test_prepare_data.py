"""prepare_data.py: every text comes back from the shards it was made into, whatever happens on the way."""

import ast
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXT, files_of, torchrun
from corpus import CHARS, MAKERS, json_lines, llmc_folder, nanogpt_folder, parquet, zstd

import prepare_data
from flatgpt.data import hub, local_files, pipeline, shards, sources, staging
from flatgpt.data.records import Part, Record
from flatgpt.data.shards import open_shard
from flatgpt.data.tokenizer import EOT, load_tokenizer
from flatgpt.files import read_json


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
    sources.download.cache_clear()


def tokens_of(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([open_shard(path) for path in sorted(folder.glob(f"{split}_*.bin"))])


def text_of(folder: Path, split: str) -> str:
    return load_tokenizer(folder).decode(tokens_of(folder, split))


def documents_of(folder: Path, split: str) -> list[str]:
    """The documents of a split, each of which an end of text precedes."""
    tokenizer, tokens = load_tokenizer(folder), tokens_of(folder, split)
    first, *documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_id))
    assert len(first) == 0
    return [tokenizer.decode(document[1:]) for document in documents]


def all_documents(folder: Path) -> dict[str, list[str]]:
    """Split -> its documents, sorted."""
    return {split: sorted(documents_of(folder, split)) for split in read_json(folder / "dataset.json")["splits"]}


def write_documents(folder: str, documents: dict[str, str]) -> str:
    for name, text in documents.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def write_lines(path: str, texts: list[str]) -> str:
    """A .jsonl file with these documents."""
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(json_lines(texts))
    return path


@contextlib.contextmanager
def interrupted(num_shards: int) -> Iterator[None]:
    """Ctrl-C when so many shards are finished."""
    take = pipeline.Output.take

    def take_or_stop(output: pipeline.Output, batch: pipeline.Batch) -> list[dict]:
        if len(output.shards) >= num_shards:
            raise KeyboardInterrupt
        return take(output, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BATCH_BYTES", 100)
        patch.setattr(pipeline.Output, "take", take_or_stop)
        yield


# Splits


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


def test_documents_stay_whole_and_in_the_order_of_reading(prepare):
    names = ["a.md", "b.txt", "c/a.py", "c/b.jsonl", "d.txt", "e.txt"]
    texts = {name: f"document {i} " * 20 for i, name in enumerate(names)}
    documents = texts | {"c/b.jsonl": json.dumps({"text": texts["c/b.jsonl"]}), "z.csv": "not me"}
    folder = prepare("--tokenizer=byte", "--val_fraction=0.3", source=write_documents("texts", documents))
    train, val = documents_of(folder, "train"), documents_of(folder, "val")
    assert (len(train), len(val)) == (4, 2)
    assert train == [text for text in texts.values() if text in train]
    assert val == [text for text in texts.values() if text not in train]


def test_a_split_with_far_more_than_was_asked_for_is_a_warning(cli):
    source = write_lines("texts.jsonl", ["a" * 1000, "b" * 1000])
    result = cli("prepare_data", f"--input={source}", "--name=made", "--tokenizer=byte")
    assert "warning: the val split has 50% of the tokens, and 10% were asked for" in result.out
    assert "warning" not in cli("prepare_data", f"--input={source}", "--name=half", "--tokenizer=byte",
                                "--val_fraction=0.3").out
    result = cli("prepare_data", f"--input={source}", "--name=less", "--tokenizer=byte", "--val_fraction=0.0005")
    assert "has 50% of the tokens, and 0.05% were asked for" in result.out


def test_a_split_that_no_document_falls_in_is_a_warning(prepare, cli):
    texts = [f"document {i}" for i in range(1200)]  # no small source, where a split has one at least
    source = write_lines("texts.jsonl", texts)
    result = cli("prepare_data", f"--input={source}", "--name=made", "--tokenizer=byte", "--test_fraction=1e-9")
    assert result.code == 0
    assert result.out.endswith("warning: no document fell in the test split: give a larger --test_fraction\n")
    assert read_json(Path("data/made/dataset.json"))["splits"]["test"] == {"documents": 0, "tokens": 0}
    assert cli("prepare_data", "--verify=made").out.endswith("made is intact: 2 shards\n")


def test_a_document_of_50_mb(prepare):
    lines = "the quick brown fox jumps over the lazy dog, naïvely 🎉\n" * 20
    long = "".join(f"{i} {lines}" for i in range(43_000))
    assert 50e6 < len(long.encode()) < 64e6
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("short")
    Path("texts/b.txt").write_text(long)
    folder = prepare("--tokenizer=byte", "--workers=1", "--shard_tokens=20_000_000", source="texts")
    tokens = [tokens_of(folder, split) for split in ("train", "val")]
    found = b"".join(part[1:].astype(np.uint8).tobytes() for part in sorted(tokens, key=len))
    assert found == b"short" + long.encode()
    assert [part[0] for part in tokens] == [256, 256]
    assert sum(len(part) for part in tokens) == len(found) + 2
    assert len(list(folder.glob("*.bin"))) == 4


# The folder


def test_the_manifest_says_what_is_in_the_folder(prepare):
    documents = {"a.txt": "première " * 30, "b.txt": "", "c.md": "second " * 30, "d.jsonl": "", "e.txt": "third " * 30,
                 "sub/f.html": "left out"}
    folder = prepare("--tokenizer=bpe", "--vocab-size=270", "--shard_tokens=100",
                     source=write_documents("texts", documents))
    manifest = read_json(folder / "dataset.json")
    listed, arguments = manifest.pop("shards"), manifest.pop("arguments")
    assert manifest == {
        "format_version": 1, "tokenizer": {"kind": "bpe", "vocab_size": 270}, "dtype": "uint16", "documents": 3,
        "bytes": 10 * 30 + 7 * 30 + 6 * 30, "empty_documents": 1, "duplicate_documents": 0, "bad_records": 0,
        "documents_with_replaced_bytes": 0, "replaced_bytes": 0, "nul_characters": 0, "unknown_tokens": 0,
        "files_read": 5,
        "files": {"empty_documents": {"b.txt": 1}}, "first_fault": "",
        "left_out": {".html": {"files": 1, "named": ["sub/f.html"]}},
        "splits": {split: {"documents": count, "tokens": len(tokens_of(folder, split))}
                   for split, count in (("train", 2), ("val", 1))}}
    assert arguments == {
        "source": "", "input": "texts", "input_fingerprint": arguments["input_fingerprint"], "subset": "",
        "split": "train", "revision": "", "commit": "", "text_column": "text", "tokenizer": "bpe", "vocab_size": 270,
        "val_fraction": 0.1, "test_fraction": 0.0, "dedupe": False, "skip_bad": False, "shard_tokens": 100}
    assert [shard["file"] for shard in listed] == [
        path.name for split in ("train", "val") for path in sorted(folder.glob(f"{split}_*.bin"))]
    for shard in listed:
        path = folder / shard["file"]
        assert path.name.startswith(f"{shard['split']}_0")
        assert shard["tokens"] == len(open_shard(path))
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {path.suffix for path in folder.iterdir()} == {".bin", ".json", ".npy"}


def test_the_same_command_again_touches_nothing_and_says_so(prepare, cli):
    folder = prepare("--tokenizer=byte")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    result = cli("prepare_data", "--input=text.txt", "--name=made", "--tokenizer=byte")
    assert result.code == 0
    assert "data/made exists already" in result.out
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
    ([], "nothing to read: name a source (shakespeare_char, shakespeare, python_stdlib, "),
    (["shakespear_char"], "no source 'shakespear_char'; did you mean 'shakespeare_char'?"),
    (["novel.txt"], "--input="),
    (["--input=nowhere.txt"], "--input=nowhere.txt: no such file or folder"),
    (["--input=folder"], "--input=folder: there are no .txt, .md, .py, .jsonl"),
    (["--input=empty.txt", "--tokenizer=byte"], "the source is empty"),
    (["--input=empty.txt", "--tokenizer=char"], "the source is empty"),
    (["--input=empty.txt", "--tokenizer=bpe"], "the source is empty"),
    (["--input=*.txt", "--tokenizer=byte"], "'*.txt' cannot be the name of a folder in data/: add --name=NAME"),
    (["--input=text.txt", "--hf=some/thing"], "--hf=some/thing is a source of its own: leave out --input"),
    (["--input=text.txt", "--workers=-1"], "workers=-1 must be 0 or more"),
    (["--input=text.txt", "--tokenizer=char", "--show_merges"],
     "show_merges: the char tokenizer learns no merges from the text, --tokenizer=bpe does"),
    (["--input=short.txt", "--tokenizer=char"], "train split came out empty"),
    (["--input=text.txt", "--tokenizer=bpe", "--vocab_size=100"], "vocab_size=100"),
    (["--input=text.txt", "--tokenizer=word"], "not one of gpt2, char, byte, bpe, not a folder, and not a hub id"),
    (["--input=text.txt", "--val_fraction=0"], "val_fraction=0.0 must be above 0"),
    (["--input=text.txt", "--val_fraction=-0.1"], "val_fraction=-0.1 must be above 0"),
    (["--input=text.txt", "--test_fraction=-0.1"], "test_fraction=-0.1"),
    (["--input=text.txt", "--val_fraction=0.5", "--test_fraction=0.5"], "below 1"),
    (["--input=text.txt", "--shard_tokens=0"], "shard_tokens=0 must be positive"),
    (["--input=text.txt", "--name=../up"], "name='../up' must be a plain folder name")])
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


# Sources


@pytest.mark.usefixtures("offline")
def test_a_failed_download_names_the_url_and_the_way_out(refused):
    line = refused("prepare_data", "shakespeare_char")
    assert sources.SHAKESPEARE_URL in line
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


@pytest.mark.parametrize(("source", "kind"), [("python_stdlib", "bpe"), ("python_source", "byte")])
def test_python_becomes_a_data_set_without_a_network(cli, monkeypatch, source, kind):
    write_documents("lib", {f"{i}.py": f"a = {i}\n" for i in range(30)} | {"site-packages/b.py": "b = 1\n"})
    paths = {"stdlib": "lib", "purelib": "lib/site-packages", "platlib": "lib/site-packages"}
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {k: str(Path(p).resolve()) for k, p in paths.items()})
    assert cli("prepare_data", source, *([] if kind == "bpe" else [f"--tokenizer={kind}"])).code == 0
    manifest = read_json(Path("data", source, "dataset.json"))
    assert manifest["tokenizer"]["kind"] == kind
    assert manifest["documents"] == (30 if source == "python_stdlib" else 31)
    documents = itertools.chain(*all_documents(Path("data", source)).values())
    assert set(documents) >= {f"a = {i}\n" for i in range(30)}


def test_every_kind_of_file_gives_its_documents(prepare):
    texts = [f"document {i} ü" for i in range(50)]
    Path("texts").mkdir()
    for i, (ending, make) in enumerate(MAKERS.items()):
        Path(f"texts/{i}{ending}").write_bytes(make(texts[13 * i:13 * i + 13], "body"))
    folder = prepare("--tokenizer=byte", "--text_column=body", source="texts")
    assert documents_of(folder, "train") == [text for text in texts if text not in documents_of(folder, "val")]
    assert sorted(itertools.chain(*all_documents(folder).values())) == sorted(texts)
    assert len(documents_of(folder, "val")) == 5


def test_parquet_files_of_the_hub_become_a_data_set(cli, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [f"document {i}" for i in range(60)]
    Path("corpus").mkdir()
    for i in range(3):
        Path(f"corpus/train-{i:05d}-of-00003.parquet").write_bytes(parquet(texts[20 * i:20 * i + 20], "body"))
    command = ("--hf=corpus", "--text_column=body", "--tokenizer=byte", "--shard_tokens=200", "--test_fraction=0.1")
    assert cli("prepare_data", *command).code == 0
    assert sorted(itertools.chain(*all_documents(Path("data/corpus")).values())) == sorted(texts)
    assert read_json(Path("data/corpus/dataset.json"))["arguments"]["source"] == "corpus"
    with interrupted(2):
        assert cli("prepare_data", *command, "--name=again").code == 130
    assert cli("prepare_data", *command, "--name=again").code == 0
    assert files_of(Path("data/again")) == files_of(Path("data/corpus"))


# What is dropped, replaced and counted


def counts_of(folder: Path) -> list[int]:
    """Documents, empty ones, duplicates, bad records, documents with replaced bytes."""
    manifest = read_json(folder / "dataset.json")
    return [manifest[key] for key in ("documents", "empty_documents", "duplicate_documents", "bad_records",
                                      "documents_with_replaced_bytes")]


def test_bytes_that_are_no_utf8_are_replaced_and_counted(prepare, cli):
    Path("texts").mkdir()
    contents = [b"\xef\xbb\xbfone\r\n\xff two \xc3\xa9\xc3 \x00 three", "whole é \ufffd".encode(), b"\xe9"]
    for i, content in enumerate(contents):
        Path(f"texts/{i}.txt").write_bytes(content)
    folder = prepare("--tokenizer=char", source="texts")
    assert sorted(text_of(folder, "train") + text_of(folder, "val")) == sorted(
        "one\r\n\ufffd two é\ufffd \x00 three" + "whole é \ufffd" + "\ufffd")
    assert counts_of(folder) == [3, 0, 0, 0, 2]
    assert "3 documents, 41 bytes, 2 replaced texts;" in cli("prepare_data", "--info=made").out


def untidy(folder: str = "texts", num_files: int = 9) -> str:
    """Files of which each has something to be said of."""
    for i in range(num_files):
        texts = [f"{i}: caf\xe9 ".encode("latin-1") * (i + 1), b"", b"NUL\0" * i or b"none", b"twice", b"torn"]
        lines = b"".join(b'{"text": "%b"}\n' % text.replace(b"\0", rb"\u0000") for text in texts)
        Path(folder).mkdir(exist_ok=True)
        Path(folder, f"{i}.jsonl").write_bytes(lines + b"{\n")
    write_documents(folder, {"page.html": "<p>", ".hidden.txt": "", "sub/more.txt": "more"})
    os.symlink("nowhere", Path(folder, "gone.txt"))
    return folder


UNTIDY = {  # of nine files
    "replaced_bytes": {f"{i}.jsonl": i + 1 for i in range(9)}, "empty_documents": {f"{i}.jsonl": 1 for i in range(9)},
    "nul_characters": {f"{i}.jsonl": i for i in range(1, 9)}, "bad_records": {f"{i}.jsonl": 1 for i in range(9)},
    "duplicate_documents": {"0.jsonl": 0} | {f"{i}.jsonl": 2 for i in range(1, 9)}}
LEFT_OUT = {".html": {"files": 1, "named": ["page.html"]}, "hidden": {"files": 1, "named": [".hidden.txt"]},
            "linked to nowhere": {"files": 1, "named": ["gone.txt"]}}


def test_what_was_read_left_out_dropped_and_replaced_is_counted_and_named_by_file(cli, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 50)
    command = (f"--input={untidy()}", "--name=made", "--tokenizer=byte", "--dedupe=True", "--skip_bad=True")
    shown = cli("prepare_data", *command).out.splitlines()
    manifest = read_json(Path("data/made/dataset.json"))
    assert manifest["files"] == {what: {name: count for name, count in named.items() if count}
                                 for what, named in UNTIDY.items()}
    for what, named in UNTIDY.items():
        assert manifest[what] == sum(named.values())
    assert (manifest["files_read"], manifest["left_out"]) == (10, LEFT_OUT)
    assert manifest["first_fault"].startswith("texts/0.jsonl:6 is not JSON")
    assert shown[1:] == [
        "left out: 1 .html (page.html), 1 hidden (.hidden.txt), 1 linked to nowhere (gone.txt)",
        "dropped, because broken: 0.jsonl 1, 1.jsonl 1, 2.jsonl 1, other files 6 (the first: texts/0.jsonl:6 is not "
        "JSON: Expecting property name enclosed in double quotes, character 2)",
        "dropped, because empty: 0.jsonl 1, 1.jsonl 1, 2.jsonl 1, other files 6",
        "dropped, because duplicate: 1.jsonl 2, 2.jsonl 2, 3.jsonl 2, other files 10",
        "warning: bytes that are not valid text, replaced by U+FFFD: 0.jsonl 1, 1.jsonl 2, 2.jsonl 3, other files 39",
        "warning: NULs in the text, as of UTF-16 without a byte order mark: 1.jsonl 1, 2.jsonl 2, 3.jsonl 3, "
        "other files 30"]
    assert shown == [line for line in cli("prepare_data", "--info=made").out.splitlines() if line in shown]


@pytest.mark.parametrize("named", [50, 4])
def test_what_is_said_of_files_survives_a_kill_and_is_the_same_for_any_number_of_ranks(cli, monkeypatch, named):
    for module in (pipeline, staging, local_files):
        monkeypatch.setattr(module, "MAX_NAMED_FILES", named)
    options = (f"--input={untidy()}", "--tokenizer=byte", "--skip_bad=True", "--shard_tokens=60")
    assert cli("prepare_data", *options, "--name=whole").code == 0
    for num_shards in (2, 5):
        with interrupted(num_shards):
            assert cli("prepare_data", *options, "--name=made").code == 130
    assert cli("prepare_data", *options, "--name=made").code == 0
    assert files_of(Path("data/made")) == files_of(Path("data/whole"))
    whole = read_json(Path("data/whole/dataset.json"))
    assert all(len(files) <= named for files in whole["files"].values())
    if named == 50:  # elsewhere the limit is the usual one
        run_ranks(3, *options, "--name=three")
        three = read_json(Path("data/three/dataset.json"))
        for key in ("files", "files_read", "left_out", "first_fault", *UNTIDY):
            assert three[key] == whole[key]


def test_what_was_begun_or_made_before_files_were_named_goes_on(cli):
    """progress.json and dataset.json without the keys that came later."""
    later = ("files", "first_fault", "files_read", "left_out", "replaced_bytes", "nul_characters")
    options = (f"--input={untidy()}", "--tokenizer=byte", "--skip_bad=True", "--shard_tokens=60")
    assert cli("prepare_data", *options, "--name=whole").code == 0
    with interrupted(3):
        assert cli("prepare_data", *options, "--name=made").code == 130
    for path, holds in ((next(Path("data/.made.partial").glob("rank*/progress.json")), 2), (
            Path("data/whole/dataset.json"), 6)):
        state = read_json(path)
        assert len(state.keys() & set(later)) == holds
        path.write_text(json.dumps({key: value for key, value in state.items() if key not in later}))
    assert cli("prepare_data", *options, "--name=made").code == 0
    assert "exists already" in cli("prepare_data", *options, "--name=whole").out
    assert "9 empty documents, 9 broken records" in cli("prepare_data", "--info=whole").out
    made, whole = (read_json(Path(f"data/{name}/dataset.json")) for name in ("made", "whole"))
    for key in ("documents", "bytes", "bad_records", "empty_documents", "shards"):
        assert made[key] == whole[key]
    assert 0 < sum(made["files"]["empty_documents"].values()) < made["empty_documents"] == 9


@pytest.mark.parametrize("name", ["notes [1].txt", "a*b"])
def test_a_source_whose_name_is_a_pattern_only_needs_a_name(cli, refused, name):
    write_documents(".", {f"{name}/a.txt": TEXT} if "." not in name else {name: TEXT})
    assert "cannot be the name of a folder in data/: add --name=NAME" in refused(
        "prepare_data", f"--input={name}", "--tokenizer=byte")
    assert cli("prepare_data", f"--input={name}", "--tokenizer=byte", "--name=made").code == 0
    assert text_of(Path("data/made"), "train").removeprefix(EOT) == TEXT[:int(len(TEXT) * 0.9)]


def test_duplicates_are_kept_unless_they_are_to_be_dropped(prepare):
    texts = [f"document {i % 30}" for i in range(90)]
    random.Random(0).shuffle(texts)
    source = write_lines("texts.jsonl", ["", *texts, ""])
    kept = prepare("--tokenizer=byte", "--test_fraction=0.1", source=source)
    dropped = prepare("--tokenizer=byte", "--test_fraction=0.1", "--dedupe=True", source=source, name="once")
    assert counts_of(kept) == [90, 2, 0, 0, 0]
    assert counts_of(dropped) == [30, 2, 60, 0, 0]
    assert {split: set(found) for split, found in all_documents(kept).items()} == {
        split: set(found) for split, found in all_documents(dropped).items()}  # no text is in two splits
    assert sorted(itertools.chain(*all_documents(dropped).values())) == sorted(set(texts))
    assert [documents_of(dropped, split) for split in ("train", "val")] == [
        list(dict.fromkeys(documents_of(kept, split))) for split in ("train", "val")]  # the first of each stays


BROKEN = {  # file -> its content, what is said of it, how many of 300 documents are left
    "broken.jsonl": (json_lines([f"document {i}" for i in range(299)]) + b'{"text": "torn',
                     "broken.jsonl:300 is not JSON", 299),
    "keyless.jsonl": (json_lines([f"document {i}" for i in range(299)]) + b'{"txt": "document 299"}',
                      "keyless.jsonl:300 has no text under 'text', but 'txt'; --text_column names the key", 299),
    "torn.jsonl.gz": (gzip.compress(json_lines([f"document {i}" for i in range(300)]))[:-9],
                      "torn.jsonl.gz is broken behind line", None),
    "torn.jsonl.zst": (zstd(json_lines([f"document {i}" for i in range(300)]))[:-2],
                       "torn.jsonl.zst is broken behind line", None),
    "torn.parquet": (parquet([f"document {i}" for i in range(300)])[:-9], "torn.parquet is broken behind row 0", 0)}


@pytest.mark.parametrize("kind", ["byte", "bpe"])  # the text of a bpe is read once more, for its training
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_an_error_or_counted(refused, prepare, name, kind):
    content, words, left = BROKEN[name]
    source = write_documents("texts", {"a.txt": "first 0123456789 document", "z.txt": "last"})
    Path("texts", name).write_bytes(content)
    line = refused("prepare_data", "--input=texts", f"--tokenizer={kind}", "--vocab_size=300")
    assert words in line
    assert "--skip_bad=True" in line
    assert not list(Path("data").iterdir())
    folder = prepare(f"--tokenizer={kind}", "--vocab_size=300", "--skip_bad=True", source=source)
    documents, empty, duplicate, bad, replaced = counts_of(folder)
    assert (empty, duplicate, bad, replaced) == (0, 0, 1, 0)
    assert documents == left + 2 if left is not None else 2 <= documents < 302 + (name == "torn.jsonl.gz")
    texts = text_of(folder, "train") + text_of(folder, "val")
    assert "first 0123456789 document" in texts
    assert "last" in texts


def test_a_run_that_met_something_broken_goes_on_when_told_to_skip_it(refused, prepare, monkeypatch):
    texts = [f"document {i} " * 9 for i in range(400)]
    Path("texts.jsonl").write_bytes(json_lines(texts[:300]) + b"{\n" + json_lines(texts[300:]))
    options = ("--tokenizer=byte", "--shard_tokens=1000")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "BATCH_BYTES", 1000)
        assert "texts.jsonl:301 is not JSON" in refused("prepare_data", "--input=texts.jsonl", "--name=made", *options)
    finished = {path.name: path.stat().st_mtime_ns for path in Path("data").rglob("train*.bin")}
    assert len(finished) > 10
    made = prepare(*options, "--skip_bad=True", source="texts.jsonl")
    whole = prepare(*options, "--skip_bad=True", source="texts.jsonl", name="whole")
    assert files_of(made) == files_of(whole)
    assert counts_of(made) == [400, 0, 0, 1, 0]
    assert {name: (made / name).stat().st_mtime_ns for name in finished} == finished


# Any number of workers, killed at any moment


def corpus(path: str = "corpus.jsonl", num_documents: int = 18_000) -> str:
    """Five megabytes in documents of all lengths, with duplicates, empty ones, and bytes that are no text."""
    draw = random.Random(5)
    words = ["lorem", "ipsum", "dolor", "sit", "amet", "é", "🎉", EOT]
    texts = [f"{draw.randrange(num_documents)} " + " ".join(draw.choices(words, k=draw.randrange(100)))
             for _ in range(num_documents)]
    texts[::50] = [""] * len(texts[::50])
    texts[7::90] = texts[3::90]
    Path(path).write_bytes(json_lines(texts).replace(b"dolor", b"d\xffl\xffr"))
    assert Path(path).stat().st_size > prepare_data.SMALL_BYTES
    return path


def test_any_number_of_workers_writes_the_same_bytes(prepare, monkeypatch):
    started = []

    class Recorded(pipeline.ProcessPoolExecutor):
        def __init__(self, count, *args, **kwargs):
            started.append(count)
            super().__init__(count, *args, **kwargs)

    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", Recorded)
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 100_000)
    source = corpus()
    made = [prepare("--tokenizer=byte", "--shard_tokens=500_000", "--test_fraction=0.05", "--dedupe=True",
                    f"--workers={workers}", source=source, name=f"by_{workers}") for workers in (1, 2, 4)]
    assert started == [2, 4]  # one worker is a thread
    first, *others = map(files_of, made)
    assert len([name for name in first if name.endswith(".bin")]) > 8
    assert counts_of(made[0])[1] > 300
    assert min(counts_of(made[0])) == 0 < min(counts_of(made[0])[i] for i in (2, 4))
    for other in others:
        assert other == first


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    while STARTED:
        process = STARTED.pop()
        with contextlib.suppress(ProcessLookupError):  # as it should be
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


IN_SMALL_BATCHES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from flatgpt.data import pipeline
import prepare_data
from flatgpt import options
pipeline.BATCH_BYTES = 20_000
options.run_script(prepare_data.main)
"""


def start(*args: str, **env: str) -> subprocess.Popen:
    """prepare_data.py in a process of its own, in batches so small that there is much to interrupt. Its workers hold
    its output open as long as they live."""
    STARTED.append(subprocess.Popen([sys.executable, "-c", IN_SMALL_BATCHES, *args], text=True, start_new_session=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                    env={**os.environ, "OMP_NUM_THREADS": "1", **env}))
    return STARTED[-1]


def progress_of(rank: int = 0) -> dict:
    """What a rank has written down of its work on data/made, {} if it has not begun."""
    [*found] = Path("data/.made.partial").glob(f"rank_{rank:05d}_of_*/progress.json")
    return read_json(found[0]) if found else {}


def finished_shards(rank: int = 0) -> int:
    return len(progress_of(rank).get("shards", []))


def children_of(process: subprocess.Popen) -> int:
    listed = subprocess.run(["ps", "-A", "-o", "ppid="], text=True, stdout=subprocess.PIPE, check=True).stdout
    return listed.split().count(str(process.pid))


def test_killed_at_five_random_moments_the_run_ends_byte_identical_and_leaves_no_worker(prepare):
    options = ("--tokenizer=byte", "--shard_tokens=20_000", "--test_fraction=0.05", "--dedupe=True", "--workers=2")
    expected = files_of(prepare(*options, "--workers=1", source=corpus(), name="whole"))
    num_shards = len([name for name in expected if name.endswith(".bin")])
    assert num_shards > 150
    command = ("--input=corpus.jsonl", "--name=made", *options)
    draw, within = random.Random(1), 0
    for kill in range(5):
        process, wanted = start(*command), finished_shards() + draw.randrange(1, num_shards // 6)
        until = time.monotonic() + (draw.random() if kill == 4 else 60)  # the last one is killed as it starts
        while (finished := finished_shards()) < wanted and time.monotonic() < until:
            time.sleep(0.001)
        if kill < 4:
            assert finished >= wanted
            assert children_of(process) >= 2
            time.sleep(0.02 * draw.random())
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)  # returns when the last worker is gone
        assert process.returncode == -signal.SIGKILL
        within += 0 < finished_shards() < num_shards
    assert within >= 4
    process = start(*command)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert files_of(Path("data/made")) == expected
    assert [path.name for path in Path("data").iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def half_made(cli, tmp_path) -> tuple[str, ...]:
    """The command that was interrupted: data/.made.partial has some finished shards."""
    texts = [f"document {i % 250} " * (i % 40 + 1) for i in range(300)]
    command = (f"--input={write_lines('texts.jsonl', texts)}", "--name=made", "--tokenizer=byte", "--dedupe=True",
               "--shard_tokens=2000")
    with interrupted(15):
        result = cli("prepare_data", *command)
    assert result.code == 130
    assert "what is finished is kept in data/.made.partial: the same command goes on from there" in result.out
    assert result.err == "error: interrupted\n"
    assert 15 <= len(list(Path("data/.made.partial").rglob("*.bin"))) < 20
    assert not Path("data/made").exists()
    return command


def test_an_interrupted_run_goes_on_from_its_finished_shards(cli, half_made):
    finished = {path.name: path.stat().st_mtime_ns for path in Path("data").rglob("train*.bin")}
    assert cli("prepare_data", *half_made).code == 0
    assert cli("prepare_data", *half_made, "--name=whole").code == 0
    assert files_of(Path("data/made")) == files_of(Path("data/whole"))
    assert {name: Path("data/made", name).stat().st_mtime_ns for name in finished} == finished
    assert {path.name for path in Path("data").iterdir()} == {"made", "whole"}


def test_an_interrupted_run_without_a_finished_shard_leaves_nothing(cli):
    Path("text.txt").write_text(TEXT)
    with interrupted(0):
        result = cli("prepare_data", "--input=text.txt", "--tokenizer=byte")
    assert (result.code, result.out, result.err) == (130, "", "error: interrupted\n")
    assert not list(Path("data").iterdir())


@pytest.fixture
def hub_commits(monkeypatch) -> tuple[dict[str, str], list[str]]:
    """A hub data set: the commit of each revision, which may move on, and the commits that were read."""
    commits, read = {"": "old", "v2": "second"}, []

    def find_parts(config: sources.SourceConfig, commit: str) -> list[Part]:
        read.append(commit)
        documents = [Record(f"part:{i}", "text", f"document {i} of {commit}", i) for i in range(50)]
        return [Part("part", 0, "", 0, lambda: iter(documents))]

    monkeypatch.setattr(hub, "commit_of", lambda repo, revision: commits[revision])
    monkeypatch.setattr(sources, "find_parts", find_parts)
    return commits, read


HUB = ("--hf=owner/corpus", "--tokenizer=byte", "--shard_tokens=100", "--workers=1")


def test_a_resumed_run_reads_the_commit_that_it_began_with(cli, hub_commits):
    commits, read = hub_commits
    with interrupted(3):
        assert cli("prepare_data", *HUB).code == 130
    commits[""] = "new"
    assert cli("prepare_data", *HUB).code == 0
    assert read == ["old", "old"]
    arguments = read_json(Path("data/corpus/dataset.json"))["arguments"]
    assert (arguments["revision"], arguments["commit"]) == ("", "old")
    assert "exists already" in cli("prepare_data", *HUB).out
    assert cli("prepare_data", *HUB, "--name=later").code == 0
    assert documents_of(Path("data/later"), "val")[0].endswith(" of new")


def test_work_that_was_killed_at_its_beginning_does_not_say_which_commit_another_revision_is(cli, hub_commits,
                                                                                          monkeypatch):
    with monkeypatch.context() as patch, interrupted(0):
        patch.setattr(staging.StagingFolder, "clean_up", lambda folder: None)  # a kill leaves no time for it
        assert cli("prepare_data", *HUB).code == 130
    assert cli("prepare_data", *HUB, "--revision=v2").code == 0
    arguments = read_json(Path("data/corpus/dataset.json"))["arguments"]
    assert (arguments["revision"], arguments["commit"]) == ("v2", "second")


@pytest.mark.parametrize(("changed", "words"), [
    ("--tokenizer=char", "tokenizer was byte, is char"), ("--val_fraction=0.2", "val_fraction was 0.1, is 0.2"),
    ("--shard_tokens=3000", "shard_tokens was 2000, is 3000"), ("--dedupe=False", "dedupe was True, is False"),
    ("--input=other.jsonl", "the files of the source have changed")])
def test_other_arguments_do_not_go_on_with_half_a_folder(refused, half_made, changed, words):
    write_lines("other.jsonl", ["other"] * 9)
    before = files_of(Path("data"))
    line = refused("prepare_data", *half_made, changed)
    for part in ("data/.made.partial", words, "choose another --name, or remove it"):
        assert part in line
    assert files_of(Path("data")) == before


@pytest.mark.parametrize(("first", "then"), [("1", "2"), ("2", "1"), ("2", "12")])
def test_another_number_of_processes_does_not_go_on_with_half_a_folder(cli, refused, monkeypatch, first, then):
    command = (f"--input={write_lines('texts.jsonl', [f'document {i} ' * 20 for i in range(200)])}", "--name=made",
               "--tokenizer=byte", "--shard_tokens=2000")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", first)
    with interrupted(10):
        assert cli("prepare_data", *command).code == 130
    before = files_of(Path("data"))
    assert len(before) > 10
    monkeypatch.setenv("WORLD_SIZE", then)
    line = refused("prepare_data", *command)
    assert f"data/.made.partial was begun by another number of processes (rank_00000_of_{int(first):05d}" in line
    assert files_of(Path("data")) == before


def test_two_runs_do_not_make_one_folder(cli, monkeypatch, tmp_path):
    command = (f"--input={write_lines('texts.jsonl', [f'document {i}' for i in range(300)])}", "--name=made",
               "--tokenizer=byte", "--shard_tokens=1000")
    seen = []

    def second_run(*args):
        process = start(*command)
        output, _ = process.communicate(timeout=60)
        seen.append((process.returncode, output))

    monkeypatch.setattr(prepare_data, "check_disk", second_run)  # in the midst of the first
    assert cli("prepare_data", *command).code == 0
    assert seen == [(2, "error: data/made is being made by another process: wait for it, or choose another --name\n")]
    assert cli("prepare_data", "--verify=made").code == 0
    assert [path.name for path in Path("data").iterdir()] == ["made"]


# Several processes, as torchrun starts them


def start_ranks(world_size: int, *args: str) -> list[subprocess.Popen]:
    return [start(*args, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                  LOCAL_WORLD_SIZE=str(world_size)) for rank in range(world_size)]


def run_ranks(world_size: int, *args: str) -> list[str]:
    """What each rank printed; the test fails with that unless all exit 0."""
    processes = start_ranks(world_size, *args)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, outputs
    return outputs


def shared_out(num_files: int = 5) -> str:
    """A folder of files that share documents, and have some of them twice."""
    for i in range(num_files):
        texts = [f"document {j} " * (j % 30 + 1) for j in range(60 * i, 60 * i + 80)]
        write_lines(f"texts/{i}.jsonl", [*texts, texts[9], ""])
    return "texts"


@pytest.mark.parametrize("dedupe", [pytest.param(False, marks=pytest.mark.soak), True])
def test_two_ranks_of_torchrun_put_the_same_documents_in_the_same_splits(prepare, cli, tmp_path, dedupe):
    options = ("--tokenizer=byte", "--shard_tokens=3000", "--val_fraction=0.2", "--test_fraction=0.1",
               f"--dedupe={dedupe}")
    one = prepare(*options, source=shared_out(), name="one")
    command = ("--input=texts", "--name=two", *options)
    if dedupe:
        run_ranks(2, *command)
    else:
        torchrun(2, ROOT / "prepare_data.py", *command, cwd=tmp_path)
    two = tmp_path / "data" / "two"
    assert all_documents(two) == all_documents(one)
    assert counts_of(two) == counts_of(one) == ([320, 5, 85, 0, 0] if dedupe else [405, 5, 0, 0, 0])
    assert cli("prepare_data", "--verify=two").code == 0
    names = [shard["file"] for shard in read_json(two / "dataset.json")["shards"]]
    assert names == sorted(names, key=lambda name: (["train", "test", "val"].index(name.split("_")[0]), name))
    assert sorted(path.name for path in two.iterdir()) == sorted(
        [*names, *(name.replace(".bin", ".documents.npy") for name in names), "dataset.json", "tokenizer.json",
         "tokenizer_config.json"])
    assert {path.name for path in Path("data").iterdir()} == {"one", "two"}
    short = [shard for shard in read_json(two / "dataset.json")["shards"] if shard["tokens"] < 3000]
    assert len(short) == 6  # the last of each split and rank: both did their part


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_all_ranks_use_the_tokenizer_that_rank_0_makes(prepare, kind):
    options = (f"--tokenizer={kind}", "--vocab_size=300")
    one = prepare(*options, source=shared_out(), name="one")
    run_ranks(3, "--input=texts", "--name=three", *options)
    assert Path("data/three/tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()
    for split in ("train", "val"):
        assert sorted(text_of(Path("data/three"), split)) == sorted(text_of(one, split))
        if kind == "bpe":
            assert sorted(documents_of(Path("data/three"), split)) == sorted(documents_of(one, split))


def test_ranks_without_a_file_do_no_harm(prepare):
    one = prepare("--tokenizer=byte", source=shared_out(2), name="one")
    run_ranks(3, "--input=texts", "--name=three", "--tokenizer=byte")
    assert all_documents(Path("data/three")) == all_documents(one)


def test_ranks_that_were_killed_go_on_and_end_byte_identical(prepare):
    for i in range(4):
        write_lines(f"texts/{i}.jsonl", [f"document {i} {j % 900} " * (j % 40 + 1) for j in range(1200)])
    options = ("--input=texts", "--tokenizer=byte", "--shard_tokens=10_000", "--dedupe=True")
    run_ranks(2, *options, "--name=whole")
    expected = files_of(Path("data/whole"))
    for kill_at in ({0: 3, 1: 5}, {0: 14, 1: 9}, {1: 20}):  # rank -> finished shards
        processes, left = start_ranks(2, *options, "--name=made"), dict(kill_at)
        deadline = time.monotonic() + 60
        while left:
            for rank in [rank for rank, wanted in left.items() if finished_shards(rank) >= wanted]:
                processes[rank].send_signal(signal.SIGKILL)
                del left[rank]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if 0 not in kill_at:  # rank 0 waits for rank 1 then, until somebody ends it
            while not progress_of(0)["done"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert processes[0].poll() is None
            processes[0].send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate(timeout=20)
            assert process.returncode == -signal.SIGKILL
        assert not progress_of(1)["done"]
    assert not Path("data/made").exists()
    run_ranks(2, *options, "--name=made")
    assert files_of(Path("data/made")) == expected
    assert {path.name for path in Path("data").iterdir()} == {"whole", "made"}
    before = files_of(Path("data"))
    outputs = run_ranks(2, *options, "--name=made")
    assert [output.splitlines()[-1:] for output in outputs] == [
        ["data/made exists already and was made with the same arguments: nothing to do"], outputs[1].splitlines()]
    assert "this is rank 1 of 2, and all of them have to be started" in outputs[1]
    assert files_of(Path("data")) == before


# Disks that are full


def test_a_full_disk_is_one_line_and_the_finished_shards_go_on(cli, half_made):
    """A limit on the size of files stands in for the disk."""
    finished = {path.name: path.read_bytes() for path in Path("data").rglob("*.bin")}
    limit = 3000  # less than a shard takes
    process = subprocess.run([sys.executable, ROOT / "prepare_data.py", *half_made], text=True, check=False,
                             capture_output=True, timeout=60,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.returncode == 2
    lines = process.stderr.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"error: could not write data/\.made\.partial/rank_00000\w+/\w+\.tmp: File too large", lines[0])
    assert {path.name: path.read_bytes() for path in Path("data").rglob("*.bin")} == finished
    assert cli("prepare_data", *half_made).code == 0
    assert cli("prepare_data", *half_made, "--name=whole").code == 0
    assert files_of(Path("data/made")) == files_of(Path("data/whole"))


def free_bytes(monkeypatch, free: Callable[[], int]) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free()))


def test_a_disk_without_the_space_is_refused_before_anything_is_written(refused, prepare, monkeypatch):
    Path("text.txt").write_text(TEXT)
    free_bytes(monkeypatch, lambda: len(TEXT))  # a byte takes two
    line = refused("prepare_data", "--input=text.txt", "--name=made", "--tokenizer=byte")
    assert f"the disk of data/ has {len(TEXT):,} bytes free, but about {2 * len(TEXT):,} will be written" in line
    assert not list(Path("data").iterdir())
    free_bytes(monkeypatch, lambda: 3 * len(TEXT))
    prepare("--tokenizer=byte")


# What a user sees


def test_each_finished_shard_is_a_line(cli, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 1000)
    source = write_lines("texts.jsonl", [f"document {i} " * 20 for i in range(100)])
    lines = cli("prepare_data", f"--input={source}", "--tokenizer=byte", "--shard_tokens=5000").out.splitlines()
    assert len(lines) == 5
    for i, line in enumerate(lines[:-1], 1):
        assert re.fullmatch(rf"(train|val)_00000\d\.bin is finished: \d+\.\d MB/s, 0\.0M tokens, {i} shards",
                            line), line
    assert re.fullmatch(r"data/texts: 100 documents, 23,800 bytes; tokenizer byte with 257 tokens; train [\d,]+, "
                        r"val [\d,]+ tokens", lines[-1])


def test_a_terminal_shows_a_bar_with_speed_tokens_shards_and_time_left(cli, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    source = write_lines("texts.jsonl", [f"document {i} " * 20 for i in range(100)])
    result = cli("prepare_data", f"--input={source}", "--tokenizer=byte", "--shard_tokens=5000")
    bars = result.err.split("\r")
    assert re.search(r"100%\|█+\| 00:00<00:00, \d+\.\d MB/s, 0\.0M tokens, \d+ shards", bars[-1]), bars
    assert "is full" not in result.out


def test_info_shows_a_table_and_text_from_every_split(cli, prepare):
    folder = prepare("--tokenizer=byte", "--shard_tokens=3000", "--val_fraction=0.25")
    tokens = {split: len(tokens_of(folder, split)) for split in ("train", "val")}
    for name in ("made", folder):
        lines = cli("prepare_data", f"--info={name}").out.splitlines()
        assert lines[0].endswith("data/made: tokenizer byte, vocabulary of 257")
        table = [line.split() for line in lines if line.startswith(("split", "train ", "val "))]
        assert table == [["split", "shards", "tokens", "documents", "bytes", "on", "disk"]] + [
            [split, str(-(-count // 3000)), f"{count:,}", "1",
             f"{2 * count + 1024 * -(-count // 3000):,}"] for split, count in tokens.items()]
        windows = [ast.literal_eval(line.strip()) for line in lines if line.startswith("    ")]
        assert len(windows) >= 4
        assert all(len(window) == 48 and window in TEXT for window in windows)


def test_info_knows_the_folders_of_others(cli, monkeypatch, tmp_path):
    def unavailable():
        raise OSError("no network")

    monkeypatch.setattr(shards, "GPT2Tokenizer", unavailable)
    out = cli("prepare_data", f"--info={nanogpt_folder(tmp_path / 'nano', CHARS)}").out
    assert "nano: tokenizer char, vocabulary of 3" in out
    assert [line.split() for line in out.splitlines() if line.startswith(("train ", "val "))] == [
        ["train", "1", "5", "?", "10"], ["val", "1", "2", "?", "4"]]
    assert "train.bin, tokens 1 to 5:\n    'abba'" in out
    out = cli("prepare_data", f"--info={llmc_folder(tmp_path / 'llmc')}").out
    assert "llmc: tokenizer not said, vocabulary of 50,257" in out
    assert "fineweb_train_000001.bin, tokens 1 to 4:\n    2 3 4" in out


def test_show_merges_prints_rules_that_lead_from_bytes_to_the_vocabulary(cli):
    text = "é日本 the the\tthen 日本 é " * 30 + TEXT
    Path("text.txt").write_text(text, encoding="utf-8")
    command = ("prepare_data", "--input=text.txt", "--name=made", "--tokenizer=bpe", "--vocab_size=300")
    assert "merge" not in cli(*command).out
    shown, again = (cli(*command[:2], f"--name={name}", *command[3:], "--show_merges=True").out
                    for name in ("other", "made"))
    table = shown.partition("merges, in the order they were learned:\n")[2]
    assert again.partition("learned:\n")[2] == table
    rules = re.findall(r"^ +(\d+) +(b?'.*?') \+ (b?'.*?') += (b?'.*')$", table, re.MULTILINE)
    assert len(rules) == len(table.splitlines()) == 300 - 257
    known = {bytes([byte]) for byte in range(256)}
    for rank, (number, *rule) in enumerate(rules, 1):
        left, right, made = (part if isinstance(part, bytes) else part.encode() for part in map(ast.literal_eval, rule))
        assert int(number) == rank
        assert {left, right} <= known
        assert left + right == made
        assert made not in known
        known.add(made)
    tokenizer = load_tokenizer("data/made")
    vocab = {ast.literal_eval(tokenizer.spell(i)) for i in range(1, 300)}
    assert {part if isinstance(part, bytes) else part.encode() for part in vocab} == known
    assert "b'\\xc3' + b'\\xa9' " in table
    assert "' the'" in table


@pytest.mark.parametrize("length", [5, 10])
def test_a_validation_split_of_one_token_is_said_and_named_at_training(cli, refused, tmp_path, length):
    (tmp_path / "few.txt").write_text("abcdefghij"[:length])
    result = cli("prepare_data", "--input=few.txt", "--name=few", "--tokenizer=char")
    assert result.out.endswith("warning: the val split has one token, but a loss takes two: give more text, or "
                               "a larger --val_fraction\n")
    options = ("--dataset=few", "--block_size=2", "--n_layer=1", "--n_head=1", "--n_embd=16", "--device=cpu")
    line = refused("train", *options)
    assert "data/few/val_000000.bin is too short: an evaluation takes two tokens, and it has 1; prepare" in line
    assert "--val_fraction" in line
    result = cli("prepare_data", "--input=few.txt", "--name=more", "--tokenizer=char", "--val_fraction=0.4")
    assert "warning" not in result.out


def test_when_no_document_can_be_encoded_their_number_and_the_first_are_said(cli, refused):
    Path("ab.txt").write_text("ab" * 100)
    assert cli("prepare_data", "--input=ab.txt", "--name=ab", "--tokenizer=char").code == 0
    write_lines("texts.jsonl", ["xyz"] * 3)
    line = refused("prepare_data", "--input=texts.jsonl", "--name=made", "--tokenizer=data/ab", "--skip_bad=True")
    assert "empty (0 documents, 0 bytes, 3 broken records; the first that is broken: texts.jsonl:1: " in line
