"""A document as it was found, and the text in it.

Owns Record and Part, what every source gives, and the decoding of a record, which is done by whichever process works on
it. It opens no file.

Invariant: a part gives the same records in the same order whenever it is read.

Example: the file b.jsonl of two lines is a part of two records; the second is Record("b.jsonl:2", "json",
b'{"text": "..."}', end=...), and `text_of` finds its text.
"""

from __future__ import annotations

import io
import json
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from flatgpt import files

MAX_NAMED_FILES = 50  # dataset.json names so many files of each kind: dropped, replaced in, or left out


class Record(NamedTuple):
    """A document as it was found."""

    where: str  # file and line, for messages
    form: str  # text, utf8, python or json; fault: `data` is the error message
    data: str | bytes
    end: int  # bytes of the part up to the end of this record


@dataclass
class Part:
    """A piece of a source, mostly a file: ranks share out parts, and a resumed run skips those that are done."""

    name: str
    size: int  # bytes, as Record.end counts them; 0 if unknown
    content_hash: str  # of its size and its two ends
    text_bytes: float  # an estimate; 0 if unknown
    read: Callable[[], Iterator[Record]]


def text_of(record: Record, text_column: str) -> tuple[str, int]:
    """The text of a record, and how many bytes in it were no text and were replaced by U+FFFD (half a surrogate pair
    counts as one). Raises ValueError, saying where and what, for a record without text."""
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
        except ValueError:  # a number with more digits than Python converts; it is no text in any case
            return json.loads(text, parse_int=float), replaced
    except json.JSONDecodeError as error:
        hint = " (it holds NULs: UTF-16 without a byte order mark?)" if "\0" in text else ""
        raise ValueError(f"{record.where} is not JSON: {error.msg}, character {error.pos + 1}{hint}") from None
    except RecursionError:
        raise ValueError(f"{record.where} is not JSON that can be read: its brackets are nested too deeply") from None


def _decode_python(data: bytes) -> tuple[str, int]:
    """Decode a source file as Python does: by its encoding line, with universal newlines."""
    if b"\r" not in data and b"coding" not in data[:1000]:  # as nearly all are
        return files.decode(data)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return io.TextIOWrapper(io.BytesIO(data), encoding).read(), 0
    except (SyntaxError, LookupError, UnicodeError):  # no such encoding, none for text, or one that does not fit
        text, replaced = files.decode(data)
        return io.StringIO(text, newline=None).read(), replaced
