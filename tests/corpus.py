"""What several tests of data write and read: text files of every kind, and token folders as other people make them."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from conftest import write_shard

from flatgpt.data.local_files import local_parts
from flatgpt.data.records import Part, Record, text_of
from flatgpt.data.shards import Split

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
TEXTS = ["first", "zweites: ü", "", "third\nof two lines", "🎉" * 9]
LONG = [f"document {i} {random.Random(i).getrandbits(4000):x}" for i in range(6000)]  # 6 MB that hardly compress


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
    ".jsonl": json_lines, ".jsonlines": json_lines, ".ndjson": json_lines,
    ".jsonl.gz": lambda texts, *key: gzip.compress(json_lines(texts, *key)),
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


def replaced_in(path: Path) -> list[tuple[str, int]]:
    return [text_of(record, "text") for part in local_parts(str(path), "text") for record in part.read()]


# Token folders


def nanogpt_folder(folder: Path, meta: object = None) -> Path:
    """train.bin and val.bin as nanoGPT writes them, with or without meta.pkl."""
    folder.mkdir(parents=True)
    np.array([2, 0, 1, 1, 0], dtype=np.uint16).tofile(folder / "train.bin")
    np.array([1, 0], dtype=np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def llmc_folder(folder: Path, tokens: tuple[int, ...] = (4, 5, 6)) -> Path:
    folder.mkdir()
    write_shard(folder / "fineweb_train_000002.bin", np.array(tokens))
    write_shard(folder / "fineweb_train_000001.bin", np.array([1, 2, 3, 4]))
    write_shard(folder / "fineweb_val_000000.bin", np.array([8, 9]))
    return folder


CHARS = {"vocab_size": 3, "stoi": {"b": 1, "c": 2, "a": 0}, "itos": {1: "b", 2: "c", 0: "a"}}


def read_all(split: Split) -> list[int]:
    return [token for shard in split.shards for token in shard.tolist()]


# Documents in memory


def part_of(texts: list[str], name: str = "part", read: Callable[[], None] = lambda: None) -> Part:
    """A part of these documents in memory; `read` is called as each is read."""
    def records() -> Iterator[Record]:
        for i, text in enumerate(texts, 1):
            read()
            yield Record(f"{name}:{i}", "text", text, i)

    return Part(name, len(texts), "", 0, records)


FAULT = Part("bad", 1, "", 0, lambda: iter([Record("bad:1", "fault", "bad:1 is broken", 1)]))
