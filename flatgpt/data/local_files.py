"""Files and folders on this machine -> parts and records.

Owns which files an --input names, which are left out and why, and how each kind of file is read: as one document, a
document a line, or a document a row. Decoding is for records.py.

Invariants: files come in sorted order, and each real file is read once, however many links lead to it. A file that
cannot be read, or is torn, gives all documents before the tear, and then a fault that says what it is.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import shlex
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from flatgpt import files
from flatgpt.data.records import MAX_NAMED_FILES, Part, Record

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
NOT_TEXT = (*COMPRESSED, ".json", ".csv", ".tsv", ".tar", ".arrow", ".bin", ".pdf")
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")  # Arrow's
COMPRESSION = 2.5  # bytes of text in a byte of a compressed file, about


# Which files


def local_parts(pattern: str, text_column: str) -> list[Part]:
    """A file, the files below a folder whose suffix is known, or those that a glob names, in sorted order.

    A file that is named itself may have any suffix if it looks like text. Raises FileNotFoundError if there are none,
    ValueError for a file of a kind that cannot be read."""
    root = Path(pattern)
    if root.is_file() and not known_suffix(root):
        with open(root, "rb") as file:
            head = file.read(65536)
        if _is_json_line(head.partition(b"\n")[0], text_column):
            raise ValueError(f"--input={pattern} looks like a JSON object a line: rename it to .jsonl")
        what, has_nuls = files.identify(head), b"\0" in head and not files.bom_of(head)
        if what not in ("", files.HTML) or root.suffix.lower() in NOT_TEXT or has_nuls:
            what = what or "not text" + (" (it holds NULs: UTF-16 without a byte order mark?)" if has_nuls else "")
            raise ValueError(f"--input={pattern} is {what}; what can be read is {', '.join(READERS)}" + (
                ", and .json and .csv in a folder, by --hf=FOLDER" if {".json", ".csv"} & {*root.suffixes} else ""))
    base, found = find_files(pattern)
    if not (paths := [path for path in sorted(found) if not found[path]]):
        left_out = describe_skipped(count_skipped(base, found))
        raise FileNotFoundError(f"--input={pattern}: " + (
            f"there are no {', '.join(READERS)} files" + (f", but {left_out}" if left_out else "")
            if expand_glob(pattern) else "no such file or folder"))
    return [_file_part(path, path.relative_to(base).as_posix(), text_column) for path in paths]


def _is_json_line(line: bytes, text_column: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get(text_column), str)


def expand_glob(pattern: str) -> list[Path]:
    """The paths that a glob names, in sorted order. A part of it is a pattern only if nothing has that very name; **
    stands for all folders below, each once."""
    found = {Path()}
    for part in Path(pattern).parts:
        found = {path for folder in found for path in (
            [folder / part] if os.path.lexists(folder / part) else
            [path for path, why in _walk([folder], folder) if why == "folder"] if part == "**" else
            map(Path, glob.glob(os.path.join(glob.escape(str(folder)), part))))}
    return sorted(path for path in found if path.is_dir() or not pattern.endswith("/"))


def find_files(pattern: str) -> tuple[Path, dict[Path, str]]:
    """The folder that names are relative to, and for each file that a pattern names, directly or through a folder,
    why it is left out: "" for one that is read. Links are followed, and each real file and folder is read once: under
    its own name if that is found as well."""
    if os.path.isfile(pattern):
        return Path(pattern).parent, {Path(pattern): ""}
    top = expand_glob(pattern)
    base = Path(os.path.commonpath(top)) if top else Path(pattern)
    base = base if base.is_dir() else base.parent
    found = {path: why for path, why in _walk(top, base) if why != "folder"}
    real_base, seen = os.path.realpath(base), set()
    reals = {path: os.path.realpath(path) for path, why in found.items() if not why}
    for path in sorted(reals, key=lambda path: (reals[path] != os.path.join(real_base, path.relative_to(base)), path)):
        stat = path.stat()
        key = (stat.st_dev, stat.st_ino) if stat.st_nlink > 1 else reals[path]
        found[path] = "linked twice" if key in seen else ""
        seen.add(key)
    return base, found


def _walk(top: list[Path], base: Path) -> Iterator[tuple[Path, str]]:
    """Every file below `top` and why it is left out ("" if it is read); and every folder, as "folder". Links to folders
    come last, so that a folder is found under its own name."""
    todo, links, seen = deque(top), {}, set()
    while todo or links:
        is_late, path = not todo, todo.popleft() if todo else links.pop(next(iter(links)))
        if any(part.startswith(".") for part in path.relative_to(base).parts):
            yield path, "hidden"
        elif path.is_file():
            yield path, "" if known_suffix(path) else unknown_suffix(path)
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


def unknown_suffix(path: Path) -> str:
    """The suffix of a file that is not in READERS; of a compressed file with the suffix before it."""
    *_, before, last = "", "", *path.suffixes
    last = (before if last.lower() in COMPRESSED else "") + last
    return last.lower() if re.fullmatch(r"(\.(?!\d+$)\w{1,8})+", last) else "without an ending"


def count_skipped(base: Path, found: dict[Path, str]) -> dict[str, dict[str, Any]]:
    """Why files are left out -> how many `files`, and the first ones `named`; of what `find_files` returns."""
    counted: dict[str, dict[str, Any]] = {}
    for path in sorted(found):
        if why := found[path]:
            why = why if why in counted or len(counted) < MAX_NAMED_FILES else "of other kinds"
            group = counted.setdefault(why, {"files": 0, "named": []})
            group["files"] += 1
            group["named"] += [path.relative_to(base).as_posix()] * (group["files"] <= MAX_NAMED_FILES)
    return dict(sorted(counted.items()))


def describe_skipped(counted: dict[str, dict[str, Any]]) -> str:
    """One line: the largest groups, with the first names in each."""
    largest = sorted(counted.items(), key=lambda item: -item[1]["files"])
    shown = [f"{group['files']:,} {why} ({', '.join(group['named'][:3])}{', ...' if group['files'] > 3 else ''})"
             for why, group in largest[:8]]
    if len(largest) > 8:
        shown.append(f"{sum(group['files'] for _, group in largest[8:]):,} of other kinds")
    return ", ".join(shown)


def known_suffix(path: Path) -> str:
    """The suffix in READERS that a file has, or ""."""
    return next((known for known in READERS if path.name.lower().endswith(known)), "")


def _file_part(path: Path, name: str, text_column: str) -> Part:
    reader, size = READERS.get(known_suffix(path), _read_whole), path.stat().st_size
    text_bytes = size * (COMPRESSION if path.suffix.lower() in (".gz", ".zst", ".parquet") else 1)
    try:
        content_hash = files.edge_hash(path)
    except OSError:  # is reported when its turn comes
        content_hash = ""
    return Part(name, size, content_hash, text_bytes, partial(reader, path, text_column))


# Reading a file


def _read_whole(path: Path, text_column: str, form: str = "utf8") -> Iterator[Record]:
    """The whole file as one document."""
    try:
        data = path.read_bytes()
    except OSError as error:
        yield _fault(path, "", error)
    else:
        what = files.identify(data).replace(files.HTML, "")
        yield Record(str(path), "fault" if what else form, f"{path} is {what}" if what else data, len(data))


def read_lines(path: Path, text_column: str = "") -> Iterator[Record]:
    """A JSON object a line."""
    number = 0
    try:
        with open(path, "rb") as file:
            stream = _decompressed(file, path)
            head = stream.peek(512)
            if what := files.identify(head):
                yield Record(str(path), "fault", f"{path} is {what}", path.stat().st_size)
                return
            bom = files.bom_of(head)
            for number, line in enumerate(_wide_lines(stream, bom) if bom else stream, 1):
                if line.strip():
                    yield Record(f"{path}:{number}", "json", line, file.tell())
    except (OSError, EOFError, zlib.error) as error:
        yield _fault(path, f" behind line {number}", error, {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}.get(
            path.suffix.lower(), b""))


class _Pieces(io.RawIOBase):
    """A stream that is decompressed piece by piece, so that a torn one gives everything before the tear."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        piece = self._read(len(buffer))
        buffer[:len(piece)] = piece
        return len(piece)


