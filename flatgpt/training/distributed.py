"""Several processes: their process group, DDP and FSDP, compiling on all of them, reductions, clean-up.

Owns every call of torch.distributed. One process without torchrun is the job of world size 1, and all functions here
work there without a process group, so that train.py has no second path.

Invariants: rank 0 decides what depends on files (where to resume) and broadcasts it; what the ranks must agree on is
compared at the start; tensors that leave this module for a checkpoint are whole, whatever layout they were trained in.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from flatgpt import launcher, machine
from flatgpt.models.baselines import build_empty
from flatgpt.options import failed_rules
from flatgpt.training import hosts
from flatgpt.training.device import DeviceConfig, one_line, pick_device, pick_dtype

T = TypeVar("T")
FILE_TIMEOUT_S = 3600  # that the others wait while rank 0 reads, verifies or writes files


@dataclass
class ParallelConfig:
    """Several processes"""

    parallel: Literal["ddp", "fsdp"] = "ddp"  # ddp: each process holds the whole model; fsdp: a part (FSDP2)
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto = nccl on CUDA, else gloo
    timeout_s: int = 600  # seconds that a rank waits for the others before it gives up, and torchrun restarts all

    def validate(self) -> list[str]:
        return failed_rules(self, ("timeout_s", self.timeout_s > 0, "positive"))


@dataclass
class Job:
    """This process's place: rank of world_size, its device, and the number type of its matrix products."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    parallel: str = "ddp"
    cpu_group: dist.ProcessGroup | None = None  # for plain Python between the ranks, with patience for slow disks
    hosts: tuple[str, ...] = ()  # of each rank, "east (10.0.0.1)": its host's name, and where gloo listens there

    def name(self, rank: int) -> str:
        """A rank in words, with its host where there are several."""
        return f"rank {rank} on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else f"rank {rank}"

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Raises ValueError where the layout does not go with it."""
        if self.parallel == "fsdp" and dtype == torch.float16:
            raise ValueError("dtype=float16 does not work with parallel=fsdp, which has no loss scaler here: "
                             "use --dtype=bfloat16 or float32")
        self.dtype = dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


@contextlib.contextmanager
def init_job(config: DeviceConfig, parallel: ParallelConfig | None = None, alone: bool = False) -> Iterator[Job]:
    """Join the process group of the launcher's ranks, where there are several, and leave it at the end; `alone`: this
    process has nobody to join, whatever the environment says. Raises ValueError."""
    parallel = parallel or ParallelConfig()
    rank, world_size, local_rank, local_world_size = launcher.Ranks() if alone else launcher.ranks()
    device = pick_device(config.device, local_rank)
    job = Job(rank, world_size, device, pick_dtype(config.dtype, device), parallel.parallel)
    job.set_dtype(job.dtype)  # is checked; what `auto` means is decided anew when the model is known
    if machine.core_quota() and "OMP_NUM_THREADS" not in os.environ:  # else torch's own count of cores stays
        torch.set_num_threads(min(torch.get_num_threads(), max(1, machine.num_cores() // local_world_size)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with its own
            os.environ.setdefault("NCCL_ALGO", "Ring")  # switches that add up (NVLS) do so in any order
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # all of it is written before it is read
        torch.set_float32_matmul_precision("high")  # what stays float32 is multiplied as tf32
    if world_size == 1:
        yield job
        return
    backend = parallel.backend if parallel.backend != "auto" else "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend=nccl works between CUDA devices, and this is {device}: use --backend=gloo")
    where = launcher.rendezvous()
    if not launcher.UNDER_TORCHRUN:
        print(f"rank {rank} waits for the other {world_size - 1} at {where}, up to {parallel.timeout_s} s: the "
              f"environment has {launcher.rank_variables()}", file=sys.stderr, flush=True)
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    store = hosts.meet(job, where, timeout)
    with hosts.lost_connections(job):
        with hosts.deadline(parallel.timeout_s + 10, job):
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout,
                                    device_id=device if backend == "nccl" else None)
            job.cpu_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=FILE_TIMEOUT_S))
        yield job
    # Not after an error: the others may be waiting for us, closing the groups would wait for them, our end wakes them.
    job.cpu_group = None
    # Gloo's threads may still hold Python objects of their last work, and need the interpreter's lock to drop them,
    # which the closing of a group keeps while it waits for them.
    time.sleep(0.1)
    dist.destroy_process_group()


# Layouts


def materialize(model: nn.Module, state: Mapping[str, torch.Tensor] | None, job: Job) -> nn.Module:
    """Give a model made on the meta device its memory and rank 0's weights (`state`; None elsewhere): whole on every
    rank, or, with FSDP, each rank's part of it, so that no GPU ever holds it whole."""
    if job.world_size > 1 and job.parallel == "fsdp":
        _shard(model, job.world_size, job)
    model.to_empty(device=job.device)
    fill(model, state, job)
    return model


