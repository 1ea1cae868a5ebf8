"""Where text comes from: named corpora, data sets on the hub, local files.

Owns the way from a source to records, one a document, in an order that never changes; it splits nothing and makes no
tokens (prepare_data.py does). A source is a list of parts, mostly files: the units that several machines share out, and
that a resumed run skips. A part gives records, which hold their text as it was found, so that the decoding is done by
whichever process works on it (`text_of`).

To add a named source, add a line to SOURCES. Example: the file b.jsonl of two lines is a part of two records; the
second is Record("b.jsonl:2", "json", b'{"text": "..."}', end=...), and `text_of` finds its text.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import io
import json
import os
import re
import sysconfig
import tokenize
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import files

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
COMPRESSION = 2.5  # bytes of text in a byte of a compressed file, about


@dataclass
class SourceConfig:
    """What to read: a named source, a data set on the hub, or files"""

    dataset: str = ""  # a named source; may stand without the --dataset=
    input: str = ""  # .txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet: a file, a folder, a glob; in sorted order
    hf: str = ""  # a data set on the Hugging Face hub, owner/name, or a folder with its files
    subset: str = ""  # its configuration; empty: the source's own, or the only one
    split: str = "train"  # its split that is read; validation and test are cut from that
    revision: str = ""  # its branch, tag or commit; empty: the newest
    text_column: str = "text"  # column of a Parquet file, key of a JSON line, that holds the text


class Record(NamedTuple):
    """A document as it was found."""

    where: str  # file and line, for messages
    form: str  # text, utf8, python or json; fault: `data` says what is wrong
    data: str | bytes
    end: int  # bytes of the part that were read when this record had been


@dataclass
class Part:
    name: str
    size: int  # bytes that reading it takes, in the measure of Record.end
    mark: str  # changes when the content does
    text_bytes: float  # of text in it, about; 0 if that is not known
    read: Callable[[], Iterator[Record]]


@dataclass
class Source:
    """A named corpus, and how it is prepared unless the user says otherwise."""

    find: Callable[[SourceConfig], list[Part]]
    tokenizer: str = "gpt2"
    val_fraction: float = 0.1


def find_parts(config: SourceConfig) -> list[Part]:
    """The parts of what the options name. Raises OSError or ValueError."""
    if config.input:
        return local_parts(config.input, config.text_column)
    if config.hf:
        return hub_parts(config, config.hf)
    return SOURCES[config.dataset].find(config)


def fingerprint(parts: list[Part]) -> str:
    """Changes when a part, its name or its size does."""
    return hashlib.sha256(json.dumps([(part.name, part.size, part.mark) for part in parts]).encode()).hexdigest()


def text_of(record: Record, text_column: str) -> tuple[str, bool]:
    """The text of a record, and whether bytes that are no text were replaced by U+FFFD in it. Raises ValueError that
    says where and what, for a record that holds none."""
    if record.form == "fault":
        raise ValueError(record.data)
    if record.form == "python":
        return _decode_python(record.data)
    text, replaced = (record.data, False) if record.form == "text" else _decode(record.data)
    if record.form == "json":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{record.where} is not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get(text_column, 0), str | None):
            found = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{record.where} has no text under {text_column!r}, but {found}; --text_column names the "
                             "key")
        text = value[text_column] or ""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # halves of surrogate pairs, which JSON can spell
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True
    return text, replaced


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", errors="replace"), True


def _decode_python(data: bytes) -> tuple[str, bool]:
    """As Python reads a source file: by its encoding line, with universal newlines."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    except SyntaxError:  # no such encoding, or none that fits
        encoding = "utf-8"
    for errors in ("strict", "replace"):
        try:
            return io.TextIOWrapper(io.BytesIO(data), encoding, errors).read(), errors == "replace"
        except UnicodeDecodeError:
            continue
    raise AssertionError("unreachable: errors are replaced")


# Local files


