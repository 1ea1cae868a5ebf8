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
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import sysconfig
import tokenize
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

from flatgpt import files
from flatgpt.options import changed_keys, closest

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
NOT_TEXT = (*COMPRESSED, ".json", ".csv", ".tsv", ".tar", ".arrow", ".bin", ".pdf")
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")  # Arrow's
COMPRESSION = 2.5  # bytes of text in a byte of a compressed file, about
NAMED = 50  # files that dataset.json names of each kind that something was dropped of, replaced in, or left out


@dataclass
class SourceConfig:
    """What to read: a named source, a data set on the hub, or files"""

    dataset: str = ""  # a named source, of the list above; may stand without the --dataset=
    input: Annotated[str, "path"] = ""  # file, folder, glob of .txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet
    hf: Annotated[str, "path"] = ""  # a data set on the Hugging Face hub, owner/name, or a folder with its files
    subset: str = ""  # of a hub data set: its configuration; empty: the named source's own, or the only one
    split: str = "train"  # of a hub data set: what is read; the validation and test splits made here are cut from it
    revision: str = ""  # of a hub data set: branch, tag or commit; empty: the newest when the work begins
    text_column: str = "text"  # column of a Parquet file, key of a JSON line, that holds the text

    def validate(self) -> list[str]:
        if self.dataset and self.dataset not in SOURCES:
            hint = closest(self.dataset, SOURCES) or f"the sources are {', '.join(SOURCES)}"
            return [f"no source {self.dataset!r}; {hint} (your own text: --input=FILE_OR_FOLDER --name=NAME)"]
        if self.hf and (self.input or self.dataset):
            return [f"--hf={self.hf} is a source of its own: leave out "
                    + ("--input" if self.input else f"the name {self.dataset}")]
        if (self.input or self.dataset) and not hub_name(self):
            return [f"{key} is for data sets of the hub" for key in ("subset", "split", "revision")
                    if key in changed_keys(self)]
        return []


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


def text_of(record: Record, text_column: str) -> tuple[str, int]:
    """The text of a record, and how many bytes that are no text were replaced by U+FFFD in it (halves of surrogate
    pairs count as one). Raises ValueError that says where and what, for a record that holds none."""
    if record.form in ("json", "fault"):
        value, replaced = json_of(record)
        text = value.get(text_column, 0) if isinstance(value, dict) else 0
        if not isinstance(text, str | None):
            found = ", ".join(map(repr, value)) if isinstance(value, dict) and text_column not in value else type(
                text if isinstance(value, dict) else value).__name__
            raise ValueError(f"{record.where} has no text under {text_column!r}, but {found}; --text_column names the "
                             "key")
        text = text or ""
    elif record.form == "python":
        text, replaced = _decode_python(record.data)
    else:
        text, replaced = (record.data, 0) if record.form == "text" else files.decode(record.data)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # halves of surrogate pairs, which JSON can spell
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return whole, replaced + whole.count("\ufffd") - text.count("\ufffd")
    return text, replaced


def json_of(record: Record) -> tuple[Any, int]:
    """The value of a JSON line, and how many of its bytes were replaced. Raises ValueError as `text_of` does."""
    if record.form == "fault":
        raise ValueError(record.data)
    text, replaced = files.decode(record.data)
    text = text.strip().removeprefix("\ufeff")
    try:
        try:
            return json.loads(text), replaced
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of more digits than Python makes one of; it is no text in any case
            return json.loads(text, parse_int=float), replaced
    except json.JSONDecodeError as error:
        hint = " (it holds NULs: UTF-16 without a byte order mark?)" if "\0" in text else ""
        raise ValueError(f"{record.where} is not JSON: {error.msg}, character {error.pos + 1}{hint}") from None
    except RecursionError:
        raise ValueError(f"{record.where} is not JSON that can be read: too many brackets in brackets") from None


def _decode_python(data: bytes) -> tuple[str, int]:
    """As Python reads a source file: by its encoding line, with universal newlines."""
    if b"\r" not in data and b"coding" not in data[:1000]:  # as nearly all are
        return files.decode(data)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return io.TextIOWrapper(io.BytesIO(data), encoding).read(), 0
    except (SyntaxError, LookupError, UnicodeError):  # no such encoding, none for text, or one that does not fit
        text, replaced = files.decode(data)
        return io.StringIO(text, newline=None).read(), replaced