def fill(model: nn.Module, state: Mapping[str, torch.Tensor] | None, job: Job) -> None:
    """Overwrite a model, however it lies over the ranks, with rank 0's weights (`state`; None elsewhere)."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = torch.empty(p.shape) if state is None else state[name]
            p.copy_(from_rank0(value.to(job.device), p, job))


def stand_in(model: nn.Module, job: Job) -> nn.Module:
    """A model of one block for a trial: in `model`'s shape and number type, with weights of zero, on this rank alone.

    A pass that fails leaves FSDP with parameters that are no longer sharded, and the ranks in different collectives.
    So what is to be trained takes part in no trial, and what takes part is thrown away."""
    trial = build_empty(replace(model.config, n_layer=1) if model.h else model.config)
    trial.activation_checkpointing = model.activation_checkpointing
    if job.world_size > 1 and job.parallel == "fsdp":
        _shard(trial, 1, job)
    trial.to_empty(device=job.device)
    with torch.no_grad():
        for p in trial.parameters():
            p.zero_()
    trial.set_attention(model.h[0].attn.backend if model.h else "sdpa")
    return trial


def _shard(model: nn.Module, num_parts: int, job: Job) -> None:
    """FSDP2: each of `num_parts` neighbouring ranks holds its part of every parameter; a block's are gathered when it
    runs, and its gradients summed in float32. With 16-bit products the blocks' weights travel in 16 bits; the residual
    path stays float32, as in DDP."""
    # These take a second, which every start would pay.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    shape = (job.world_size // num_parts, num_parts)
    mesh = init_device_mesh(job.device.type, shape, mesh_dim_names=("groups", "ranks"))["ranks"]
    policy = MixedPrecisionPolicy()
    if job.dtype != torch.float32:
        policy = MixedPrecisionPolicy(job.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "next_token_logits")  # generation does not come through `forward`


def wrap(model: nn.Module, job: Job, batch_size: int) -> nn.Module:
    """The model whose backward pass averages gradients over the ranks: DDP around it, or itself if it is sharded."""
    if job.world_size == 1:
        return model
    if job.parallel == "fsdp":
        # After a pass that failed they would be whole, and each rank would train a model of its own.
        assert all(hasattr(p, "full_tensor") for p in model.parameters()), "FSDP's parameters are not sharded"
        return model
    device_ids = [job.device.index] if job.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # After its first backward pass DDP sorts its buckets anew, by the order in which gradients came; with them the
    # order of summation over four and more ranks changes. Two passes over nothing get that over before the first
    # step, so that a resumed run sums in the same order as one that was never interrupted.
    for _ in range(2):
        _try_pass(wrapped, model, job, batch_size)
    return wrapped


def _try_pass(wrapped: nn.Module, model: nn.Module, job: Job, batch_size: int) -> None:
    """A forward and backward pass over zeros; its gradients are dropped."""
    nothing = torch.zeros(batch_size, model.config.block_size, dtype=torch.long, device=job.device)
    try:
        with job.autocast():
            _, loss = wrapped(nothing, nothing)
        loss.backward()
    finally:
        zero_grad(model, job)


def zero_grad(model: nn.Module, job: Job) -> None:
    """Forget the gradients. DDP's stay where they are, in its buckets: micro-batches then add up there, and the memory
    of a second set is saved."""
    if job.world_size == 1 or job.parallel == "fsdp":
        model.zero_grad()
    elif grads := [p.grad for p in model.parameters() if p.grad is not None]:
        torch._foreach_zero_(grads)  # one launch on a GPU


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


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be spread over the ranks, as one; every rank has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be spread over the ranks."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def from_rank0(tensor: torch.Tensor, p: torch.Tensor, job: Job) -> torch.Tensor:
    """Rank 0's whole tensor, on the device, laid out over the ranks as parameter p is if it has p's shape: the inverse
    of `full_tensor`. The other ranks hand in one of the same shape, which is overwritten."""
    box = tensor.to(p.device)  # NCCL moves GPU memory only; an optimiser's step count may be on the host
    if job.world_size > 1:
        dist.broadcast(box, src=0)
    tensor = box.to(tensor.device)
    if not hasattr(p, "full_tensor") or tensor.shape != p.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def compile_parts(model: nn.Module, wanted: str, job: Job, batch_size: int) -> str | None:
    """Compile the model's parts in place if `wanted` (auto, True, False), after a trial on every rank.

    Returns why it runs without after all, or None."""
    if not wants_compiler(wanted, job):
        return None
    failure = try_compiler(model, job, batch_size)
    if failure is None:
        compile_in_place(model)  # finds the trial's compilation ready
    return failure


def wants_compiler(wanted: str, job: Job) -> bool:
    return wanted == "True" or (wanted == "auto" and job.device.type == "cuda")


def try_compiler(model: nn.Module, job: Job, batch_size: int) -> str | None:
    """Compile a stand-in for the model and run it. Returns what failed, on whichever rank, or None."""
    trial, failure = stand_in(model, job), None
    try:
        compile_in_place(trial)
        _try_pass(trial, trial, job, batch_size)
    except torch.OutOfMemoryError:  # no fault of the compiler's
        raise
    except Exception as error:  # whatever the compiler trips over: training without it is better than none
        failure = one_line(getattr(error, "inner_exception", error))  # of dynamo's own, what its backend raised
    return next((f for f in gather(failure, job) if f), None)


def compile_in_place(model: nn.Module, **how: Any) -> None:
    if torch.are_deterministic_algorithms_enabled():
        # Kernels that are chosen by their speed differ between runs. (An environment variable would come too late
        # where torch's compiler is imported already.)
        how["options"] = {"deterministic": True}
    for part in model.compiled_parts():
        part.compile(**how)
    model.is_compiled = True


def eager(model: nn.Module) -> contextlib.AbstractContextManager:
    """Within this context the model runs uncompiled; torch.compile would compile again for each new length."""
    return torch.compiler.set_stance("force_eager") if model.is_compiled else contextlib.nullcontext()


# Between the ranks


def share_rank0s(options: Any, job: Job) -> None:
    """Give the fields of a dataclass, and of those in it, that are marked {"rank": 0} rank 0's values on every rank."""
    for field in fields(options):
        value = getattr(options, field.name)
        if field.metadata.get("rank") == 0:
            setattr(options, field.name, on_rank0(lambda value=value: value, job))
        elif is_dataclass(value):
            share_rank0s(value, job)


