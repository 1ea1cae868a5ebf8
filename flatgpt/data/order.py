"""The data order: sequence number -> the tokens of a window, in training and in evaluation.

Owns the arithmetic of the order: permutations, windows, mixtures. It knows shards as arrays of tokens (shards.py opens
them), and no options, ranks or devices (loader.py does). packing.py has the order for --documents=pack.

Letters: T = block_size, q = a sequence's number since the run began. Invariants:
- What sequence q reads is a function of (data, T, seed, q), and no state is kept.
- Each epoch cuts the shards anew into windows of T tokens and reads every window once, in an order of its own.
- A mixture gives each q a data set, by a pattern that repeats; each data set counts its own sequences.

Example: T = 4, one shard of 14 tokens a b c ... n, and an epoch whose offset is 1. The windows' inputs are bcde, fghi
and jklm, their targets cdef, ghij and klmn: N = 3. Sequence q at place p of the epoch reads window permute(p, 3, key),
say 2, 0, 1 for p = 0, 1, 2: first jklm, then bcde and fghi, and then the first window of the next epoch.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from flatgpt.data.shards import Split

BLOCK_SEQS = 1024  # sequences whose windows are found together
PERIOD = 10_000  # sequences after which a mixture's pattern repeats


class Batch(NamedTuple):
    """n rows of T tokens, and what is to be predicted; (n, T) each, as arrays, or as tensors once loader.py has made
    them."""

    inputs: Any  # int64
    targets: Any  # int64: the token that follows each input; -1 for none
    positions: Any = None  # int32: of each input in its document, where attention stays within documents
    max_documents: int = 0  # in the rows that a device takes at a time; see loader.max_documents

    def rows(self, start: int, stop: int) -> Batch:
        rows = [None if values is None else values[start:stop] for values in self[:3]]
        return Batch(*rows, self.max_documents)


def positions_in_documents(inputs: np.ndarray, eot_id: int | None) -> np.ndarray | None:
    """The position of each input (n, T) in its document, which begins at an end-of-text token, or at the row's start.
    None without an end-of-text token: then attention goes across documents."""
    if eot_id is None:
        return None
    columns = np.arange(inputs.shape[1], dtype=np.int32)
    begins = (inputs == eot_id) * columns
    return columns - np.maximum.accumulate(begins, axis=1, out=begins)


def derive_seed(*key: int | str) -> int:
    """63 random bits that are a function of the key, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    return np.array([derive_seed(seed, "permute", epoch, r) for r in range(6)], dtype=np.uint64)


def _feistel(p: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A balanced Feistel network on [0, 4**half_bits): a bijection whatever the round function is."""
    mask = np.uint64((1 << half_bits) - 1)
    left, right = p >> np.uint64(half_bits), p & mask
    for key in keys:
        # The round function: the finaliser of SplitMix64 (Steele et al. 2014), which mixes all bits of right ^ key.
        z = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
    return (left << np.uint64(half_bits)) | right


def permute(p: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The image of places p (int array, 0 <= p < n) in a random permutation of [0, n) keyed by (seed, epoch).

    O(1) memory whatever n is: a Feistel network on the next power of four, walked along its cycles until it is back
    below n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); under four rounds a place on average."""
    keys = _round_keys(seed, epoch)
    half_bits = max(1, (int(n - 1).bit_length() + 1) // 2)
    out = _feistel(np.atleast_1d(p).astype(np.uint64), half_bits, keys)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], half_bits, keys)
    return out.astype(np.int64)


class Order(Protocol):
    """The sequences of one data set, without end: epoch after epoch."""

    block_size: int

    def epoch_seqs(self, epoch: int) -> int:
        """Sequences in an epoch."""

    def batch(self, first_seq: int, count: int) -> Batch:
        """The sequences first_seq ... first_seq + count - 1, a row each."""