def local_parts(pattern: str, text_column: str) -> list[Part]:
    """A file, the files below a folder whose ending is known, or what a glob names, in sorted order. Raises
    FileNotFoundError when there are none."""
    root = Path(pattern)
    if root.is_file():  # a file that is named is read, whatever its ending
        return [_file_part(root, root.name, text_column)]
    if root.is_dir():
        found, base = [root], root
    else:
        found = [Path(path) for path in glob.glob(pattern, recursive=True)]
        base = Path(os.path.commonpath(found)) if found else root
        base = base if base.is_dir() else base.parent
    paths = {path for top in found for path in ([top] if top.is_file() else top.rglob("*"))
             if ending(path) and path.is_file()}
    if not paths:
        raise FileNotFoundError(f"--input={pattern}: " + (
            f"there are no {', '.join(READERS)} files" if found else "no such file or folder"))
    return [_file_part(path, path.relative_to(base).as_posix(), text_column) for path in sorted(paths)]


def ending(path: Path) -> str:
    return next((ending for ending in READERS if path.name.endswith(ending)), "")


def _file_part(path: Path, name: str, text_column: str) -> Part:
    reader, size = READERS.get(ending(path), _read_whole), path.stat().st_size
    text_bytes = size * (COMPRESSION if path.suffix in (".gz", ".zst", ".parquet") else 1)
    return Part(name, size, files.mark(path), text_bytes, partial(reader, path, text_column))


def _read_whole(path: Path, text_column: str, form: str = "utf8") -> Iterator[Record]:
    """A file that is one document."""
    data = path.read_bytes()
    yield Record(str(path), form, data, len(data))


def _read_lines(path: Path, text_column: str, compression: str = "") -> Iterator[Record]:
    """A JSON object a line. A stream that is torn ends in a fault."""
    with open(path, "rb") as file:
        stream = file
        if compression:
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(file, compression), 1 << 20)
        number = 0
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield Record(f"{path}:{number}", "json", line, file.tell())
        except OSError as error:
            yield Record(str(path), "fault", f"{path} is broken behind line {number}: {error}", path.stat().st_size)