def check_agreement(what: dict[str, Any], job: Job) -> None:
    """Raises ValueError on every rank unless all have the same values of `what` (plain Python)."""
    everyone = gather(what, job)
    faults = [f"{key} is {theirs.get(key)} on {job.name(rank)} and {value} on {job.name(0)}"
              for rank, theirs in enumerate(everyone) for key, value in everyone[0].items() if theirs.get(key) != value]
    if faults:
        raise ValueError(f"the processes do not run the same job: {'; '.join(faults)}. Start every node with the same "
                         "command, code and data")


def bandwidth(job: Job, num_bytes: int) -> float:
    """Bytes a second that an all-reduce of so many bytes sends from each rank: 2 (W - 1) / W of them, in a ring."""
    tensor = torch.zeros(max(1, num_bytes // 4), device=job.device)
    for _ in range(2):  # the first sets up connections
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()  # waits for the device
    return 2 * (job.world_size - 1) / job.world_size * num_bytes / (time.perf_counter() - began)


def sum_over_ranks(values: torch.Tensor, job: Job) -> torch.Tensor:
    """The sum of a tensor on the device over all ranks, the same bits on each; nothing waits for the device."""
    if job.world_size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def gather(value: Any, job: Job) -> list[Any]:
    """Every rank's value (plain Python), in the order of ranks."""
    if job.world_size == 1:
        return [value]
    values: list[Any] = [None] * job.world_size
    dist.all_gather_object(values, value, group=job.cpu_group)
    return values


def on_rank0(do: Callable[[], T], job: Job) -> T:
    """Run `do` on rank 0, which may take long; every rank gets its value (plain Python). If it fails there, the others
    leave: quietly beside it, on other hosts with an OSError that says where to look."""
    if job.world_size == 1:
        return do()
    box: list[Any] = [None, True]  # value, failed
    try:
        if job.rank == 0:
            box = [do(), False]
    finally:
        dist.broadcast_object_list(box, group=job.cpu_group)
    if box[1] and job.hosts[job.rank] != job.hosts[0]:
        raise OSError(f"{job.name(0)} has failed: its own output says why")
    if box[1]:
        sys.exit(2)
    return box[0]
