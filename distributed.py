"""Where the job runs: devices, number types, torchrun's processes, DDP, reductions, clean-up.

Owns every call of torch.distributed. One process without torchrun is the job of world size 1, and all functions here
work there without a process group, so that train.py has no second path.

Invariants: rank 0 decides what depends on files (where to resume) and broadcasts it; the parameters of all ranks are
rank 0's when `wrap` returns.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class DeviceConfig:
    """Where and in what numbers"""

    device: str = "auto"  # cuda, cuda:1, mps, cpu; auto = the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto = bfloat16 if native
    deterministic: bool = False  # the same bits on every run on CUDA too, for some speed (a CPU always gives them)


@dataclass
class Job:
    """This process's place: rank of world_size, its device, and the number type of its matrix products."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


@contextlib.contextmanager
def job(config: DeviceConfig, backend: str = "auto") -> Iterator[Job]:
    """Join torchrun's process group, if torchrun started us, and leave it at the end. Raises ValueError."""
    under_torchrun = "RANK" in os.environ
    rank, world_size, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
                                    ) if under_torchrun else (0, 1, 0)
    device = pick_device(config.device, local_rank)
    here = Job(rank, world_size, device, pick_dtype(config.dtype, device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with its own
            torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")  # what stays float32 is multiplied as tf32
    if not under_torchrun:
        yield here
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend=nccl works between CUDA devices, and this is {device}: use --backend=gloo")
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    try:
        yield here
    finally:
        dist.destroy_process_group()


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


def wrap(model: nn.Module, here: Job, batch_size: int) -> nn.Module:
    """The model whose backward pass averages gradients over the ranks."""
    if here.world_size == 1:
        return model
    device_ids = [here.device.index] if here.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # After its first backward pass DDP sorts its buckets anew, by the order in which gradients came; with them the
    # order of summation over four and more ranks changes. Two passes over nothing get that over before the first
    # step, so that a resumed run sums in the same order as one that was never interrupted.
    nothing = torch.zeros(batch_size, model.config.block_size, dtype=torch.long, device=here.device)
    for _ in range(2):
        with here.autocast():
            _, loss = wrapped(nothing, nothing)
        loss.backward()
        model.zero_grad(set_to_none=True)
    return wrapped


def compile_blocks(model: nn.Module, wanted: str, here: Job, batch_size: int) -> str | None:
    """Compile the blocks in place if `wanted` (auto, True, False), after a trial on every rank.

    Returns why it runs without after all, or None."""
    if wanted == "False" or (wanted == "auto" and here.device.type != "cuda"):
        return None
    failure = None
    for block in model.h:
        block.compile()
    try:
        x = torch.randn(batch_size, model.config.block_size, model.config.n_embd, device=here.device,
                        requires_grad=True)
        with here.autocast():
            y = model.h[0](x)
        torch.autograd.grad(y.sum(), [x, *model.h[0].parameters()])
    except Exception as error:  # whatever the compiler trips over: training without it is better than none
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    failures = [f for f in gather(failure, here) if f]
    if failures:
        for block in model.h:
            block._compiled_call_impl = None
    return failures[0] if failures else None


def sum_over_ranks(value: torch.Tensor | float, here: Job) -> torch.Tensor:
    """The sum of a float32 tensor, or of a number, over all ranks, on the device; nothing waits for the device."""
    total = value.clone() if isinstance(value, torch.Tensor) else torch.full((), float(value), device=here.device)
    if here.world_size > 1:
        dist.all_reduce(total)
    return total


def gather(value: Any, here: Job) -> list[Any]:
    """Every rank's value (plain Python), in the order of ranks."""
    if here.world_size == 1:
        return [value]
    values: list[Any] = [None] * here.world_size
    dist.all_gather_object(values, value)
    return values


def on_rank0(do: Callable[[], T], here: Job) -> T:
    """Run `do` on rank 0; every rank gets its value (plain Python). If it fails there, the others leave quietly."""
    if here.world_size == 1:
        return do()
    box: list[Any] = [None, True]  # value, failed
    try:
        if here.rank == 0:
            box = [do(), False]
    finally:
        dist.broadcast_object_list(box)
    if box[1]:
        sys.exit(2)
    return box[0]


def broadcast_tensors(tensors: Iterable[torch.Tensor], here: Job) -> None:
    """Overwrite tensors, alike on all ranks in number and shape, with rank 0's."""
    if here.world_size > 1:
        for tensor in tensors:
            box = tensor.to(here.device)  # NCCL moves GPU memory only; an optimiser's step count may be on the host
            dist.broadcast(box, src=0)
            if box is not tensor:
                tensor.copy_(box)