# Local files


def local_parts(pattern: str, text_column: str) -> list[Part]:
    """A file, the files below a folder whose ending is known, or those of what a glob names, in sorted order.

    A file that is named itself is text if nothing speaks against it. Raises FileNotFoundError when there are none,
    ValueError for a file that is none of ours."""
    root = Path(pattern)
    if root.is_file() and not ending(root):
        with open(root, "rb") as file:
            head = file.read(65536)
        what, has_nuls = files.sign_of(head), b"\0" in head and not files.mark_of(head)
        if what not in ("", files.HTML) or root.suffix.lower() in NOT_TEXT or has_nuls:
            what = what or "not text" + (" (it holds NULs: UTF-16 without a byte order mark?)" if has_nuls else "")
            raise ValueError(f"--input={pattern} is {what}; what can be read is {', '.join(READERS)}")
    base, found = look_through(pattern)
    if not (paths := [path for path in sorted(found) if not found[path]]):
        left_out = describe_left_out(count_left_out(base, found))
        raise FileNotFoundError(f"--input={pattern}: " + (
            f"there are no {', '.join(READERS)} files" + (f", but {left_out}" if left_out else "")
            if matches(pattern) else "no such file or folder"))
    return [_file_part(path, path.relative_to(base).as_posix(), text_column) for path in paths]


def matches(pattern: str) -> list[Path]:
    """What a glob names, in sorted order. A part of it is a pattern only where nothing has that very name; ** stands
    for all folders below, each once."""
    found = {Path()}
    for part in Path(pattern).parts:
        found = {path for folder in found for path in (
            [folder / part] if os.path.lexists(folder / part) else
            [path for path, why in _walk([folder], folder) if why == "folder"] if part == "**" else
            map(Path, glob.glob(os.path.join(glob.escape(str(folder)), part))))}
    return sorted(path for path in found if path.is_dir() or not pattern.endswith("/"))


def look_through(pattern: str) -> tuple[Path, dict[Path, str]]:
    """Where the names of a source's files begin, and for each file that a pattern names, by itself or with its folder,
    why it is left out: "" for one that is read. Links are followed, and each real file and folder is read once: under
    its own name, where that is found as well."""
    if os.path.isfile(pattern):
        return Path(pattern).parent, {Path(pattern): ""}
    top = matches(pattern)
    base = Path(os.path.commonpath(top)) if top else Path(pattern)
    base = base if base.is_dir() else base.parent
    found = {path: why for path, why in _walk(top, base) if why != "folder"}
    parent, real_base, seen = lru_cache(maxsize=None)(os.path.realpath), os.path.realpath(base), set()

    def real(path: Path) -> str:
        return os.path.realpath(path) if path.is_symlink() else os.path.join(parent(path.parent), path.name)

    reals = {path: real(path) for path, why in found.items() if not why}
    for path in sorted(reals, key=lambda path: (reals[path] != os.path.join(real_base, path.relative_to(base)), path)):
        stat = path.stat()
        key = (stat.st_dev, stat.st_ino) if stat.st_nlink > 1 else reals[path]
        found[path] = "linked twice" if key in seen else ""
        seen.add(key)
    return base, found


def _walk(top: list[Path], base: Path) -> Iterator[tuple[Path, str]]:
    """Every file of what `top` names, and why it is left out, whatever else leads to it; and every folder. Those that
    are links come last, so that a folder is found under its own name."""
    todo, links, seen = deque(top), {}, set()
    while todo or links:
        is_late, path = not todo, todo.popleft() if todo else links.pop(next(iter(links)))
        if any(part.startswith(".") for part in path.relative_to(base).parts):
            yield path, "hidden"
        elif path.is_file():
            yield path, "" if ending(path) else suffix(path)
        elif not path.is_dir():
            yield path, "special" if path.exists() else "linked to nowhere"
        elif path.is_symlink() and not is_late:
            links[path] = path
        elif (real := path.resolve()) in path.parent.resolve().joinpath("_").parents and path != base:
            yield path, "linked in a circle"
        elif real not in seen:
            seen.add(real)
            yield path, "folder"
            try:
                todo.extend(sorted(path.iterdir()))
            except OSError:
                yield path, "unreadable"
        elif is_late:
            yield path, "linked twice"


