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
NOT_TEXT = (".json", ".csv", ".tsv", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".arrow", ".bin", ".pdf")
COMPRESSION = 2.5  # bytes of text in a byte of a compressed file, about


@dataclass
class SourceConfig:
    """What to read: a named source, a data set on the hub, or files"""

    dataset: str = ""  # a named source, of the list above; may stand without the --dataset=
    input: str = ""  # .txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet: a file, a folder, a glob; in sorted order
    hf: str = ""  # a data set on the Hugging Face hub, owner/name, or a folder with its files
    subset: str = ""  # of a hub data set: its configuration; empty: the named source's own, or the only one
    split: str = "train"  # of a hub data set: what is read; the validation and test splits made here are cut from it
    revision: str = ""  # of a hub data set: branch, tag or commit; empty: the newest when the work begins
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
    size: int  # bytes that reading it takes, in the measure of Record.end; 0 if that is not known
    mark: str  # changes with the content, as far as that can be told without reading it whole
    text_bytes: float  # of text in it, about; 0 if that is not known
    read: Callable[[], Iterator[Record]]


@dataclass
class Source:
    """A named corpus, and how it is prepared unless the user says otherwise: a data set of the hub, or what `find`
    finds. `join` makes documents of rows that are less than one."""

    find: Callable[[], list[Part]] | None = None
    hf: str = ""
    subset: str = ""
    join: Callable[[Iterator[str]], Iterator[str]] | None = None
    tokenizer: str = "gpt2"
    val_fraction: float = 0.1


def hub_name(config: SourceConfig) -> str:
    """The hub data set that the options name, "" if they name something else."""
    if config.input:
        return ""
    return config.hf or (SOURCES[config.dataset].hf if config.dataset else "")


def find_parts(config: SourceConfig, commit: str = "") -> list[Part]:
    """The parts of what the options name; of a hub data set, at that commit. Raises OSError or ValueError."""
    source = SOURCES.get(config.dataset, Source())
    if config.input:
        return local_parts(config.input, config.text_column)
    if repo := hub_name(config):
        subset = config.subset or ("" if config.hf else source.subset)
        return hub_parts(repo, subset, config.split, commit, config.text_column, None if config.hf else source.join)
    return source.find()


def fingerprint(parts: list[Part]) -> str:
    """Changes when a part, its name, its size or its mark does."""
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
            value = json.loads(text.strip())
        except json.JSONDecodeError as error:
            raise ValueError(f"{record.where} is not JSON: {error.msg}, character {error.pos + 1}") from None
        except RecursionError:
            raise ValueError(f"{record.where} is not JSON that can be read: too many brackets in brackets") from None
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
    if b"\r" not in data and b"coding" not in data[:1000]:  # as nearly all are
        return _decode(data)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return io.TextIOWrapper(io.BytesIO(data), encoding).read(), False
    except (SyntaxError, LookupError, UnicodeError):  # no such encoding, none for text, or one that does not fit
        text, replaced = _decode(data)
        return io.StringIO(text, newline=None).read(), replaced


# Local files


def local_parts(pattern: str, text_column: str) -> list[Part]:
    """A file, the files below a folder whose ending is known, or those of what a glob names, in sorted order.

    A file that is named itself is text if nothing speaks against it. Raises FileNotFoundError when there are none,
    ValueError for a file that is none of ours."""
    root = Path(pattern)
    if root.is_file():
        if not ending(root):
            with open(root, "rb") as file:
                if root.suffix.lower() in NOT_TEXT or b"\0" in file.read(65536):
                    raise ValueError(f"--input={pattern} is not text: what can be read is {', '.join(READERS)}")
        return [_file_part(root, root.name, text_column)]
    if root.is_dir():
        found, base = [root], root
    else:
        found = [Path(path) for path in glob.glob(pattern, recursive=True)]
        base = Path(os.path.commonpath(found)) if found else root
        base = base if base.is_dir() else base.parent
    paths = {path for top in found for path in ([top] if top.is_file() else top.rglob("*"))
             if ending(path) and path.is_file() and not any(p.startswith(".") for p in path.relative_to(base).parts)}
    if not paths:
        raise FileNotFoundError(f"--input={pattern}: " + (
            f"there are no {', '.join(READERS)} files" if found else "no such file or folder"))
    return [_file_part(path, path.relative_to(base).as_posix(), text_column) for path in sorted(paths)]


