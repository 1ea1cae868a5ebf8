"""Other people's pickles, read without running anything that they name: plain values, and NumPy's numbers.

Owns the stand-ins for the names that a pickle may hold: Python's containers, and functions of ours instead of NumPy's,
which give plain values: np.int64(3) becomes 3, an array becomes a flat list. `load_plain` reads a pickle with
them, and weights.read_nanogpt hands them to torch's own unpickler.
"""

from __future__ import annotations

import collections
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class _Dtype:
    """For numpy.dtype: of numbers and texts only."""

    def __init__(self, name: str, *flags: object):
        if not re.fullmatch(r"[biufU]\d+|O8", str(name)):
            raise ValueError(f"it holds NumPy's type {name}, but only numbers and strings are read")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def values(self, data: Any) -> list:
        """The elements: a list as it is (of an array of objects), bytes as this type has them."""
        return data if isinstance(data, list) else np.frombuffer(bytes(data), self.order + self.name).tolist()


class _Array(list):
    """For numpy.ndarray."""

    def __setstate__(self, state: tuple) -> None:
        _, _, dtype, _, data = state
        self[:] = dtype.values(data)


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return dtype.values(data)[0]


def _reconstruct(kind: type, shape: tuple, typecode: bytes) -> _Array:
    return _Array()


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple, order: str) -> list:
    return dtype.values(data)


def _encode(text: str, encoding: str) -> bytes:
    """For _codecs.encode, which pickle writes bytes with up to protocol 2."""
    return text.encode("latin-1")


STAND_INS: dict[str, Callable] = {
    "numpy.dtype": _Dtype, "numpy.ndarray": _Array, "_codecs.encode": _encode,
    "collections.OrderedDict": collections.OrderedDict, "collections.Counter": collections.Counter,
    **{f"numpy.{core}.{name}": stand_in for core in ("core", "_core") for name, stand_in in (
        ("multiarray.scalar", _scalar), ("multiarray._reconstruct", _reconstruct),
        ("numeric._frombuffer", _from_buffer))},
    **{f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__")
       for kind in (set, frozenset)}}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable:
        if (full_name := f"{module}.{name}") not in STAND_INS:
            raise ValueError(f"it names {full_name}, but only plain values are read, because a pickle can run code")
        return STAND_INS[full_name]


def load_plain(path: Path) -> Any:
    """What a pickle of plain values and NumPy's numbers holds. Raises ValueError for any other, OSError."""
    with open(path, "rb") as file:
        try:
            return _Unpickler(file).load()
        except Exception as error:  # a broken pickle raises nearly anything
            raise ValueError(f"{path} was refused: {error}") from None