def _read_parquet(path: Path, text_column: str) -> Iterator[Record]:
    """A row a document. A file that is torn is, or ends in, a fault."""
    import pyarrow
    import pyarrow.parquet

    row, size = 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise ValueError(f"{path} has no column {text_column!r}, but {', '.join(columns)}; --text_column "
                                 "names the one with the text")
            for batch in file.iter_batches(batch_size=256, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield Record(f"{path}: row {row}", "text", _as_text(text, path, text_column),
                                 size * row // file.metadata.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        yield Record(str(path), "fault", f"{path} is broken behind row {row}: {error}", size)


def _as_text(value: Any, name: object, text_column: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}: column {text_column!r} holds {type(value).__name__}, not text; --text_column names "
                         "the one with the text")
    return value or ""


READERS: dict[str, Callable[..., Iterator[Record]]] = {
    ".txt": _read_whole,
    ".md": _read_whole,
    ".py": partial(_read_whole, form="python"),
    ".jsonl": _read_lines,
    ".jsonl.gz": partial(_read_lines, compression="gzip"),
    ".jsonl.zst": partial(_read_lines, compression="zstd"),
    ".parquet": _read_parquet,
}


# Python's own sources


def python_parts(config: SourceConfig, keys: tuple[str, ...]) -> list[Part]:
    """The .py files below this interpreter's folders of those names: its standard library is "stdlib", the installed
    packages lie in "purelib" and "platlib"."""
    roots = {os.path.realpath(sysconfig.get_paths()[key]): key for key in reversed(keys)}
    parts = []
    for root, key in roots.items():
        for folder, below, names in os.walk(root):
            if key == "stdlib":  # packages may be installed in there
                below[:] = [name for name in below if name not in ("site-packages", "dist-packages")]
            for path in (f"{folder}/{name}" for name in names if name.endswith(".py")):
                if os.path.isfile(path):
                    name = key + path.removeprefix(root).replace(os.sep, "/")
                    size = os.path.getsize(path)
                    parts.append(Part(name, size, "", size, partial(READERS[".py"], Path(path), "")))
    return sorted(parts, key=lambda part: part.name)


# The network


@lru_cache(maxsize=1)
def download(url: str) -> bytes:
    """A file from the network. Raises OSError with the way out."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"could not download {url} ({error}); download it on another machine and pass "
                      "--input=FILE") from None


def url_part(config: SourceConfig, url: str) -> list[Part]:
    """A text on the web, which is one document."""
    return [Part(url, 0, "", 0, lambda: iter([Record(url, "utf8", download(url), 0)]))]


def hub_parts(config: SourceConfig, repo: str, subset: str = "",
              join: Callable[[Iterator[str]], Iterator[str]] | None = None) -> list[Part]:
    """The files of a data set on the Hugging Face hub, or of a folder laid out like one, read as a stream through
    `datasets`, which runs no code of theirs. `join` makes documents of rows that are less than one.

    Raises OSError or ValueError that names the data set."""
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(repo, config.subset or subset or None,
                                                revision=config.revision or None)
        rows = builder.as_streaming_dataset(split=config.split)
        if not isinstance(rows, datasets.IterableDataset):
            raise ValueError(f"no split {config.split!r}")
        columns = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # of many kinds: no network, no such data set, subset or split, files of no known format
        raise OSError(f"could not open the data set {repo!r}: {type(error).__name__}: {error}") from None
    if config.text_column not in columns:
        raise ValueError(f"{repo} has no column {config.text_column!r}, but {', '.join(columns)}; --text_column names "
                         "the one with the text")
    urls = builder.config.data_files[config.split] if builder.config.data_files else []
    names = urls if len(urls) == rows.num_shards else [f"{repo}#{i}" for i in range(rows.num_shards)]
    split = (builder.info.splits or {}).get(config.split)
    sizes = [split.num_bytes // len(names)] * len(names) if split and split.num_bytes else [
        int(_remote_size(url) * COMPRESSION) for url in names]

    def read(index: int) -> Iterator[Record]:
        part = rows.shard(num_shards=len(names), index=index).select_columns([config.text_column])
        name, end = names[index], 0
        texts = (_as_text(text, name, config.text_column)
                 for table in part.with_format("arrow").iter(batch_size=256) for text in table.column(0).to_pylist())
        for row, text in enumerate(join(texts) if join else texts, 1):
            end += len(text)
            yield Record(f"{name}: document {row}", "text", text, end)

    return [Part(name, size, "", size, partial(_named_failures, name, partial(read, i)))
            for i, (name, size) in enumerate(zip(names, sizes))]


def _remote_size(url: str) -> int:
    """Bytes of a file, wherever it lies; 0 if that cannot be found out."""
    from huggingface_hub import HfFileSystem

    try:
        return HfFileSystem().size(url) if url.startswith("hf://") else os.path.getsize(url)
    except OSError:
        return 0


def _named_failures(name: str, read: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    """What a library raises while it streams says neither what was read nor what to do."""
    try:
        yield from read()
    except ValueError as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        raise OSError(f"reading {name} failed: {type(error).__name__}: {error}; the same command again goes on from "
                      "the last finished shard") from None


def wikitext_articles(rows: Iterator[str]) -> Iterator[str]:
    """WikiText's rows are lines; an article begins with the line " = Title = "."""
    article: list[str] = []
    for row in rows:
        if re.fullmatch(r" = [^=].*[^=] = \n?", row) and article:
            yield "".join(article)
            article = []
        article.append(row if row.endswith("\n") else row + "\n" if row else "")
    yield "".join(article)


def hub(repo: str, subset: str = "", join: Callable[[Iterator[str]], Iterator[str]] | None = None) -> Callable:
    return partial(hub_parts, repo=repo, subset=subset, join=join)


SOURCES = {
    "shakespeare_char": Source(partial(url_part, url=SHAKESPEARE_URL), "char"),
    "shakespeare": Source(partial(url_part, url=SHAKESPEARE_URL)),
    "python_stdlib": Source(partial(python_parts, keys=("stdlib",)), "bpe", val_fraction=0.02),
    "python_source": Source(partial(python_parts, keys=("stdlib", "purelib", "platlib")), val_fraction=0.01),
    "tinystories": Source(hub("roneneldan/TinyStories"), val_fraction=0.01),
    "wikitext": Source(hub("Salesforce/wikitext", "wikitext-103-raw-v1", wikitext_articles), val_fraction=0.01),
    "openwebtext": Source(hub("Skylion007/openwebtext"), val_fraction=0.0005),
    "fineweb": Source(hub("HuggingFaceFW/fineweb", "sample-10BT"), val_fraction=0.001),
    "fineweb_edu": Source(hub("HuggingFaceFW/fineweb-edu", "sample-10BT"), val_fraction=0.001),
}
