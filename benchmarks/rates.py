"""The rates of this machine that benchmarks/scaling.py reckons with, and the steps that they should predict.

Everything is measured in turn, some rounds long, on all ranks of the job at a time, and the fastest round counts: what
other programs take from the machine only makes a round slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flatgpt.data.loader import BatchPlan
from flatgpt.models.baselines import build, build_empty
from flatgpt.training import distributed, parallel
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, build_optimizer
from model import GPTConfig, LanguageModel

ROUNDS = 6
SHAPE = {"vocab_size": 1000, "bias": True, "mlp": "gelu_tanh"}
SHAPES = [GPTConfig(n_layer=4, n_head=6, n_embd=384, block_size=128, **SHAPE),
          GPTConfig(n_layer=2, n_head=12, n_embd=768, block_size=128, **SHAPE),
          GPTConfig(n_layer=6, n_head=4, n_embd=256, block_size=256, **SHAPE)]
MICRO_SEQS, MICRO_BATCHES = 4, 2
SMALL_BYTES = 1024
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product")


class Counts(NamedTuple):
    """Of a micro-batch, forward and backward: launches, and bytes that pass through memory besides products."""

    block_launches: float
    other_launches: float  # of tables, head and loss
    end_launches: float  # of clip, update and zeroing, once a step
    block_bytes: float  # a token and channel, of one block
    logit_bytes: float  # a logit


class Passing(TorchDispatchMode):
    """Counts operations, and the bytes that those read and write which multiply no matrices; views are free.

    torch has no public name for the class that its documentation tells to extend."""

    launches = num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            self.launches += 1
            if not func.name().startswith(PRODUCTS):
                seen = (*args, *(out if isinstance(out, (tuple, list)) else [out]))
                flat = (each for arg in seen for each in (arg if isinstance(arg, (tuple, list)) else [arg]))
                self.num_bytes += sum(each.nbytes for each in flat if isinstance(each, torch.Tensor))
        return out


def count(config: GPTConfig, rows: int) -> Counts:
    """Of one process in eager mode: what a model of two blocks has more than one of one block is a block's."""
    seen = []
    for n_layer in (1, 2):
        model = build(replace(config, n_layer=n_layer))
        optimizer, tokens = build_optimizer(model, OptimConfig()), torch.zeros(rows // config.block_size,
                                                                               config.block_size, dtype=torch.long)
        with Passing() as passes:
            model(tokens, tokens, torch.tensor(rows))[1].backward()
        with Passing() as end:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
        seen.append((passes.launches, passes.num_bytes, end.launches))
    (one, one_bytes, end), (two, two_bytes, _) = seen
    block_bytes = two_bytes - one_bytes
    return Counts(two - one, one - (two - one), end, block_bytes / rows / config.n_embd,
                  (one_bytes - block_bytes) / rows / config.padded_vocab_size)


def training_step(config: GPTConfig, micro_seqs: int, job: Job) -> Callable[[], None]:
    """A step as train.py's loop makes it, on random tokens."""
    torch.manual_seed(0)
    model = parallel.materialize(build_empty(config), build(config).state_dict() if job.rank == 0 else None, job)
    wrapped, optimizer = parallel.wrap(model, job, micro_seqs), build_optimizer(model, OptimConfig(), job)
    x = torch.randint(config.vocab_size, (micro_seqs, config.block_size))
    num_targets = torch.tensor(x.numel() * MICRO_BATCHES * job.world_size)

    def step() -> None:
        distributed.sum_over_ranks(torch.ones(2), job)
        for i in range(MICRO_BATCHES):
            parallel.set_gradient_sync(wrapped, i == MICRO_BATCHES - 1, job)
            wrapped(x, x, num_targets)[1].backward()
        norm = parallel.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        distributed.sum_over_ranks(torch.stack([norm, norm, norm]), job).tolist()
        optimizer.step()
        parallel.zero_grad(model, job)

    return step


def multiply(matrices: list[torch.Tensor], rows: int) -> None:
    """The products of a micro-batch with each matrix, forward and backward."""
    for weight in matrices:
        x = weight.new_ones(rows, weight.size(1))
        y = x @ weight.t()
        _ = y @ weight, y.t() @ x


def stream(rows: int, width: int) -> None:
    """What a block does besides products: a norm, an addition and an activation, forward and backward."""
    x, h = torch.ones(rows, width, requires_grad=True), torch.ones(rows, 4 * width, requires_grad=True)
    (F.layer_norm(x, (width,)) + x).backward(x.detach())
    F.gelu(h, approximate="tanh").backward(h.detach())