def suffix(path: Path) -> str:
    """The ending of a file that is none of READERS: that of a compressed one with the ending before it."""
    *_, before, last = "", "", *path.suffixes
    last = (before if last.lower() in COMPRESSED else "") + last
    return last.lower() if re.fullmatch(r"(\.(?!\d+$)\w{1,8})+", last) else "without an ending"


def left_out(config: SourceConfig, parts: list[Part]) -> dict[str, dict[str, Any]]:
    """Why files of a local source, whose parts these are, are left out -> how many `files`, and the first ones `named`.
    """
    if config.input:
        return count_left_out(*look_through(config.input))
    read = {os.path.realpath(part.name) for part in parts} if os.path.isdir(config.hf) else set()
    if not any(map(os.path.isfile, read)):  # of the hub, or named otherwise
        return {}
    base, found = look_through(config.hf)
    return count_left_out(base, {path: "" if os.path.realpath(path) in read else why or "not of the split"
                                 for path, why in found.items()})


def count_left_out(base: Path, found: dict[Path, str]) -> dict[str, dict[str, Any]]:
    """See `left_out`, of what `look_through` gives."""
    counted: dict[str, dict[str, Any]] = {}
    for path in sorted(found):
        if why := found[path]:
            why = why if why in counted or len(counted) < NAMED else "of other kinds"
            group = counted.setdefault(why, {"files": 0, "named": []})
            group["files"] += 1
            group["named"] += [path.relative_to(base).as_posix()] * (group["files"] <= NAMED)
    return dict(sorted(counted.items()))


def describe_left_out(counted: dict[str, dict[str, Any]]) -> str:
    """The largest groups, with the first names in each."""
    largest = sorted(counted.items(), key=lambda item: -item[1]["files"])
    shown = [f"{group['files']:,} {why} ({', '.join(group['named'][:3])}{', ...' if group['files'] > 3 else ''})"
             for why, group in largest[:8]]
    if len(largest) > 8:
        shown.append(f"{sum(group['files'] for _, group in largest[8:]):,} of other kinds")
    return ", ".join(shown)


def ending(path: Path) -> str:
    """That of READERS which a file has, or ""."""
    return next((known for known in READERS if path.name.lower().endswith(known)), "")


def _file_part(path: Path, name: str, text_column: str) -> Part:
    reader, size = READERS.get(ending(path), _read_whole), path.stat().st_size
    text_bytes = size * (COMPRESSION if path.suffix.lower() in (".gz", ".zst", ".parquet") else 1)
    try:
        mark = files.mark(path)
    except OSError:  # is reported when its turn comes
        mark = ""
    return Part(name, size, mark, text_bytes, partial(reader, path, text_column))


def _read_whole(path: Path, text_column: str, form: str = "utf8") -> Iterator[Record]:
    """A file that is one document."""
    try:
        data = path.read_bytes()
    except OSError as error:
        yield _fault(path, "", error)
        return
    if (what := files.sign_of(data)) not in ("", files.HTML):
        yield Record(str(path), "fault", f"{path} is {what}", len(data))
    else:
        yield Record(str(path), form, data, len(data))


def read_lines(path: Path, text_column: str = "") -> Iterator[Record]:
    """A JSON object a line. A stream that is torn ends in a fault."""
    number = 0
    try:
        with open(path, "rb") as file:
            stream = _decompressed(file, path)
            head = stream.peek(512)
            if what := files.sign_of(head):
                yield Record(str(path), "fault", f"{path} is {what}", path.stat().st_size)
                return
            mark = files.mark_of(head)
            for number, line in enumerate(_wide_lines(stream, mark) if mark else stream, 1):
                if line.strip():
                    yield Record(f"{path}:{number}", "json", line, file.tell())
    except (OSError, EOFError, zlib.error) as error:
        yield _fault(path, f" behind line {number}", error, {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}.get(
            path.suffix.lower(), b""))