def _decompressed(file: BinaryIO, path: Path) -> BinaryIO:
    """The content of an open file, unpacked as its suffix says."""
    if path.suffix.lower() == ".gz":  # also of several members, with zeros behind them
        return io.BufferedReader(_Pieces(gzip.GzipFile(fileobj=file).read1), 1 << 17)
    if path.suffix.lower() == ".zst":
        import pyarrow

        # In small pieces, because the last piece of a torn stream is lost.
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 14)
    return file


def _wide_lines(stream: BinaryIO, bom: bytes) -> Iterator[bytes]:
    """The lines of a stream in UTF-16 or UTF-32, each behind its byte order mark, b"" for a blank one."""
    newline, line = "\n".encode(files.BOMS[bom]), bytearray()
    stream.read(len(bom))
    while piece := stream.readline():  # ends at the byte of a newline, which other characters have too
        line += piece
        line += stream.read(-len(line) % len(newline))
        if line.endswith(newline):
            yield bom + line if line.strip(b"\0 \t\r\n") else b""
            line.clear()
    yield bom + line if line else b""


def _fault(path: Path, behind: str, error: Exception, own: bytes = b"") -> Record:
    """The record for a file whose reading ended in an error; `own` is how a sound file of its kind begins."""
    if isinstance(error, OSError) and error.errno:
        what = f"{path} cannot be read{behind}: {error.strerror}"
    elif "requires too much memory" in str(error):
        what = (f"{path} needs a window above 128 MB, which cannot be read here; recompress without --long: "
                f"zstd -dc --long=31 {shlex.quote(str(path))} | zstd -o NEW.jsonl.zst")
    else:
        what = files.broken(path, f"{behind}: {error}", own)
    return Record(str(path), "fault", what, path.stat().st_size)


def _read_parquet(path: Path, text_column: str) -> Iterator[Record]:
    """A document a row."""
    import pyarrow
    import pyarrow.parquet

    row, size = 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise ValueError(f"{path} has no column {text_column!r}, only {', '.join(columns)}; "
                                 "--text_column=NAME says which one has the text")
            for batch in file.iter_batches(batch_size=256, columns=[text_column]):
                column = batch.column(batch.schema.names.index(text_column))  # a struct's of that name may come along
                for text in column_texts(column, path, text_column):
                    row += 1
                    yield Record(f"{path}: row {row}", "utf8", text, size * row // file.metadata.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        yield _fault(path, f" behind row {row}", error, b"PAR1")


def column_texts(column: Any, name: object, text_column: str) -> list[bytes]:
    """The texts of an Arrow column as bytes, since they may be no UTF-8. Raises ValueError for another type."""
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
    ".jsonlines": read_lines,
    ".ndjson": read_lines,
    ".jsonl.gz": read_lines,
    ".jsonl.zst": read_lines,
    ".parquet": _read_parquet,
}
