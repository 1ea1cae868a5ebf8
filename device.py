"""Which device, which number type for its matrix products, and which attention kernel: what `auto` means, and what a
device has.

Owns the options that name a device. Nothing here knows about several processes, except that each has a GPU of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class DeviceConfig:
    """Where and in what numbers"""

    device: str = "auto"  # cuda, cuda:1, mps, cpu; auto = the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto = bfloat16 if native
    deterministic: bool = False  # the same bits on every run on CUDA too, for some speed (a CPU always gives them)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; `auto` and `cuda` mean this process's own GPU. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device={name!r} is not a device: use cuda, cuda:N, mps, cpu or auto")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but this machine (or this build of torch) has no CUDA: use --device=cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"there is no {device} here, only {torch.cuda.device_count()} GPUs: start no more "
                         "processes a node than it has GPUs (--nproc_per_node)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name!r}, but this machine has no MPS: use --device=cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it natively, float16 on older CUDA cards, else float32."""
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            raise ValueError("dtype=float16 is a hundred times slower than float32 on a CPU: use float32 or bfloat16")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def pick_attention(name: str, device: torch.device, dtype: torch.dtype, block_size: int) -> str:
    """`sdpa`, `math` or `flash3`. auto takes flash3 on a Hopper GPU where FlashAttention-3 is installed and gives what
    SDPA gives, and math where a CPU's SDPA is slow: short windows in bfloat16. Raises ValueError when flash3 was asked
    for and cannot be had."""
    if name not in ("auto", "flash3"):
        return name
    fault = _flash3_fault(device, dtype)
    if fault and name == "flash3":
        raise ValueError(f"attention=flash3: {fault}; use --attention=auto")
    if not fault:
        return "flash3"
    return "math" if device.type == "cpu" and dtype == torch.bfloat16 and block_size <= 128 else "sdpa"


def _flash3_fault(device: torch.device, dtype: torch.dtype) -> str:
    """Why FlashAttention-3 cannot be used here, or ""; a launch, forward and backward, is tried."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"FlashAttention-3 is for Hopper GPUs, and this is {device}"
    if dtype == torch.float32:
        return "FlashAttention-3 is for dtype=bfloat16 and float16"
    if torch.are_deterministic_algorithms_enabled():
        return "FlashAttention-3's backward pass does not give the same bits each time, as deterministic=True wants"
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


def one_line(error: Exception) -> str:
    """What a compiler or a driver throws, as far as a person reads it."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


def memory_bytes(device: torch.device) -> int:
    """All the memory of a GPU; for everything else what this process may have of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine.memory_bytes()
