"""The data order: (seed, position) -> batch, over one data set or a mixture of several.

Owns the arithmetic of batches, and the thread that reads ahead. It knows shards only as arrays of tokens (shards.py
opens them), and no model.

Letters: T = block_size, S = sequences an optimizer step over the whole job, W = ranks, q = a sequence's number since
the run began. Invariants:
- What a step trains on is a function of (data, T, seed, S, step): neither W nor the micro-batch changes it, and no
  state is kept but the number of the next sequence.
- Each epoch cuts the shards anew into windows of T tokens and reads every window once, in an order of its own.
- A mixture gives each q a data set, by a pattern that repeats; each data set counts its own sequences.

Example: T = 4, one shard of 14 tokens a b c ... n, and an epoch whose offset is 1. The windows' inputs are bcde, fghi
and jklm, their targets cdef, ghij and klmn: N = 3. Sequence q at place p of the epoch reads window permute(p, 3, key),
say 2, 0, 1 for p = 0, 1, 2. With S = 2 and W = 2 the first step gives rank 0 jklm and rank 1 bcde; the second step
takes fghi, and its other sequence is the first of the next epoch.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch

from flatgpt.data.shards import DATA_DIR, Dataset, Split, open_dataset
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.options import check_options, failed_rules

T = TypeVar("T")
BLOCK_SEQS = 1024  # sequences whose windows are found together
PERIOD = 10_000  # sequences after which a mixture's pattern repeats


@dataclass
class DataConfig:
    """Data and batch"""

    dataset: Annotated[str, "paths"] = "openwebtext"  # folder in data/, or its path; a mixture: a:0.7,b:0.3
    tokenizer: Literal["auto", "gpt2"] = "auto"  # gpt2: say that shards without dataset.json hold GPT-2's tokens
    gradient_accumulation_steps: int = 40  # micro-batches a step, summed over the ranks
    batch_size: int = 12  # sequences a micro-batch, the most that a device takes at a time; 0 = as many as fit it
    total_batch_size: int = 0  # tokens a step over all ranks; 0 = gradient_accumulation_steps * batch_size * block_size

    def validate(self) -> list[str]:
        faults = failed_rules(
            self, ("batch_size", self.batch_size >= 0, "0 or more"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "positive"))
        if self.batch_size == 0 and not self.total_batch_size:
            faults.append("batch_size=0 fits the micro-batch to the device, so the batch of a step has to be said in "
                          "tokens: add --total_batch_size=N")
        return faults


@dataclass
class BatchPlan:
    """How a step's S sequences fall on W ranks: each takes `accumulation_steps` micro-batches of `micro_batch`."""

    seqs_per_step: int
    micro_batch: int
    accumulation_steps: int
    world_size: int

    @property
    def seqs_per_rank(self) -> int:
        return self.accumulation_steps * self.micro_batch

    def first_seq(self, next_seq: int, rank: int) -> int:
        """Number of the first of the `seqs_per_rank` that a rank reads in the step that begins at `next_seq`."""
        return next_seq + rank * self.seqs_per_rank


