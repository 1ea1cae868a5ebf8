"""Where documents begin in token shards: the document index.

Owns the index files. One lies beside each shard, train_000000.documents.npy beside train_000000.bin: the positions at
which documents begin, and behind them the number of tokens, as uint32 (uint64 for a shard that takes it), 4 bytes a
document. prepare_data.py makes them; for older and foreign shards they are made when they are first needed.

A document is its end-of-text token and its text. What stands before the first end-of-text token of a shard, such as the
rest of a document that the shard before begins with, counts as a document.

Invariant: an index is used only if it belongs to its shard: it ends with the number of tokens, and a sample of what it
points at are end-of-text tokens. Any other is made again, and so is one of a single document, which points at nothing.

Example: the shard [eot a b c eot d e] has the index [0, 4, 7].
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flatgpt import files

if TYPE_CHECKING:
    from flatgpt.data.shards import Split

SCANNED_TOKENS = 1 << 22  # compared with the end-of-text token at a time
SAMPLED_DOCUMENTS = 1000  # of an index, looked up in the shard


def open_index(split: Split, eot_id: int) -> list[np.ndarray]:
    """The document edges of each shard of a split, (documents + 1,) each: where its documents begin, and where the last
    one ends. Index files are made where they are missing or wrong, and can be written."""
    return [_open(path, tokens, eot_id) for path, tokens in zip(split.paths, split.shards)]


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".documents.npy")


def find_edges(tokens: np.ndarray, eot_id: int) -> np.ndarray:
    """The edges of the documents in a shard, by its end-of-text tokens."""
    begins = [start + np.flatnonzero(tokens[start:start + SCANNED_TOKENS] == eot_id)
              for start in range(0, len(tokens), SCANNED_TOKENS)]
    edges = np.unique(np.concatenate([[0], *begins, [len(tokens)]]))
    return edges.astype(np.uint32 if len(tokens) < 2**32 else np.uint64)


def index_fault(path: Path, tokens: np.ndarray, eot_id: int) -> str:
    """What is wrong with the index of a shard, or ""; a shard needs none."""
    if not index_path(path).exists() or np.array_equal(_read(path), find_edges(tokens, eot_id)):
        return ""
    return f"{index_path(path)} does not say where the documents of {path.name} begin: delete it, it is made again"


def _open(path: Path, tokens: np.ndarray, eot_id: int) -> np.ndarray:
    there = _read(path)
    if _belongs(there, tokens, eot_id):
        return there
    edges = find_edges(tokens, eot_id)
    if not np.array_equal(edges, there):
        content = io.BytesIO()
        np.save(content, edges)
        with contextlib.suppress(OSError):  # a folder that cannot be written: it is found anew each time
            files.write_bytes(index_path(path), content.getvalue())
    return edges


def _read(path: Path) -> np.ndarray:
    """The index of a shard, memory-mapped; an array of nothing where it is missing, torn or something else."""
    try:
        return np.asarray(np.load(index_path(path), mmap_mode="r", allow_pickle=False))
    except Exception:  # over what is no array NumPy raises errors of many kinds
        return np.empty(0)


def _belongs(edges: np.ndarray, tokens: np.ndarray, eot_id: int) -> bool:
    if edges.ndim != 1 or edges.dtype not in (np.uint32, np.uint64) or len(edges) < 3 or edges[-1] != len(tokens):
        return False
    inner = edges[1:-1]
    sample = inner[np.linspace(0, len(inner) - 1, min(len(inner), SAMPLED_DOCUMENTS)).astype(np.int64)]
    return bool(edges[0] == 0 and (edges[1:] > edges[:-1]).all() and (tokens[sample] == eot_id).all())
