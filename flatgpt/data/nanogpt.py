"""nanoGPT's data: its headerless train.bin of 16-bit tokens, and its meta.pkl.

Owns what can be told of such files, which say nothing of themselves: whether a .bin surely holds something else, and
what vocabulary and characters a meta.pkl gives. Shards are opened by shards.py. Nothing in a pickle is run.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from pathlib import Path

import numpy as np

from flatgpt.files import identify
from flatgpt.pickles import load_plain

MAX_VOCAB_SIZE = 2**32
MIN_VALUES = 64  # values other than 0 that it takes to tell what a file without a header holds
MAX_ID = 1 << 20  # above that of any vocabulary
SAMPLE_BYTES = 1 << 17  # read in each of three places
FOREIGN_DTYPES = (("<i8", "64-bit numbers"), ("<i4", "32-bit numbers"), ("<f8", "64-bit floating-point numbers"),
                   ("<f4", "32-bit floating-point numbers"), (">u2", "big-endian 16-bit numbers"))


def refuse_foreign_bin(path: Path) -> None:
    """Raises ValueError, with the command that mends it, for a train.bin or val.bin that surely holds something else
    than 16-bit tokens.

    In wider numbers every second 16 bits are 0, or next to it, and the others are not. Tokens do that in less than half
    of all pairs, so never in MIN_VALUES of them. Only a text of single characters with blanks between them looks alike;
    it has few different characters, and never two blanks in a row, and is let pass."""
    size = path.stat().st_size
    starts = (0, size // 16 * 8, (size - SAMPLE_BYTES) // 8 * 8) if size > 3 * SAMPLE_BYTES else (0,)
    sample = b""
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            sample += file.read(3 * SAMPLE_BYTES // len(starts))
    if what := identify(sample):
        raise ValueError(f"{path} is {what}")
    text = sample[:4096]
    if len(text) >= MIN_VALUES and not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", text):
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder("utf-8")().decode(text)
            raise ValueError(f"{path} is a text, not tokens: make a data set of it with python prepare_data.py "
                             f"--input='{path}' --name=NAME")
    for dtype, what in FOREIGN_DTYPES:
        itemsize = np.dtype(dtype).itemsize
        values = np.frombuffer(sample[:len(sample) // itemsize * itemsize], dtype)
        if size % itemsize == 0 and _are_tokens(values):
            raise ValueError(f"{path} holds {what}, and nanoGPT's layout is 16-bit tokens: " + (
                f"convert it with python -c \"import numpy as np; np.fromfile('{path}', '{dtype}').astype('<u2')"
                f".tofile('{path}')\"" if values.max() < 65536 else "ids above 65,535 do not fit those; make the data "
                "anew with python prepare_data.py, whose shards say how wide their tokens are"))


def _are_tokens(values: np.ndarray) -> bool:
    """Whether values, read as one of FOREIGN_DTYPES, are ids beyond doubt."""
    held = values[values != 0]
    is_big_endian = values.itemsize == 2  # if all would be multiples of 256 to a little-endian reader
    if len(held) < MIN_VALUES or not (held.min() > 0 and held.max() < (256 if is_big_endian else MAX_ID)):
        return False
    ids = np.unique(held)
    is_monotonous = len(ids) == 1 and len(np.unique(np.diff(np.flatnonzero(values)))) == 1
    if is_monotonous or (ids != np.floor(ids)).any():
        return False
    if is_big_endian or values.dtype.kind == "f":
        return True
    if ids[-1] >= 65536:  # a high half that is no 0 belongs to a vocabulary that fills the low one
        return bool((ids % 65536).max() >= 32768)
    return len(ids) > MIN_VALUES or len(held) < len(values)


def read_meta(folder: Path) -> dict:
    """nanoGPT's meta.pkl (vocab_size, stoi, itos), or {} if there is none."""
    path = folder / "meta.pkl"
    if not path.is_file():
        return {}
    meta = load_plain(path)
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if type(size) is not int or not 0 < size < MAX_VOCAB_SIZE:
        raise ValueError(f"{path} is not nanoGPT's: a dictionary was expected whose 'vocab_size' is a positive whole "
                         f"number below 2**32" + (f", not {size!r}" if isinstance(meta, dict) else ""))
    return meta


def characters_of(meta: dict) -> list[str] | None:
    """The characters that a meta.pkl numbers from 0 on, in that order; None if it holds anything else."""
    stoi = meta.get("stoi")
    if not isinstance(stoi, dict) or not all(type(i) is int for i in stoi.values()):
        return None
    characters = sorted(stoi, key=stoi.get)
    is_char = (sorted(stoi.values()) == list(range(len(stoi))) and 0 < len(stoi) <= meta["vocab_size"] and all(
        isinstance(c, str) and len(c) == 1 and not "\ud800" <= c <= "\udfff" for c in characters))
    return characters if is_char else None
