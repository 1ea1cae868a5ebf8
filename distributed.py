"""Several processes: torchrun's environment, DDP and FSDP, reductions, signals, clean-up.

Owns every call of torch.distributed. One process without torchrun is the job of world size 1, and all functions here
work there without a process group, so that train.py has no second path.

Invariants: rank 0 decides what depends on files (where to resume) and broadcasts it; what the ranks must agree on is
compared at the start; a process that torchrun started does not outlive torchrun; tensors that leave this room for a
checkpoint are whole, whatever layout they were trained in.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from device import DeviceConfig, pick_device, pick_dtype

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what schedulers, people and clouds send


@dataclass
class ParallelConfig:
    """Several processes"""

    parallel: Literal["ddp", "fsdp"] = "ddp"  # ddp: each holds the whole model; fsdp: each a part of it (FSDP2)
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto = nccl on CUDA, else gloo
    timeout_s: int = 600  # seconds that a rank waits for the others before it gives up, and torchrun restarts all


@dataclass
class Job:
    """This process's place: rank of world_size, its device, and the number type of its matrix products."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    parallel: str = "ddp"

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


@contextlib.contextmanager
def job(config: DeviceConfig, parallel: ParallelConfig | None = None) -> Iterator[Job]:
    """Join torchrun's process group, if torchrun started us, and leave it at the end. Raises ValueError."""
    parallel = parallel or ParallelConfig()
    under_torchrun = "RANK" in os.environ
    rank, world_size, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
                                    ) if under_torchrun else (0, 1, 0)
    device = pick_device(config.device, local_rank)
    here = Job(rank, world_size, device, pick_dtype(config.dtype, device), parallel.parallel)
    if here.parallel == "fsdp" and here.dtype == torch.float16:
        raise ValueError("dtype=float16 does not go with parallel=fsdp, over whose parts no loss scaler looks: "
                         "use --dtype=bfloat16 or float32")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with its own
            torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")  # what stays float32 is multiplied as tf32
    if not under_torchrun:
        yield here
        return
    backend = parallel.backend if parallel.backend != "auto" else "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend=nccl works between CUDA devices, and this is {device}: use --backend=gloo")
    end_with_parent()
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=parallel.timeout_s),
                            device_id=device if backend == "nccl" else None)
    yield here
    # Not after an error: the others may be waiting for us, closing the group would wait for them, our end wakes them.
    dist.destroy_process_group()


def end_with_parent() -> None:
    """Have the kernel kill this process when torchrun dies (Linux): left alone it would hold its GPU for ever."""
    if sys.platform == "linux":
        torchrun = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        if os.getppid() != torchrun:  # it died just before that
            os._exit(1)


def minutes_since_launch() -> float:
    """Since torchrun, or this process without it, was started: a restarted worker shares the job's time limit."""
    pid = os.getppid() if "RANK" in os.environ else os.getpid()
    try:
        # Field 22 of /proc/PID/stat, counted behind the name, which may hold blanks: clock ticks since the boot.
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux: what this process has used of it
        seconds = time.monotonic() - _LOADED
    return seconds / 60


_LOADED = time.monotonic()


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that gets the name of each signal that asks this process to stop, so that the step under way can be
    finished and saved first. A second Ctrl-C, a second or more after the first, is not waited for."""
    asked: list[str] = []
    last_s = 0.0

    def remember(number: int, _frame: Any) -> None:
        nonlocal last_s
        name, now_s = signal.Signals(number).name, time.monotonic()
        if name == "SIGINT" and name in asked and now_s - last_s > 1:  # torchrun sends one Ctrl-C on as another
            raise KeyboardInterrupt
        asked.append(name)
        last_s = now_s

    before = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Layouts


def wrap(model: nn.Module, here: Job, batch_size: int) -> nn.Module:
    """The model whose backward pass averages gradients over the ranks: DDP around it, or itself, sharded in place."""
    if here.world_size == 1:
        return model
    return _shard(model, here) if here.parallel == "fsdp" else _replicate(model, here, batch_size)


def _replicate(model: nn.Module, here: Job, batch_size: int) -> nn.Module:
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


def _shard(model: nn.Module, here: Job) -> nn.Module:
    """FSDP2: each rank holds 1/W of every parameter; a block's are gathered when it runs, and its gradients summed in
    float32. With 16-bit products the blocks' weights travel in 16 bits; the residual path stays float32, as in DDP."""
    # These take a second to import, which every start would pay.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(here.device.type, (here.world_size,))
    policy = MixedPrecisionPolicy()
    if here.dtype != torch.float32:
        policy = MixedPrecisionPolicy(here.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def set_gradient_sync(wrapped: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass averages gradients over the ranks, or only adds them up on each."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP2's
        wrapped.set_requires_gradient_sync(wanted)
    elif isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = wanted


def reshard(model: nn.Module) -> None:
    """Drop the gathered weights that a forward pass without a backward pass leaves behind in FSDP."""
    if hasattr(model, "reshard"):
        model.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be spread over the ranks, as one; every rank has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def from_rank0(tensor: torch.Tensor, p: torch.Tensor, here: Job) -> torch.Tensor:
    """Rank 0's whole tensor, laid out over the ranks as parameter p is if it has p's shape: the inverse of `whole`.
    The other ranks hand in one of the same shape, which is overwritten."""
    broadcast_tensors([tensor], here)
    if not hasattr(p, "full_tensor") or tensor.shape != p.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


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


# Between the ranks


def check_agreement(what: dict[str, Any], here: Job) -> None:
    """Raises ValueError on every rank unless all have the same values of `what` (plain Python)."""
    everyone = gather(what, here)
    faults = [f"{key} is {theirs.get(key)} on rank {rank} and {value} on rank 0"
              for rank, theirs in enumerate(everyone) for key, value in everyone[0].items() if theirs.get(key) != value]
    if faults:
        raise ValueError(f"the processes do not run the same job: {'; '.join(faults)}. Start every node with the same "
                         "command, code and data")


def bandwidth(here: Job, num_bytes: int) -> float:
    """Bytes a second that an all-reduce of so many bytes sends from each rank: 2 (W - 1) / W of them, in a ring."""
    tensor = torch.zeros(max(1, num_bytes // 4), device=here.device)
    for _ in range(2):  # the first sets up connections
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()  # waits for the device
    return 2 * (here.world_size - 1) / here.world_size * num_bytes / (time.perf_counter() - began)


def sum_over_ranks(values: torch.Tensor, here: Job) -> torch.Tensor:
    """The sum of a tensor on the device over all ranks, the same bits on each; nothing waits for the device."""
    if here.world_size == 1:
        return values
    total = values.clone()
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