class TrainOrder:
    """Sequence number q -> window of a split, which takes no notice of documents. With an `eot_id`, what a token sees
    and its position end at its document's start: --documents=mask."""

    def __init__(self, split: Split, block_size: int, seed: int, eot_id: int | None = None):
        """Raises ValueError when no shard of the split holds a single window."""
        self.split, self.block_size, self.seed, self.eot_id = split, block_size, seed, eot_id
        self._epoch_starts = [0]  # the first sequence of each epoch met so far, and of the next
        self._block = lru_cache(maxsize=4)(self._find_block)
        longest = int(split.lengths.max(initial=0))
        if longest < block_size + 1:
            raise ValueError(f"the train split of {split.paths[0].parent} has {longest} tokens in its longest shard, "
                             f"and one window takes block_size + 1 = {block_size + 1}: lower block_size, or add text")

    def cut(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's offset into each shard, and the number of windows in it; both (shards,)."""
        slack = np.maximum(self.split.lengths - 1 - self.block_size, 0)  # a larger offset would lose a short shard
        offset = np.minimum(derive_seed(self.seed, "offset", epoch) % self.block_size, slack)
        return offset, np.maximum(self.split.lengths - 1 - offset, 0) // self.block_size

    def epoch_seqs(self, epoch: int) -> int:
        return int(self.cut(epoch)[1].sum())

    def windows(self, first_seq: int, count: int) -> list[tuple[int, int]]:
        """(shard, start) of the windows that sequences first_seq ... first_seq + count - 1 read."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            index, skip = divmod(first_seq + len(found), BLOCK_SEQS)
            found += self._block(index)[skip:skip + count - len(found)]
        return found

    def _find_block(self, index: int) -> list[tuple[int, int]]:
        """The windows of the sequences [index * BLOCK_SEQS, (index + 1) * BLOCK_SEQS), found together because that
        takes hardly longer than finding one."""
        found: list[tuple[int, int]] = []
        starts = self._epoch_starts
        while len(found) < BLOCK_SEQS:
            q = index * BLOCK_SEQS + len(found)
            while starts[-1] <= q:
                starts.append(starts[-1] + self.epoch_seqs(len(starts) - 1))
            epoch = int(np.searchsorted(starts, q, side="right")) - 1
            offset, per_shard = self.cut(epoch)
            ends = per_shard.cumsum()
            places = np.arange(q, min((index + 1) * BLOCK_SEQS, starts[epoch + 1])) - starts[epoch]
            window = permute(places, int(ends[-1]), self.seed, epoch)
            shard = np.searchsorted(ends, window, side="right")
            start = offset[shard] + (window - ends[shard] + per_shard[shard]) * self.block_size
            found.extend(zip(shard.tolist(), start.tolist()))
        return found

    def rows(self, first_seq: int, count: int) -> np.ndarray:
        """The T + 1 tokens of `count` sequences, (count, T + 1) int64: inputs, and shifted by one the targets."""
        rows = np.empty((count, self.block_size + 1), dtype=np.int64)
        self.split.read(self.windows(first_seq, count), rows)
        return rows

    def batch(self, first_seq: int, count: int) -> Batch:
        rows = self.rows(first_seq, count)
        inputs = rows[:, :-1]
        return Batch(inputs, rows[:, 1:], positions_in_documents(inputs, self.eot_id))


def quotas(shares: list[float]) -> list[int]:
    """Places of each share in a PERIOD, by largest remainders; one data set needs no more than one place."""
    period = PERIOD if len(shares) > 1 else 1
    exact = [share * period for share in shares]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[:period - sum(counts)]:
        counts[i] += 1
    return counts


class MixedOrder:
    """Sequence number q -> data set and that one's own sequence number, by a pattern that repeats after a period.

    The pattern gives each place to the data set that is furthest behind its share, so that a step's sequences are
    mixed as evenly as whole numbers allow. Of one data set it is the order itself."""

    def __init__(self, orders: list[Order], shares: list[float]):
        self.orders, self._quotas = orders, np.array(quotas(shares))
        period = int(self._quotas.sum())
        self._pattern = np.zeros(period, dtype=np.int64)  # data set of each place
        self._nth = np.zeros(period, dtype=np.int64)  # how many places of its own come before it
        given = np.zeros(len(orders), dtype=np.int64)
        for place in range(period):
            source = int(np.argmax(self._quotas * (place + 1) - given * period))
            self._pattern[place], self._nth[place] = source, given[source]
            given[source] += 1

    def sources(self, first_seq: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The data set and its own sequence number for each of `count` sequences; both (count,) int64."""
        periods, places = np.divmod(np.arange(first_seq, first_seq + count), len(self._pattern))
        source = self._pattern[places]
        return source, periods * self._quotas[source] + self._nth[places]

    def batch(self, first_seq: int, count: int) -> Batch:
        """`count` sequences, a row each."""
        source, own = self.sources(first_seq, count)
        batch = None
        for i, order in enumerate(self.orders):
            mine = source == i
            if mine.any():  # a data set's own numbers follow on each other
                part = order.batch(int(own[mine][0]), int(mine.sum()))
                if batch is None:
                    batch = Batch(*(None if values is None else np.empty((count, values.shape[1]), values.dtype)
                                    for values in part[:3]))
                for whole, values in zip(batch[:3], part):
                    if whole is not None:
                        whole[mine] = values
        return batch


class EvalOrder:
    """`num_seqs` windows evenly spaced over a split, 0 = all of them: the same for any W, micro-batch and step.

    Unlike in training every token but the first of a shard is a target once: a shard's last window may be short, and
    is filled up with inputs 0 and targets -1. With a `stride` below T windows overlap, each beginning so many tokens
    behind the one before; those that an earlier one has as targets it only reads, at least T - stride of them.

    Example: the targets of 9 tokens in windows of T = 4, those only read in brackets, by stride 4 are 1 2 3 4, 5 6 7 8;
    by stride 2 they are 1 2 3 4, (3 4) 5 6, (5 6) 7 8."""

    def __init__(self, split: Split, block_size: int, num_seqs: int = 0, stride: int = 0, eot_id: int | None = None):
        """With an `eot_id`, what a token sees and its position end at its document's start."""
        self.split, self.block_size, self.stride, self.eot_id = split, block_size, stride or block_size, eot_id
        more = np.maximum(-(-(split.lengths - 1 - block_size) // self.stride), 0)  # windows behind a shard's first
        self._ends = np.where(split.lengths > 1, 1 + more, 0).cumsum()
        total = int(self._ends[-1]) if len(self._ends) else 0
        if total == 0:
            raise ValueError(f"{split.paths[0]} is too short: an evaluation takes two tokens, and it has "
                             f"{int(split.lengths.max(initial=0))}; prepare the data again under another --name, "
                             "from more text or with a larger --val_fraction")
        count = min(num_seqs, total) or total
        self.is_whole = count == total
        self._chosen = np.arange(count, dtype=np.int64) * total // count

    def __len__(self) -> int:
        return len(self._chosen)

    def batch(self, first: int, count: int) -> Batch:
        """The chosen windows [first, first + count), a row each; rows beyond the last window are padding."""
        chosen = self._chosen[first:first + count]
        rows = np.full((count, self.block_size + 1), -1, dtype=np.int64)
        shards = np.searchsorted(self._ends, chosen, side="right")
        before = np.where(shards > 0, self._ends[shards - 1], 0)
        self.split.read(zip(shards.tolist(), ((chosen - before) * self.stride).tolist()), rows)
        inputs, targets = np.maximum(rows[:, :-1], 0), rows[:, 1:]
        targets[:len(chosen)][chosen > before, :self.block_size - self.stride] = -1
        return Batch(inputs, targets, positions_in_documents(inputs, self.eot_id))
