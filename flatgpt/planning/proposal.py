"""A shape, a batch and rates for a depth, or for so much compute: each by a published rule, which the config that is
written names beside the value.

One dial, the depth, gives the shape; the shape and 20 tokens a parameter give the compute; the compute gives batch and
learning rate. The other way round, compute gives the depth that spends it best.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from flatgpt.models.baselines import build_empty
from flatgpt.planning import flops
from model import GPTConfig

WIDTH_PER_BLOCK, HEAD_SIZE = 64, 64  # channels
MAX_DEPTH = 1000
TOKENS_PER_PARAM = 20  # Hoffmann et al. (2022, arXiv:2203.15556), table 3
MICRO_BATCH_TOKENS = 65536  # more at a time is no faster on a GPU


@dataclass
class Setting:
    """An option's value, and where it comes from."""

    value: int | float | str | bool
    why: str


class Size(NamedTuple):
    params: int
    flops: int  # of a token
    flops_without_head: int


def batch_tokens(compute: float) -> float:
    """The best number of tokens a step for so many operations, the head's left out: DeepSeek LLM (arXiv:2401.02954),
    equation 1, fitted on 1e17 to 2e19 of them."""
    return 0.2920 * compute**0.3271


def learning_rate(compute: float) -> float:
    """AdamW's best learning rate for so many operations, from the same equation."""
    return 0.3118 * compute**-0.1250


def shape_of_depth(depth: int, shape: GPTConfig) -> GPTConfig:
    """`shape` with so many blocks, and as wide as they ask for."""
    return replace(shape, n_layer=depth, n_head=WIDTH_PER_BLOCK * depth // HEAD_SIZE, n_embd=WIDTH_PER_BLOCK * depth)


def size_of(shape: GPTConfig) -> Size:
    """Of the model: blocks are alike, so that two numbers of them say it for any other."""
    period = len(shape.window_pattern)
    if shape.n_layer <= 2 * period:
        model = build_empty(shape)
        work = flops.flops_by_part(model)
        return Size(model.num_params(non_embedding=False), sum(work.values()), sum(work.values()) - work.get("head", 0))
    rest = (shape.n_layer - 1) % period + 1
    small, large = (size_of(replace(shape, n_layer=n)) for n in (rest, rest + period))
    times = (shape.n_layer - rest) // period
    return Size(*(a + times * (b - a) for a, b in zip(small, large)))


def depth_for(compute: float, shape: GPTConfig, num_tokens: Callable[[int], float]) -> int:
    """The depth whose training on num_tokens(parameters) takes about `compute` operations: the nearest, by ratio.
    Raises ValueError for less than one block would take."""
    def needed(depth: int) -> float:
        size = size_of(shape_of_depth(depth, shape))
        return size.flops * num_tokens(size.params)

    if compute < needed(1) / 2:
        raise ValueError(f"{compute:.3g} operations are too few: one block of {WIDTH_PER_BLOCK} channels takes "
                         f"{needed(1):.3g}")
    low, high = 1, 2
    while needed(high) < compute and high < MAX_DEPTH:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) < compute else (low, middle)
    return low if compute / needed(low) < needed(high) / compute else high


def propose(depth: int, shape: GPTConfig, tokens: float, world_size: int, tokens_why: str,
            given: Mapping[str, object]) -> dict[str, Setting]:
    """Option -> value, for a GPT of `depth` blocks on about so many tokens. What is `given` stays as it is, and what is
    proposed follows from it."""
    shape = shape_of_depth(depth, shape)
    size = size_of(shape)
    compute = size.flops_without_head * tokens
    law = "DeepSeek LLM, arXiv:2401.02954"
    wanted = batch_tokens(compute)
    seqs = world_size * 2 ** max(0, round(math.log2(wanted / shape.block_size / world_size)))
    total = int(given.get("total_batch_size") or seqs * shape.block_size)
    steps = max(1, round(tokens / total))
    rate = float(given.get("learning_rate") or f"{learning_rate(compute):.2g}")
    settings = {
        "n_layer": Setting(depth, f"the dial: {size.params:,} parameters, {size.flops:.3g} flops a token"),
        "n_head": Setting(shape.n_head, f"of {HEAD_SIZE} channels, as in GPT-2"),
        "n_embd": Setting(shape.n_embd, f"{WIDTH_PER_BLOCK} x depth, as in nanochat and in GPT-2 small"),
        "total_batch_size": Setting(total, f"0.2920 C^0.3271 = {wanted:,.0f} ({law})"),
        "learning_rate": Setting(rate, f"0.3118 C^-0.1250, C = {compute:.3g} flops without the head's"),
        "max_iters": Setting(steps, f"x {total:,} = {steps * total:,} tokens, {tokens_why}"),
        "lr_decay_iters": Setting(steps, "a cosine as long as the run (arXiv:2203.15556, figure A1)"),
        "min_lr": Setting(float(f"{rate / 10:.2g}"), "a tenth, as there and in GPT-3"),
        "warmup_iters": Setting(min(2000, steps // 20), "2,000 as in DeepSeek LLM, but at most a twentieth of the run"),
        "eval_interval": Setting(max(1, steps // 20), "twenty evaluations"),
        "eval_iters": Setting(20, "batches each"),
        "log_interval": Setting(10 if steps >= 100 else 1, "")}
    return {key: setting for key, setting in settings.items() if key not in given}


def micro_batch_limit(block_size: int) -> int:
    """Sequences of a micro-batch that are enough."""
    return max(1, MICRO_BATCH_TOKENS // block_size)


def as_lines(settings: Mapping[str, Setting]) -> Iterator[str]:
    """The assignments of a config file, with their reasons as comments."""
    for key, setting in settings.items():
        value = json.dumps(setting.value, ensure_ascii=False) if isinstance(setting.value, str) else setting.value
        yield f"{key} = {value}" + (f"  # {setting.why}" if setting.why else "")


def as_config(docstring: str, settings: Mapping[str, Setting]) -> str:
    """The text of a config file."""
    escaped = docstring.replace("\\", r"\\").replace('"', r"\"")
    return "\n".join([f'"""{escaped}"""', "", *as_lines(settings), ""])
