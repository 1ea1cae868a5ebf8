"""What the ranks send each other in a step: the collectives of DDP, FSDP and HSDP, how many and of how many bytes.

tests/training/test_parallel.py holds it to what a profiler sees in real steps. Muon's are muon.SharedStacks', and the
two sums of a few numbers that train.py's loop makes in each step are not in here.

With FSDP a tensor lies over the ranks in equal numbers of rows, and the last ranks are padded: 768 rows over 4,096
ranks travel as 4,096.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch.nn as nn

from model import LanguageModel

FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # DDP's own defaults
Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
Group = Literal["shards", "replicas"]  # the ranks of one copy of the model; those that hold the same part of it


class Collective(NamedTuple):
    """`count` times a step, each of a tensor that is `num_bytes` large when it is whole."""

    kind: Kind
    group: Group
    part: Literal["a block", "the rest", "a bucket", "the norm"]
    count: int
    num_bytes: int


def step_traffic(model: LanguageModel, parallel: str, world_size: int, shard_size: int, micro_batches: int,
                 itemsize: int = 4, reshard_after_forward: bool = True, reduce_every_micro_batch: bool = False
                 ) -> list[Collective]:
    """The collectives of a step, the clip's with them. `shard_size` ranks hold one copy of the model together;
    `itemsize` is that of the products' number type. Those that have nobody to reach are left out."""
    if parallel == "ddp":
        return [Collective("all-reduce", "replicas", "a bucket", 1, size) for size in ddp_buckets(model)]
    blocks, m, replicas = len(model.h), micro_batches, world_size // shard_size
    passes = 2 if reshard_after_forward else 1  # the forward pass, and the backward pass
    reductions = m if reduce_every_micro_batch else 1
    of_block = [p for block in model.h[:1] for p in block.parameters()]
    in_blocks = {p for block in model.h for p in block.parameters()}
    block, rest = padded_numel(of_block, shard_size), padded_numel(
        (p for p in model.parameters() if p not in in_blocks), shard_size)
    found = [Collective("all-gather", "shards", "a block", m * passes * blocks, itemsize * block),
             Collective("all-gather", "shards", "the rest", m, 4 * rest),  # once: it stays
             Collective("reduce-scatter", "shards", "a block", reductions * blocks, 4 * block),
             Collective("reduce-scatter", "shards", "the rest", reductions, 4 * rest),
             Collective("all-reduce", "shards", "the norm", 1, 4)]
    if replicas > 1:
        found += [Collective("all-reduce", "replicas", "a block", blocks, 4 * block // shard_size),
                  Collective("all-reduce", "replicas", "the rest", 1, 4 * rest // shard_size)]
    return [each for each in found if each.count]


def padded_numel(params: Iterable[nn.Parameter], num_shards: int) -> int:
    """Elements that travel when parameters are gathered from so many ranks."""
    return sum(num_shards * -(-p.size(0) // num_shards) * (p.numel() // p.size(0)) for p in params)


def ddp_buckets(model: LanguageModel) -> list[int]:
    """Bytes of DDP's buckets, in the order in which they are sent, once they have reached their size. Gradients come
    from the head to the tables: the last bucket has the token table, which waits for the whole backward pass."""
    in_blocks = [p for block in reversed(model.h) for p in reversed([*block.parameters()])]
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    first = [p for p in model.parameters() if p not in {*in_blocks, *tables}]
    last = [p for p in reversed([*model.parameters()]) if p in tables]
    buckets, limit = [0], FIRST_BUCKET_BYTES
    for p in first + in_blocks + last:
        if buckets[-1] >= limit:
            buckets, limit = [*buckets, 0], BUCKET_BYTES
        buckets[-1] += 4 * p.numel()
    return buckets
