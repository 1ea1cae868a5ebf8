"""The batches of a run: (seed, position) -> tensors, over one data set or a mixture of several.

Owns the options of the data, how a step's sequences fall on the ranks, and the thread that reads ahead. Which window
a sequence reads is order.py's to say, or packing.py's; this module knows no model.

Letters: T = block_size, S = sequences an optimizer step over the whole job, W = ranks. Invariants:
- What a step trains on is a function of (data, T, seed, S, step): neither W nor the micro-batch changes it, and no
  state is kept but the number of the next sequence.

Example: with S = 2 and W = 2 the first step gives rank 0 sequence 0, and rank 1 sequence 1.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch

from flatgpt.data.documents import open_index
from flatgpt.data.order import PERIOD, Batch, MixedOrder, TrainOrder, quotas
from flatgpt.data.packing import PackedOrder
from flatgpt.data.shards import DATA_DIR, Dataset, Split, open_dataset
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.options import check_options, failed_rules

T = TypeVar("T")
TOKENS_PER_DOCUMENT = 128  # at the least, in most batches


@dataclass
class DataConfig:
    """Data and batch"""

    dataset: Annotated[str, "paths"] = "openwebtext"  # folder in data/, or its path; a mixture: a:0.7,b:0.3
    documents: Literal["stream", "mask", "pack"] = "stream"  # mask: attend within documents; pack: and keep them whole
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

    def eot_id(self, documents: str) -> int | None:
        """The token that a document begins with, where it matters: None for documents=stream. Raises ValueError for
        data that does not say where documents begin."""
        if documents == "stream":
            return None
        return separator(self.tokenizer, ",".join(self.datasets))

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
                             f"different things; prepare the second anew with --tokenizer={first.folder}")
    return mixture


def separator(tokenizer: Tokenizer | None, name: str) -> int:
    """The end-of-text token, with which documents of `name` begin. Raises ValueError if it is not known."""
    if tokenizer is None:
        raise ValueError(f"where the documents of {name} begin is not known, because its tokenizer is not: "
                         "--tokenizer=gpt2 of train.py says that it is GPT-2's; or use --documents=stream")
    if tokenizer.eot_id is None:
        raise ValueError(f"nothing separates the documents of {name}, because its tokenizer has no end-of-text token: "
                         "use --documents=stream")
    return tokenizer.eot_id


def _is_folder(name: str) -> bool:
    """Whether a data set has this very name, even if it looks like a mixture."""
    return (DATA_DIR / name).is_dir() or Path(name).is_dir()


# The order


def train_order(data: Mixture, documents: str, block_size: int, seed: int) -> MixedOrder:
    """The order in which a run reads its data. Raises ValueError for data of which it cannot be made."""
    eot_id = data.eot_id(documents)
    splits = data.splits("train").values()
    if documents == "pack":
        orders = [PackedOrder(split, open_index(split, eot_id), block_size, seed) for split in splits]
    else:
        orders = [TrainOrder(split, block_size, seed, eot_id) for split in splits]
    return MixedOrder(orders, data.shares)


def describe_epochs(data: Mixture, order: MixedOrder) -> str:
    """Returns "has 12,000 sequences", or the share and the length of an epoch of each data set of a mixture."""
    lengths = [f"{each.epoch_seqs(0):,} sequences"
               + (f" ({each.padding:.2%} padding)" if isinstance(each, PackedOrder) else "") for each in order.orders]
    return f"has {lengths[0]}" if len(lengths) == 1 else "has, of " + "; of ".join(
        f"{name} ({share:.1%}), {length}" for name, share, length in zip(data.datasets, data.shares, lengths))


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
              next_seq: int) -> tuple[int, Batch, torch.Tensor]:
    """A rank's part of the step whose S sequences begin at `next_seq`: the first one's number, S / W rows, and two
    int64 that add up over the ranks: the number of targets, and a hash of which window was read as which sequence."""
    first = plan.first_seq(next_seq, rank)
    batch = order.batch(first, plan.seqs_per_rank)
    y = batch.targets
    sums = np.array([(y >= 0).sum(), sum(zlib.crc32(row.tobytes(), first + i) for i, row in enumerate(y))])
    return first, pin_batch(batch, plan.micro_batch, device), pin(sums, device)


def max_documents(positions: np.ndarray, num_rows: int) -> int:
    """A number that is not below that of the documents in any `num_rows` rows of positions (n, T) on, and that seldom
    changes: one for each TOKENS_PER_DOCUMENT, or else the next power of two."""
    in_rows = (positions == 0).sum(axis=1)
    most = max(int(in_rows[start:start + num_rows].sum()) for start in range(0, len(in_rows), num_rows))
    return max(num_rows * positions.shape[1] // TOKENS_PER_DOCUMENT, 1 << (most - 1).bit_length())


def pin_batch(batch: Batch, num_rows: int, device: torch.device) -> Batch:
    """A batch as tensors, of which the device takes `num_rows` rows at a time; see `pin`."""
    if batch.positions is None:
        return Batch(pin(batch.inputs, device), pin(batch.targets, device))
    return Batch(*(pin(values, device) for values in batch[:3]), max_documents(batch.positions, num_rows))


def empty_batch(num_rows: int, block_size: int, has_documents: bool, device: torch.device) -> Batch:
    """Rows of zeros, for a trial: in everything that a compiler looks at like a run's."""
    zeros = np.zeros((num_rows, block_size), np.int64)
    positions = np.tile(np.arange(block_size, dtype=np.int32), (num_rows, 1)) if has_documents else None
    return batch_to_device(pin_batch(Batch(zeros, zeros, positions), num_rows, device), device)


def pin(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A batch as a tensor that `device` can copy from without anyone waiting: in pinned memory if that is a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A batch's copy on `device`. From pinned memory nobody waits for it; MPS, which knows none, would read memory that
    another batch has taken meanwhile (github.com/pytorch/pytorch/issues/189690)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def batch_to_device(batch: Batch, device: torch.device) -> Batch:
    tensors = [None if values is None else to_device(values, device) for values in batch[:3]]
    return Batch(*tensors, batch.max_documents)