def ending(path: Path) -> str:
    """That of READERS which a file has, or ""."""
    return next((known for known in READERS if path.name.lower().endswith(known)), "")


def _file_part(path: Path, name: str, text_column: str) -> Part:
    reader, size = READERS.get(ending(path), _read_whole), path.stat().st_size
    text_bytes = size * (COMPRESSION if path.suffix in (".gz", ".zst", ".parquet") else 1)
    return Part(name, size, files.mark(path), text_bytes, partial(reader, path, text_column))


def _read_whole(path: Path, text_column: str, form: str = "utf8") -> Iterator[Record]:
    """A file that is one document."""
    try:
        data = path.read_bytes()
    except OSError as error:
        yield Record(str(path), "fault", f"{path} cannot be read: {error.strerror}", 0)
        return
    yield Record(str(path), form, data, len(data))


def _read_lines(path: Path, text_column: str, compression: str = "") -> Iterator[Record]:
    """A JSON object a line. A stream that is torn ends in a fault."""
    with open(path, "rb") as file:
        stream = file
        if compression:
            import pyarrow

            # In small pieces, because what comes out of the last one of a torn stream is lost.
            stream = io.BufferedReader(pyarrow.CompressedInputStream(file, compression), 1 << 14)
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
                for text in _utf8_of(batch.column(0), path, text_column):
                    row += 1
                    yield Record(f"{path}: row {row}", "utf8", text, size * row // file.metadata.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        yield Record(str(path), "fault", f"{path} is broken behind row {row}: {error}", size)


def _utf8_of(column: Any, name: object, text_column: str) -> list[bytes]:
    """The texts of an Arrow column, undecoded, since they may be no UTF-8. Raises ValueError for another type."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"{name}: column {text_column!r} holds {kind}, not text; --text_column names the one with the "
                         "text")
    return [text or b"" for text in column.cast(kind).cast(pyarrow.large_binary()).to_pylist()]


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


def python_parts(keys: tuple[str, ...]) -> list[Part]:
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


def url_part(url: str) -> list[Part]:
    """A text on the web, which is one document."""
    return [Part(url, 0, "", 0, lambda: iter([Record(url, "utf8", download(url), 0)]))]


def commit_of(repo: str, revision: str) -> str:
    """The commit that a revision of a hub data set stands for now, "" for a folder. Raises OSError."""
    if Path(repo).is_dir():
        return ""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo, revision=revision or None).sha
    except Exception as error:  # of many kinds: no network, no such data set, no such revision
        raise OSError(f"could not open the data set {repo!r}: {type(error).__name__}: {error} (without network: copy "
                      "its files here, and pass their folder as --input=FOLDER)") from None


def hub_parts(repo: str, subset: str, split: str, commit: str, text_column: str,
              join: Callable[[Iterator[str]], Iterator[str]] | None) -> list[Part]:
    """The files of a data set on the Hugging Face hub, or of a folder laid out like one, read as a stream through
    `datasets`, which runs no code of theirs. Raises OSError or ValueError that names the data set."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        builder = datasets.load_dataset_builder(repo, subset or None, revision=commit or None)
        if split not in builder.config.data_files:
            raise ValueError(f"no split {split!r}, but {', '.join(map(str, builder.config.data_files))}")
        urls = builder.config.data_files[split]
        rows = builder.as_streaming_dataset(split=split)
        columns = rows.column_names or list(next(iter(rows), {}))
        # Where the format allows it, read no other column, little at a time, and text files as one document.
        for key, value in (("columns", [text_column]), ("batch_size", 256), ("sample_by", "document")):
            if text_column in columns and hasattr(builder.config, key):
                setattr(builder.config, key, value)
        rows = builder.as_streaming_dataset(split=split)
    except Exception as error:  # of many kinds: no network, no such data set, subset or split, files of no known format
        raise OSError(f"could not open the data set {repo!r}: {type(error).__name__}: {error} (without network: copy "
                      "its files here, and pass their folder as --input=FOLDER)") from None
    if text_column not in columns:
        raise ValueError(f"{repo} has no column {text_column!r}, but {', '.join(columns)}; --text_column names the one "
                         "with the text")
    kind = getattr((rows.features or {}).get(text_column), "dtype", "string")
    if kind not in ("string", "large_string"):
        raise ValueError(f"{repo}: column {text_column!r} holds {kind}, not text; --text_column names the one with the "
                         "text")
    names = urls if len(urls) == rows.num_shards else [f"{repo}#{i}" for i in range(rows.num_shards)]
    about = (builder.info.splits or {}).get(split)
    sizes = [about.num_bytes // len(names)] * len(names) if about and about.num_bytes else [
        int(_remote_size(url) * COMPRESSION) for url in names]
    marks = [files.mark(Path(url)) if os.path.isfile(url) else "" for url in names]  # on the hub the commit says it
    return [Part(name, size, mark, size, partial(_read_hub, rows, len(names), index, name, text_column, join))
            for index, (name, size, mark) in enumerate(zip(names, sizes, marks))]


def _read_hub(rows: Any, num_parts: int, index: int, name: str, text_column: str,
              join: Callable[[Iterator[str]], Iterator[str]] | None) -> Iterator[Record]:
    """A file of a hub data set. Content that is broken is, or ends in, a fault; a failing network is an OSError."""
    import pyarrow

    part = rows.shard(num_shards=num_parts, index=index).select_columns([text_column]).with_format("arrow")
    texts = (text for table in part.iter(batch_size=256) for text in _utf8_of(table.column(0), name, text_column))
    documents = join(text.decode(errors="replace") for text in texts) if join else texts
    row = end = 0
    try:
        for row, text in enumerate(documents, 1):
            end += len(text)
            yield Record(f"{name}: document {row}", "text" if join else "utf8", text, end)
    except (ValueError, pyarrow.ArrowException) as error:
        yield Record(name, "fault", f"{name} is broken behind document {row}: {error}", end)
    except Exception as error:  # as many kinds as there are ways to fetch a file
        raise OSError(f"reading {name} failed: {type(error).__name__}: {error}; the same command again goes on from "
                      "the last finished shard") from None


def _remote_size(url: str) -> int:
    """Bytes of a file, wherever it lies; 0 if that cannot be found out."""
    from huggingface_hub import HfFileSystem

    try:
        return HfFileSystem().size(url) if url.startswith("hf://") else os.path.getsize(url)
    except OSError:
        return 0


def wikitext_articles(rows: Iterator[str]) -> Iterator[str]:
    """WikiText's rows are lines; an article begins with the line " = Title = "."""
    article: list[str] = []
    for row in rows:
        if article and re.fullmatch(r" = [^=](.*[^=])? = \n?", row):
            yield "".join(article)
            article = []
        if row:
            article.append(row if row.endswith("\n") else row + "\n")
    if article:
        yield "".join(article)


SOURCES = {
    "shakespeare_char": Source(partial(url_part, SHAKESPEARE_URL), tokenizer="char"),
    "shakespeare": Source(partial(url_part, SHAKESPEARE_URL)),
    "python_stdlib": Source(partial(python_parts, ("stdlib",)), tokenizer="bpe", val_fraction=0.02),
    "python_source": Source(partial(python_parts, ("stdlib", "purelib", "platlib")), val_fraction=0.01),
    "tinystories": Source(hf="roneneldan/TinyStories", val_fraction=0.01),
    "wikitext": Source(hf="Salesforce/wikitext", subset="wikitext-103-raw-v1", join=wikitext_articles,
                       val_fraction=0.01),
    "openwebtext": Source(hf="Skylion007/openwebtext", val_fraction=0.0005),
    "fineweb": Source(hf="HuggingFaceFW/fineweb", subset="sample-10BT", val_fraction=0.001),
    "fineweb_edu": Source(hf="HuggingFaceFW/fineweb-edu", subset="sample-10BT", val_fraction=0.001),
}
