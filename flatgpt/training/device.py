"""Which device a run uses, which number type for matrix products, and which attention kernel: what `auto` means, and
what a device supports.

Owns the options that name a device. On a CPU a short trial of the model decides what `auto` means, since a processor
that has instructions for bfloat16 may be slower with them all the same. A run records the choice in its options, so
that it goes on, and is sampled and measured, in the numbers that it began in. Nothing here knows about several
processes, except that each has a GPU of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from flatgpt.files import one_line
from flatgpt.machine import device_faults
from flatgpt.models.baselines import build_empty
from flatgpt.options import check_options

if TYPE_CHECKING:
    from model import GPTConfig, LanguageModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_WINDOW = 128  # tokens up to which a CPU's bfloat16 attention is the formula's by rule, not torch's kernel's
TRIED_WINDOW = 256  # tokens up to which a trial decides between them
TRIAL_S = 0.1  # seconds that the timed rounds of a trial take, or one round if that is longer
TRIAL_FLOPS = 2e9  # floating-point operations that a pass of a trial takes at most, about: 10 ms at 200 GFLOP/s
TRIAL_ROWS = (32, 512)  # positions that a pass reads, at least and at most, but no more than the run itself
TRIAL_WEIGHTS = 2**25  # parameters that a pass reads at most; more than a processor's caches hold
CLEARLY_FASTER = 0.9  # of the other's time: a smaller difference may be noise


@dataclass
class DeviceConfig:
    """Device and number type"""

    device: str = "auto"  # cuda, cuda:1, mps, cpu; auto = the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto = 16 bits where faster
    deterministic: bool = False  # on CUDA too, every run gives the same bits, at some cost in speed (a CPU always does)

    def validate(self) -> list[str]:
        return device_faults(self.device)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; `auto` and `cuda` mean this process's own GPU. Raises ValueError."""
    check_options(DeviceConfig(name))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but this machine (or this build of torch) has no CUDA: use --device=cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"there is no {device} here, only {torch.cuda.device_count()} GPUs: start no more "
                         "processes a node than it has GPUs (--nproc_per_node), or, if each process sees only its "
                         "own GPU, add --device=cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name!r}, but this machine has no MPS: use --device=cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type called `name`; `auto` goes by the device alone: bfloat16 where it has instructions for that,
    float16 on older CUDA cards, else float32. Raises ValueError."""
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            raise ValueError("dtype=float16 is a hundred times slower than float32 on a CPU: use float32 or bfloat16")
        return DTYPES[name]
    if device.type == "cuda":
        with torch.cuda.device(device):  # the current one is asked
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    asked = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")  # torch 2.9 has no such function
    has = torch.cpu.get_capabilities() if asked else {}
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_tile") else torch.float32


def pick_attention(name: str, device: torch.device, dtype: torch.dtype, block_size: int) -> str:
    """`sdpa`, `math` or `flash3`; `auto` goes by device and window alone: flash3 on a Hopper GPU where FlashAttention-3
    is installed and gives what SDPA gives, math for short windows in bfloat16 on a CPU, else sdpa, where torch
    chooses among its own kernels. Raises ValueError when flash3 was asked for and cannot be had."""
    if name not in ("auto", "flash3"):
        return name
    fault = _flash3_fault(device, dtype)
    if fault and name == "flash3":
        raise ValueError(f"attention=flash3: {fault}; use --attention=auto")
    if not fault:
        return "flash3"
    return "math" if device.type == "cpu" and dtype == torch.bfloat16 and block_size <= SHORT_WINDOW else "sdpa"


class Numerics(NamedTuple):
    """The number type and the attention kernel that a model computes with."""

    dtype: torch.dtype
    attention: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} with attention={self.attention}"


def pick_numerics(model: LanguageModel, dtype: str, attention: str, device: torch.device, rows: int,
                  recorded: Mapping[str, Any], training: bool = True) -> tuple[Numerics, str]:
    """What the options `dtype` and `attention` mean for a model on the host that reads about `rows` positions at a
    time, and what a trial showed, in words ("" without one).

    `auto` is what the run has `recorded` among its options on a device of this type. Without a record the rules of
    pick_dtype and pick_attention hold, but that a CPU with instructions for bfloat16 tries whether that, and with it
    the formula for windows that are not long, is faster as well; not so where `auto` itself is recorded, as earlier
    versions did. Raises ValueError as those do."""
    on_cpu, block_size = device.type == "cpu", model.config.block_size
    if str(recorded.get("device")).startswith(device.type):
        if dtype == "auto" and recorded.get("dtype") in tuple(DTYPES):
            dtype = recorded["dtype"]
        if attention == "auto" and on_cpu and recorded.get("attention") in ("sdpa", "math"):
            attention = recorded["attention"]
    by_rule = pick_dtype(dtype, device)
    choices = [Numerics(by_rule, pick_attention(attention, device, by_rule, block_size))]
    is_native = on_cpu and pick_dtype("auto", device) == torch.bfloat16
    if is_native and by_rule == torch.bfloat16 and model.config.model != "bigram":  # which has no products
        kernels = [choices[0].attention]
        if attention == "auto" != recorded.get("attention") and model.h and block_size <= TRIED_WINDOW:
            kernels = ["sdpa", "math"]
        choices = [Numerics(by_rule, kernel) for kernel in kernels]
        if dtype == "auto" != recorded.get("dtype"):
            choices.insert(0, Numerics(torch.float32, pick_attention(attention, device, torch.float32, block_size)))
    if len(choices) == 1:
        return choices[0], ""
    seconds = _try(model, choices, rows, training)
    chosen = choices[0]
    for choice in choices[1:]:
        if seconds[choice] < CLEARLY_FASTER * seconds[chosen]:
            chosen = choice
    return chosen, f"{chosen}: a trial took " + ", ".join(f"{1000 * seconds[choice]:.3g} ms in {choice}"
                                                          for choice in choices)


def _try(model: LanguageModel, choices: list[Numerics], rows: int, training: bool) -> dict[Numerics, float]:
    """Seconds that a few positions take in some blocks like the model's, or in all of a model without, backward pass
    included in `training`. Leaves the random numbers as they were."""
    config = model.config
    num_params = sum(p.numel() for p in (model.h[0] if model.h else model).parameters())
    rows = min(rows, TRIAL_ROWS[1], max(TRIAL_ROWS[0], int(TRIAL_FLOPS / 6 / num_params)))
    num_blocks = max(1, int(min(TRIAL_FLOPS / 6 / num_params / rows, TRIAL_WEIGHTS / num_params)))
    model = _with_zeros(replace(config, n_layer=min(num_blocks, config.n_layer)) if model.h else config)
    T = min(rows, config.block_size)
    tokens = torch.zeros(rows // T, T, dtype=torch.long)
    inputs = torch.linspace(-1, 1, rows // T * T * config.n_embd).view(rows // T, T, config.n_embd)
    positions = torch.arange(T)
    context = model.attention_context(positions, positions, model.config.windows[0]) if model.h else None

    def run(choice: Numerics) -> None:
        model.set_attention(choice.attention)
        with torch.autocast("cpu", choice.dtype, enabled=choice.dtype != torch.float32):
            y = inputs.requires_grad_(training)
            for block in model.h:
                y = block(y, context)
            if not model.h:
                y = model(tokens, tokens)[1]
        if training:
            y.sum().backward()

    model.eval()  # draws nothing for dropout
    # The outer autocast keeps the inner one's 16-bit weights: a step makes them for many more rows than this.
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=False):
        return time_in_turn({choice: partial(run, choice) for choice in choices})


def _with_zeros(config: GPTConfig) -> LanguageModel:
    """A model on the host whose weights, where a trial reads them, are zero."""
    model = build_empty(config).to_empty(device="cpu")
    with torch.no_grad():
        for p in (model.h or model).parameters():
            p.zero_()
    return model


def time_in_turn(steps: Mapping[Any, Callable[[], None]]) -> dict[Any, float]:
    """The least time, in seconds, that each of `steps` takes, over rounds in which they take turns."""
    for step in steps.values():
        step()  # the first time makes what later ones find ready
    seconds, began = dict.fromkeys(steps, float("inf")), time.perf_counter()
    while time.perf_counter() - began < TRIAL_S:
        for key, step in steps.items():
            since = time.perf_counter()
            step()
            seconds[key] = min(seconds[key], time.perf_counter() - since)
    return seconds


def _flash3_fault(device: torch.device, dtype: torch.dtype) -> str:
    """Why FlashAttention-3 cannot be used here, or ""; a launch, forward and backward, is tried."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"FlashAttention-3 is for Hopper GPUs, and this is {device}"
    if dtype == torch.float32:
        return "FlashAttention-3 is for dtype=bfloat16 and float16"
    if torch.are_deterministic_algorithms_enabled():
        return "FlashAttention-3's backward pass does not give the same bits each time, as deterministic=True needs"
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError as error:
        return f"flash_attn_interface is not installed ({error})"
    try:
        x = torch.randn(1, 2, 128, 64, device=device, dtype=dtype)  # (B, H, T, D)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = flash_attn_func(*[ours.transpose(1, 2)] * 3, causal=True)
        y = (y[0] if isinstance(y, tuple) else y).transpose(1, 2)
        wanted = F.scaled_dot_product_attention(theirs, theirs, theirs, is_causal=True)
        (y * x).sum().backward()
        (wanted * x).sum().backward()
        torch.testing.assert_close(y, wanted, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-1, rtol=5e-2)
    except Exception as error:  # a wrong build can fail in any way
        return f"a trial of it failed ({one_line(error)})"
    return ""