class _Pieces(io.RawIOBase):
    """A decompressed stream, piece by piece, so that a torn one gives all that comes before the tear."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        piece = self._read(len(buffer))
        buffer[:len(piece)] = piece
        return len(piece)


def _decompressed(file: BinaryIO, path: Path) -> BinaryIO:
    """What is in an open file, by its ending."""
    if path.suffix.lower() == ".gz":  # several members, and zeros behind them, too
        return io.BufferedReader(_Pieces(gzip.GzipFile(fileobj=file).read1), 1 << 17)
    if path.suffix.lower() == ".zst":
        import pyarrow

        # In small pieces, because what comes out of the last one of a torn stream is lost.
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 14)
    return file


def _wide_lines(stream: BinaryIO, mark: bytes) -> Iterator[bytes]:
    """The lines of a stream in UTF-16 or UTF-32, each behind its byte order mark, b"" for a blank one."""
    newline, line = "\n".encode(files.MARKS[mark]), bytearray()
    stream.read(len(mark))
    while piece := stream.readline():  # up to a byte that a newline has, and other characters have as well
        line += piece
        line += stream.read(-len(line) % len(newline))
        if line.endswith(newline):
            yield mark + line if line.strip(b"\0 \t\r\n") else b""
            line.clear()
    yield mark + line if line else b""


def _fault(path: Path, behind: str, error: Exception, own: bytes = b"") -> Record:
    """What is said of a file that ends in an error; `own` is how a sound file of its kind begins."""
    if isinstance(error, OSError) and error.errno:
        what = f"{path} cannot be read{behind}: {error.strerror}"
    elif "requires too much memory" in str(error):
        what = (f"{path} needs a window above 128 MB, which cannot be read here; recompress without --long: "
                f"zstd -dc --long=31 {shlex.quote(str(path))} | zstd -o NEW.jsonl.zst")
    elif "encrypted" in str(error):
        what = f"{path} is encrypted, and a key for it cannot be given here"
    else:
        what = files.broken(path, f"{behind}: {error}", own)
    return Record(str(path), "fault", what, path.stat().st_size)


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
                column = batch.column(batch.schema.names.index(text_column))  # a struct's of that name may come along
                for text in _utf8_of(column, path, text_column):
                    row += 1
                    yield Record(f"{path}: row {row}", "utf8", text, size * row // file.metadata.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        yield _fault(path, f" behind row {row}", error)


def _utf8_of(column: Any, name: object, text_column: str) -> list[bytes]:
    """The texts of an Arrow column, undecoded, since they may be no UTF-8. Raises ValueError for another type."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if str(kind) not in TEXT_TYPES:
        raise ValueError(f"{name}: column {text_column!r} holds {kind}, not text; --text_column names the one with the "
                         "text")
    return [text or b"" for text in column.cast(pyarrow.large_binary()).to_pylist()]


READERS: dict[str, Callable[..., Iterator[Record]]] = {
    ".txt": _read_whole,
    ".md": _read_whole,
    ".py": partial(_read_whole, form="python"),
    ".jsonl": read_lines,
    ".jsonl.gz": read_lines,
    ".jsonl.zst": read_lines,
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
        for path in filter(Path.is_file, look_through(repo)[1] if os.path.isdir(repo) else ()):
            files.refuse_pointer(path)
        hint = ("datasets takes [ ] * ? in a folder's name for a pattern: rename it, or pass it as --input=FOLDER"
                if os.path.isdir(repo) and glob.escape(os.path.abspath(repo)) != os.path.abspath(repo) else
                "without network: copy its files here, and pass their folder as --input=FOLDER")
        raise OSError(f"could not open the data set {repo!r}: {type(error).__name__}: {error} ({hint})") from None
    if text_column not in columns:
        raise ValueError(f"{repo} has no column {text_column!r}, but {', '.join(columns)}; --text_column names the one "
                         "with the text")
    kind = getattr((rows.features or {}).get(text_column), "dtype", "string")
    if kind not in TEXT_TYPES:
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
        yield Record(name, "fault", files.broken(Path(name), f" behind document {row}: {error}"), end)
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