def communicate(kind: str, num_bytes: int, job: Job) -> Callable[[], None]:
    whole = torch.ones(num_bytes // 4 // job.world_size * job.world_size)
    part = whole.chunk(job.world_size)[job.rank].clone()
    return {"all-reduce": partial(dist.all_reduce, whole),
            "all-gather": partial(dist.all_gather_into_tensor, whole, part),
            "reduce-scatter": partial(dist.reduce_scatter_tensor, part, whole)}[kind]


def fastest(what: dict[str, Callable[[], None]], job: Job) -> dict[str, float]:
    """Seconds of each, the slowest rank's in the fastest round."""
    seen: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(ROUNDS + 1):  # the first one warms up
        for name, do in what.items():
            if job.world_size > 1:
                dist.barrier()
            began = time.perf_counter()
            do()
            slowest = max(distributed.gather(time.perf_counter() - began, job))
            seen[name] += [slowest] * (turn > 0)
    return {name: min(values) for name, values in seen.items()}


def check(predict: Callable[[LanguageModel, str, BatchPlan, dict], float], job: Job) -> Iterator[str]:
    """A row for each shape: seconds of a step as predicted from the rates, and as measured."""
    yield "| blocks x channels x tokens | processes | layout | predicted | measured | ratio |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for config in SHAPES:
        predicted, measured = measure(config, predict, job)
        yield (f"| {config.n_layer} x {config.n_embd} x {MICRO_SEQS * config.block_size} | {job.world_size} | "
               f"{job.parallel if job.world_size > 1 else ''} | {1000 * predicted:.0f} ms | {1000 * measured:.0f} ms | "
               f"{predicted / measured:.2f} |")


def measure(config: GPTConfig, predict: Callable[[LanguageModel, str, BatchPlan, dict], float], job: Job
            ) -> tuple[float, float]:
    """Seconds of a step of this shape: predicted from rates that are measured beside it, and measured."""
    rows, model = MICRO_SEQS * config.block_size, build(config)
    tiny = replace(config, n_embd=16, n_head=2, block_size=8, vocab_size=16)
    matrices = [p.detach() for p in model.h.parameters() if p.dim() == 2] + [model.head.detach()]
    what = {"step": training_step(config, MICRO_SEQS, job), "tiny": training_step(tiny, 1, job),
            "products": partial(multiply, matrices, rows), "stream": partial(stream, rows, config.n_embd)}
    kinds = () if job.world_size == 1 else ("all-reduce",) if job.shard_size == 1 else (
        "all-reduce", "all-gather", "reduce-scatter")
    large = 4 * sum(p.numel() for p in (model if job.shard_size == 1 else model.h[0]).parameters())
    for kind in kinds:
        what |= {f"{kind} {size}": communicate(kind, size, job) for size in (SMALL_BYTES, large)}
    seconds = fastest(what, job)
    with Passing() as passing:
        stream(rows, config.n_embd)
    here = {"flops": 6 * rows * sum(weight.numel() for weight in matrices) / seconds["products"],
            "memory_bytes_per_s": passing.num_bytes / seconds["stream"], "counts": count(config, rows), "launch_s": 0.0,
            "links": {kind: link(kind, *(seconds[f"{kind} {size}"] for size in (SMALL_BYTES, large)), large, job)
                      for kind in kinds}}
    plan = BatchPlan(MICRO_SEQS * MICRO_BATCHES * job.world_size, MICRO_SEQS, MICRO_BATCHES, job.world_size)
    # What an operation costs beside its work: a step of the smallest model, less what is predicted of it without that.
    counts = here["counts"]
    launches = MICRO_BATCHES * (config.n_layer * counts.block_launches + counts.other_launches) + counts.end_launches
    small_plan = replace(plan, seqs_per_step=MICRO_BATCHES * job.world_size, micro_batch=1)
    here["launch_s"] = max(0.0, seconds["tiny"] - predict(build(tiny), job.parallel, small_plan, here)) / launches
    return predict(model, job.parallel, plan, here), seconds["step"]


def link(kind: str, small_s: float, large_s: float, num_bytes: int, job: Job) -> tuple[float, float]:
    """Bytes a second and seconds a hop, in a ring."""
    hops = (2 if kind == "all-reduce" else 1) * (job.world_size - 1)
    return hops / job.world_size * num_bytes / max(1e-9, large_s - small_s), small_s / hops