def plan_batches(config: DataConfig, given: Mapping[str, str], block_size: int, world_size: int,
                 fit: Callable[[int], int] = lambda seqs_per_rank: seqs_per_rank) -> BatchPlan:
    """S from the options, cut for W ranks. `given` holds the keys that the user set. Raises ValueError.

    A batch_size of 0 becomes what `fit(seqs_per_rank)` says: the most sequences that the device takes at a time."""
    check_options(config)
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be positive")
    seqs = config.gradient_accumulation_steps * config.batch_size
    if config.total_batch_size:
        if config.total_batch_size < 0 or config.total_batch_size % block_size:
            raise ValueError(f"total_batch_size={config.total_batch_size} tokens is not a positive multiple of "
                             f"block_size={block_size}")
        if "gradient_accumulation_steps" in given and seqs and seqs * block_size != config.total_batch_size:
            raise ValueError(f"total_batch_size={config.total_batch_size} tokens, but gradient_accumulation_steps="
                             f"{config.gradient_accumulation_steps} x batch_size={config.batch_size} x block_size="
                             f"{block_size} is {seqs * block_size}; leave gradient_accumulation_steps out")
        seqs = config.total_batch_size // block_size
    if seqs % world_size:
        below, above = seqs // world_size * world_size, -(-seqs // world_size) * world_size
        raise ValueError(f"{seqs} sequences a step cannot be shared evenly by {world_size} processes; the nearest that "
                         "can: "
                         + " and ".join(f"{n} (--total_batch_size={n * block_size})" for n in (below, above) if n))
    per_rank = seqs // world_size
    config.batch_size = config.batch_size or fit(per_rank)
    micro_batch = max(n for n in range(1, min(per_rank, config.batch_size) + 1) if per_rank % n == 0)
    return BatchPlan(seqs, micro_batch, per_rank // micro_batch, world_size)


# Data sets


@dataclass
class Mixture:
    """The data sets of a run, by name, and the share of its sequences that each gives; together 1. Mostly one."""

    datasets: dict[str, Dataset]
    shares: list[float]

    @property
    def vocab_size(self) -> int:
        return next(iter(self.datasets.values())).vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        return next((dataset.tokenizer for dataset in self.datasets.values() if dataset.tokenizer), None)

    @property
    def fingerprint(self) -> str:
        """Changes when tokens or shares do."""
        prints = [dataset.fingerprint for dataset in self.datasets.values()]
        mixed = repr((prints, quotas(self.shares)))
        return prints[0] if len(prints) == 1 else hashlib.sha256(mixed.encode()).hexdigest()

    def splits(self, name: str) -> dict[str, Split]:
        """A split of each data set. Raises ValueError for one that lacks it."""
        for dataset in self.datasets.values():
            if name not in dataset.splits:
                raise ValueError(f"{dataset.folder} has no {name} split: it has {' and '.join(dataset.splits)}")
        return {key: dataset.splits[name] for key, dataset in self.datasets.items()}


def open_mixture(spec: str, vocab_size: int = 0, tokenizer: str = "auto") -> Mixture:
    """Open `name`, or a mixture `name:weight,name:weight`; see shards.open_dataset. Raises ValueError for a spec that
    is no mixture, and for data sets whose tokenizers differ."""
    weights: dict[str, float] = {}
    is_one = "," not in spec or _is_folder(spec)
    for part in [spec] if is_one else spec.split(","):
        has_weight = not is_one and ":" in part and not _is_folder(part.strip())  # without weights all count alike
        name, _, weight = (word.strip() for word in (part if has_weight else f"{part}:1").rpartition(":"))
        try:
            if not name or name in weights or not 0 < float(weight) < float("inf"):
                raise ValueError
        except ValueError:
            raise ValueError(f"dataset={spec!r}: {part!r} should be name:weight, with a name that comes once and a "
                             "weight above 0") from None
        weights[name] = float(weight)
    shares = [weight / sum(weights.values()) for weight in weights.values()]
    if 0 in quotas(shares):
        raise ValueError(f"dataset={spec!r}: a share below 1 in {PERIOD:,} cannot be drawn; leave that data set out")
    mixture = Mixture({name: open_dataset(name, vocab_size, tokenizer) for name in weights}, shares)
    first, *others = mixture.datasets.values()
    for other in others:
        known = [dataset.tokenizer.hf.get_vocab() for dataset in (first, other) if dataset.tokenizer]
        if other.vocab_size != first.vocab_size or (len(known) == 2 and known[0] != known[1]):
            raise ValueError(f"{first.folder} and {other.folder} were made with different tokenizers: their ids mean "
                             "different things")
    return mixture


def _is_folder(name: str) -> bool:
    """Whether a data set has this very name, even if it looks like a mixture."""
    return (DATA_DIR / name).is_dir() or Path(name).is_dir()


# The order


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


class TrainOrder:
    """Sequence number q -> window, without end: epoch after epoch over a split."""

    def __init__(self, split: Split, block_size: int, seed: int):
        """Raises ValueError when no shard of the split holds a single window."""
        self.split, self.block_size, self.seed = split, block_size, seed
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
                starts.append(starts[-1] + int(self.cut(len(starts) - 1)[1].sum()))
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

    def __init__(self, orders: list[TrainOrder], shares: list[float]):
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

    def batch(self, first_seq: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of `count` sequences, (count, T) int64 each."""
        source, own = self.sources(first_seq, count)
        rows = np.empty((count, self.orders[0].block_size + 1), dtype=np.int64)
        for i, order in enumerate(self.orders):
            mine = source == i
            if mine.any():  # a data set's own numbers follow on each other
                rows[mine] = order.rows(int(own[mine][0]), int(mine.sum()))
        return rows[:, :-1], rows[:, 1:]


def describe_epochs(data: Mixture, order: MixedOrder) -> str:
    """Returns "has 12,000 sequences", or the share and the length of an epoch of each data set of a mixture."""
    lengths = [f"{int(each.cut(0)[1].sum()):,} sequences" for each in order.orders]
    return f"has {lengths[0]}" if len(lengths) == 1 else "has, of " + "; of ".join(
        f"{name} ({share:.1%}), {length}" for name, share, length in zip(data.datasets, data.shares, lengths))


class EvalOrder:
    """`num_seqs` windows evenly spaced over a split, 0 = all of them: the same for any W, micro-batch and step.

    Unlike in training every token but the first of a shard is a target once: a shard's last window may be short, and
    is filled up with inputs 0 and targets -1. With a `stride` below T windows overlap, each beginning so many tokens
    behind the one before; those that an earlier one has as targets it only reads, at least T - stride of them.

    Example: the targets of 9 tokens in windows of T = 4, those only read in brackets, by stride 4 are 1 2 3 4, 5 6 7 8;
    by stride 2 they are 1 2 3 4, (3 4) 5 6, (5 6) 7 8."""

    def __init__(self, split: Split, block_size: int, num_seqs: int = 0, stride: int = 0):
        self.split, self.block_size, self.stride = split, block_size, stride or block_size
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

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the chosen windows [first, first + count), (count, T) int64 each; rows beyond the last
        window are padding."""
        chosen = self._chosen[first:first + count]
        rows = np.full((count, self.block_size + 1), -1, dtype=np.int64)
        shards = np.searchsorted(self._ends, chosen, side="right")
        before = np.where(shards > 0, self._ends[shards - 1], 0)
        self.split.read(zip(shards.tolist(), ((chosen - before) * self.stride).tolist()), rows)
        x, y = np.maximum(rows[:, :-1], 0), rows[:, 1:]
        y[:len(chosen)][chosen > before, :self.block_size - self.stride] = -1
        return x, y


# Loading


def prefetch(make: Callable[[int], T], arguments: Iterable[int], depth: int = 2) -> Iterator[T]:
    """make(a) for each argument a, in order; a background thread makes up to `depth` of them ahead. An error in `make`
    is raised in place of its value."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        arguments = iter(arguments)
        ahead = deque(thread.submit(make, a) for a in itertools.islice(arguments, depth))
        try:
            while ahead:
                value = ahead.popleft().result()
                ahead.extend(thread.submit(make, a) for a in itertools.islice(arguments, 1))
                yield value
        finally:
            thread.shutdown(cancel_futures=True)


def read_step(order: MixedOrder, plan: BatchPlan, rank: int, device: torch.device,
              next_seq: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rank's part of the step whose S sequences begin at `next_seq`: the first one's number, inputs and targets,
    (S / W, T) int64 each, and two int64 that add up over the ranks: the number of targets, and a hash of which window
    was read as which sequence."""
    first = plan.first_seq(next_seq, rank)
    x, y = order.batch(first, plan.seqs_per_rank)
    sums = np.array([(y >= 0).sum(), sum(zlib.crc32(row.tobytes(), first + i) for i, row in enumerate(y))])
    return first, pin(x, device), pin(y, device), pin(sums, device)


def pin(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A batch as a tensor that `device` can copy from without anyone waiting: in pinned memory if that is a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A batch's copy on `device`. From pinned memory nobody waits for it; MPS, which knows none, would read memory that
    another batch has taken meanwhile (github.com/pytorch/pytorch/issues/189690)."""
    return tensor.to(device, non_blocking=device.type == "cuda")
