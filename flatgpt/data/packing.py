"""--documents=pack: every window is filled with whole documents, or with the next piece of a long one.

Owns which piece of which document stands in which window, and the order of these windows. A document is cut in pieces
only if it is longer than a window: into full windows, and a rest that is packed like a short document. documents.py
says where documents begin.

Letters: T = block_size. Invariants:
- What sequence q reads is a function of (data, T, seed, q), and no state is kept.
- Every token of a split is a target exactly once an epoch. The targets of a piece are the tokens behind each of its
  own: its last token predicts the first of the next piece, or the next document's end-of-text token. The split's last
  token predicts its first.
- A window has pieces of one block of documents. Windows of up to POOL_BLOCKS blocks are mixed with each other, and each
  epoch draws anew which blocks, and in which order.

Example: T = 4, documents [eot a b c d e], [eot f] and [eot g]. The pieces are [eot a b c], [d e], [eot f] and [eot g],
the windows' inputs [eot a b c], [d e | eot f] and [eot g + +], their targets [a b c d], [e eot f eot] and [g eot - -].
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from flatgpt.data.order import Batch, derive_seed, permute
from flatgpt.data.shards import Split

BLOCK_TOKENS = 1 << 25  # the documents that begin within so many tokens of a shard are packed together
POOL_BLOCKS = 8  # blocks whose windows are mixed


def best_fit(counts: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
    """Fill windows of T tokens with pieces, of which counts[n] are n tokens long; counts (T + 1,). The longest piece
    comes first, each goes into the fullest window that has room for it ("best fit decreasing", Johnson 1974).

    Returns the lengths that a window is filled with, and how many windows are filled so. Windows that are alike are
    handled together, so it takes about as many steps as there are different lengths, not pieces."""
    T = len(counts) - 1
    alike: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)  # room left -> kinds of windows
    rooms: list[int] = []  # the keys of `alike` that hold windows, ascending

    def put(room: int, lengths: tuple[int, ...], number: int) -> None:
        if not alike[room]:
            insort(rooms, room)
        alike[room].append((lengths, number))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                lengths, number = alike[room].pop()
                if not alike[room]:
                    del rooms[at]
            else:  # new windows, as many as are needed
                room, lengths, number = T, (), left
            each = min(room // length, left)  # pieces that such a window takes before the next is begun
            taken = min(left // each, number)
            if lengths and number > taken:
                put(room, lengths, number - taken)
            put(room - each * length, (*lengths, *[length] * each), taken)
            left -= each * taken
    return [kind for kinds in alike.values() for kind in kinds]


class Windows(NamedTuple):
    """Packed windows. The pieces of a window follow on each other, and together are T tokens long: what no piece of a
    document fills is a piece of the filler, which counts as a shard behind the last one."""

    shards: np.ndarray  # (pieces,) the shard of each piece
    starts: np.ndarray  # (pieces,) where it begins in the shard
    lengths: np.ndarray  # (pieces,) its tokens
    first: np.ndarray  # (windows + 1,) the first piece of each window


def pack(edges: np.ndarray, T: int, shard: int, filler: int) -> Windows:
    """The windows of the documents of one block, which lie in `shard`."""
    num_pieces = -(-np.diff(edges) // T)  # of each document
    starts = np.repeat(edges[:-1], num_pieces) + T * count_up(num_pieces).astype(np.int64)
    lengths = np.minimum(np.repeat(edges[1:], num_pieces) - starts, T)
    longest_first = starts[np.argsort(-lengths, kind="stable")]
    counts = count_lengths(edges, T)
    unused = len(starts) - counts.cumsum()  # of each length, the place of the next piece that is in no window yet
    columns: list[tuple[np.ndarray, ...]] = []  # of windows that are alike: shards, starts and lengths, and how many
    for kind, number in best_fit(counts):
        at = []
        for length in kind:
            at.append(longest_first[unused[length]:unused[length] + number])
            unused[length] += number
        of_shard = [shard] * len(kind)
        if room := T - sum(kind):
            at, kind, of_shard = [*at, np.zeros(number, np.int64)], (*kind, room), [*of_shard, filler]
        columns.append((np.tile(of_shard, number), np.stack(at, axis=1).ravel(), np.tile(kind, number),
                        np.full(number, len(kind))))
    shards, starts, lengths, sizes = (np.concatenate(column) for column in zip(*columns))
    return Windows(shards, starts, lengths, np.concatenate([[0], sizes.cumsum()]))


def count_lengths(edges: np.ndarray, T: int) -> np.ndarray:
    """How many pieces of each length, (T + 1,), documents with these edges are cut in."""
    lengths = np.diff(edges.astype(np.int64))
    counts = np.bincount(lengths % T, minlength=T + 1)
    counts[0], counts[T] = 0, (lengths // T).sum()
    return counts


def count_up(lengths: np.ndarray) -> np.ndarray:
    """0 ... length - 1 for each length, none of them 0, one behind the other; int32."""
    ends = lengths.cumsum()
    steps = np.ones(ends[-1], np.int32)
    steps[0], steps[ends[:-1]] = 0, 1 - lengths[:-1]
    return steps.cumsum(dtype=np.int32, out=steps)


class PackedOrder:
    """Sequence number q -> window of whole documents, without end: epoch after epoch over a split."""

    def __init__(self, split: Split, edges: list[np.ndarray], block_size: int, seed: int):
        """`edges`: see documents.open_index. Raises ValueError when the split does not fill a window, or when the first
        token of a shard is outside the vocabulary."""
        self.split, self.block_size, self.seed = split, block_size, seed
        if split.num_tokens < block_size:
            raise ValueError(f"the train split of {split.paths[0].parent} has {split.num_tokens} tokens, and one "
                             f"window takes block_size = {block_size}: lower block_size, or add text")
        self._blocks = [(shard, block) for shard, of_shard in enumerate(edges) for block in _blocks_of(of_shard)]
        self._num_windows = np.array([sum(number for _, number in best_fit(count_lengths(block, block_size)))
                                      for _, block in self._blocks])
        filled = [i for i, tokens in enumerate(split.shards) if len(tokens)]
        begins = np.zeros((len(filled), 1), np.int64)
        split.read([(shard, 0) for shard in filled], begins)
        self._next_tokens = dict(zip(filled, np.roll(begins[:, 0], -1)))  # behind the last token of each shard
        self._sources = [*split.shards, np.zeros(block_size + 1, np.uint16)]  # the last is the filler
        self._pools = lru_cache(maxsize=2)(self._find_pools)
        self._pool = lru_cache(maxsize=2)(self._pack_pool)

    def epoch_seqs(self, epoch: int = 0) -> int:
        """Sequences in an epoch, which is as long as any other."""
        return int(self._num_windows.sum())

    @property
    def padding(self) -> float:
        """Share of the tokens of an epoch that are padding."""
        return 1 - self.split.num_tokens / (self.epoch_seqs() * self.block_size)

    def batch(self, first_seq: int, count: int) -> Batch:
        """`count` sequences, a row each. What no piece fills has inputs 0, targets -1 and positions of its own."""
        shards, starts, lengths = self._pieces(first_seq, count)
        places = [*zip(shards.tolist(), starts.tolist(), (starts + lengths).tolist())]
        tokens = np.concatenate([self._sources[shard][start:end] for shard, start, end in places])
        following = [self._sources[shard][end] if end < len(self._sources[shard]) else self._next_tokens[shard]
                     for shard, _, end in places]
        inputs = tokens.astype(np.int64)
        targets, ends = np.empty_like(inputs), lengths.cumsum()
        targets[:-1], targets[ends - 1] = inputs[1:], following
        if max(tokens.max(), *following) >= self.split.vocab_size:
            of_documents = [(shard, start) for shard, start, _ in places if shard < len(self.split.shards)]
            self.split.read(of_documents, np.zeros((len(places), self.block_size + 1), np.int64))  # says where it is
        is_filler = shards == len(self._sources) - 1
        for end, length in zip(ends[is_filler].tolist(), lengths[is_filler].tolist()):
            targets[end - length:end] = -1
        return Batch(*(flat.reshape(count, -1) for flat in (inputs, targets, count_up(lengths))))

    def _pieces(self, first_seq: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces that `count` sequences read, one behind the other: shards, starts and lengths."""
        found, done = [], 0
        while done < count:
            epoch, place = divmod(first_seq + done, self.epoch_seqs())
            pools, ends = self._pools(epoch)
            number = int(np.searchsorted(ends, place, side="right"))
            windows = self._pool(*pools[number])
            in_pool = len(windows.first) - 1
            first = place - (int(ends[number]) - in_pool)
            places = np.arange(first, min(first + count - done, in_pool))
            chosen = permute(places, in_pool, derive_seed(self.seed, "pool", number), epoch)
            sizes = windows.first[chosen + 1] - windows.first[chosen]
            pieces = np.repeat(windows.first[chosen], sizes) + count_up(sizes)
            found.append((windows.shards[pieces], windows.starts[pieces], windows.lengths[pieces]))
            done += len(places)
        return tuple(map(np.concatenate, zip(*found)))

    def _find_pools(self, epoch: int) -> tuple[list[list[int]], np.ndarray]:
        """The blocks of each pool of an epoch, and the place in the epoch at which each pool ends."""
        order = permute(np.arange(len(self._blocks)), len(self._blocks), derive_seed(self.seed, "blocks"), epoch)
        pools = [order[i:i + POOL_BLOCKS].tolist() for i in range(0, len(order), POOL_BLOCKS)]
        return pools, np.array([self._num_windows[pool].sum() for pool in pools]).cumsum()

    def _pack_pool(self, *blocks: int) -> Windows:
        packed = [pack(edges.astype(np.int64), self.block_size, shard, len(self._sources) - 1)
                  for shard, edges in (self._blocks[block] for block in blocks)]
        *columns, first = zip(*packed)
        sizes = np.concatenate([np.diff(of_block) for of_block in first])
        return Windows(*map(np.concatenate, columns), np.concatenate([[0], sizes.cumsum()]))


def _blocks_of(edges: np.ndarray) -> Iterator[np.ndarray]:
    """The edges of the documents of a shard, in blocks."""
    cuts = np.searchsorted(edges[:-1], [*range(0, int(edges[-1]), BLOCK_TOKENS), int(edges[-1])])
    for first, end in itertools.pairwise(np.unique(cuts).tolist()):
        yield edges[first:end + 1]
