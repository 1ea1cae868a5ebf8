"""Several processes: torchrun's environment, DDP and FSDP, compiling on all of them, reductions, clean-up.

Owns every call of torch.distributed. One process without torchrun is the job of world size 1, and all functions here
work there without a process group, so that train.py has no second path.

Invariants: rank 0 decides what depends on files (where to resume) and broadcasts it; what the ranks must agree on is
compared at the start; tensors that leave this room for a checkpoint are whole, whatever layout they were trained in.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from device import DeviceConfig, one_line, pick_device, pick_dtype

T = TypeVar("T")
FILE_TIMEOUT_S = 3600  # that the others wait while rank 0 reads, verifies or writes files
NAME_INTERFACE = ("start torchrun on every host with GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME, NAME being its "
                  "network interface to the others (`ip -brief address` lists them)")


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
    dtype: torch.dtype = torch.float32
    parallel: str = "ddp"
    talk: dist.ProcessGroup | None = None  # for plain Python between the ranks, with patience for slow disks
    hosts: tuple[str, ...] = ()  # of each rank, "east (10.0.0.1)": its host's name, and where gloo listens there

    def name(self, rank: int) -> str:
        """A rank in words, with its host where there are several."""
        return f"rank {rank} on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else f"rank {rank}"

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Raises ValueError where the layout does not go with it."""
        if self.parallel == "fsdp" and dtype == torch.float16:
            raise ValueError("dtype=float16 does not go with parallel=fsdp, over whose parts no loss scaler looks: "
                             "use --dtype=bfloat16 or float32")
        self.dtype = dtype

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
    here = Job(rank, world_size, device, parallel=parallel.parallel)
    here.set_dtype(pick_dtype(config.dtype, device))  # `auto` is decided anew when the model is known
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with its own
            os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # kernels chosen by timing differ between runs
            torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")  # what stays float32 is multiplied as tf32
    if not under_torchrun:
        yield here
        return
    backend = parallel.backend if parallel.backend != "auto" else "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend=nccl works between CUDA devices, and this is {device}: use --backend=gloo")
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    store = _meet(here, timeout)
    with _lost_connections(here):
        with _deadline(parallel.timeout_s + 10, here):
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout,
                                    device_id=device if backend == "nccl" else None)
            here.talk = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=FILE_TIMEOUT_S))
        yield here
    # Not after an error: the others may be waiting for us, closing the groups would wait for them, our end wakes them.
    here.talk = None
    # Gloo's threads may still hold Python objects of their last work, and need the interpreter's lock to drop them,
    # which the closing of a group keeps while it waits for them.
    time.sleep(0.1)
    dist.destroy_process_group()


# Hosts


def _meet(here: Job, timeout: datetime.timedelta) -> dist.Store:
    """The store at rank 0 where the processes find each other; `here` learns each rank's host.

    Raises OSError where they would wait in vain: the store is out of reach, a rank does not come, or gloo would listen
    on a host's loopback, whose ranks torch would keep waiting for five times the timeout."""
    me, address, port = socket.gethostname(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline_s = time.monotonic() + timeout.total_seconds()
    while here.rank > 0:
        try:
            socket.create_connection((address, port), timeout.total_seconds()).close()
            break
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise OSError(f"rank {here.rank} on {me} cannot reach rank 0 at {address}, port {port} ({error}): "
                              f"where {address} does not lead {me} to rank 0's host, start torchrun there with "
                              "--local-addr=ADDRESS, one that the other hosts reach") from None
            time.sleep(0.2)
    told, heard = ([f"{what}_{rank}" for rank in range(here.world_size)] for what in ("host_of", "heard_by"))
    try:
        store, _, _ = next(dist.rendezvous("env://", here.rank, here.world_size, timeout=timeout))
        store.set(told[here.rank], f"{me} ({_gloo_address()})")
        store.wait(told, timeout)
        here.hosts = tuple(store.get(key).decode() for key in told)
        store.set(heard[here.rank], "")
        if here.rank == 0:
            store.wait(heard, timeout)  # it may end with this process
    except dist.DistError as error:
        raise OSError(f"rank {here.rank} on {me} did not meet the others at {address}, port {port} "
                      f"({one_line(error)}): look at the screens of the other hosts, which have to reach rank 0 "
                      "there") from None
    if len(set(here.hosts)) > 1 and (deaf := sorted(set(filter(_is_loopback, here.hosts)))):
        raise OSError(f"the processes cannot reach each other: {', '.join(deaf)} listens on loopback alone, since its "
                      f"own name leads there (/etc/hosts), or to no address it has: {NAME_INTERFACE}, or correct the "
                      "name")
    return store


def _gloo_address() -> str:
    """Where gloo listens on this host: at the interface it is told, else where the host's name leads."""
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        return interface
    with contextlib.suppress(OSError):  # a name that leads nowhere
        for family, *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind(address)  # fails for an address of another host
                return address[0]
    return "127.0.0.1"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.rpartition("(")[2].rstrip(")").partition("%")[0]).is_loopback
    except ValueError:  # an interface's name
        return False


@contextlib.contextmanager
def _deadline(seconds: float, here: Job) -> Iterator[None]:
    """What lasts longer in here ends the process: a rank that waits for connections in gloo hears of no failure."""

    def end() -> None:
        sys.stderr.write(f"error: {_cannot_connect(here, f'nothing heard for {seconds:.0f} s')}\n")
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _lost_connections(here: Job) -> Iterator[None]:
    """What torch says of a connection that broke, in one line that names hosts. Raises OSError."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"\[\S+:\d+\] ", "", one_line(error))  # without the line of torch's source
        if here.talk is None and "connectFullMesh" in reason:
            raise OSError(_cannot_connect(here, reason)) from None
        is_gloos = "/gloo/" in str(error) and "enforce fail" not in str(error)
        if not is_gloos and "ncclRemoteError" not in str(error):
            raise
        others = sorted(set(here.hosts) - {here.hosts[here.rank]}) or ["the other processes"]
        raise OSError(f"{here.name(here.rank)} lost the connection to {', '.join(others)}: {reason}. What was saved is "
                      "intact: torchrun --max-restarts=3 starts all again by itself, else give the same command again "
                      "on every host") from None


def _cannot_connect(here: Job, reason: str) -> str:
    return (f"{here.name(here.rank)} cannot connect to the others, which listen at "
            f"{', '.join(sorted(set(here.hosts)))}: {reason}. Every host has to reach those: {NAME_INTERFACE}")


# Layouts


def lay_out(model: nn.Module, state: Mapping[str, torch.Tensor] | None, here: Job) -> nn.Module:
    """Give a model made on the meta device its memory and rank 0's weights (`state`; None elsewhere): whole on every
    rank, or, with FSDP, each rank's part of it, so that no GPU ever holds it whole."""
    if here.world_size > 1 and here.parallel == "fsdp":
        _shard(model, here)
    model.to_empty(device=here.device)
    fill(model, state, here)
    return model


def fill(model: nn.Module, state: Mapping[str, torch.Tensor] | None, here: Job) -> None:
    """Overwrite a model, however it lies over the ranks, with rank 0's weights (`state`; None elsewhere)."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = torch.empty(p.shape) if state is None else state[name]
            p.copy_(from_rank0(value.to(here.device), p, here))


def _shard(model: nn.Module, here: Job) -> None:
    """FSDP2: each rank holds 1/W of every parameter; a block's are gathered when it runs, and its gradients summed in
    float32. With 16-bit products the blocks' weights travel in 16 bits; the residual path stays float32, as in DDP."""
    # These take a second to import, which every start would pay.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(here.device.type, (here.world_size,))
    policy = MixedPrecisionPolicy()
    if here.dtype != torch.float32:
        policy = MixedPrecisionPolicy(here.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "_next_logits")  # generation does not come through `forward`


def wrap(model: nn.Module, here: Job, batch_size: int) -> nn.Module:
    """The model whose backward pass averages gradients over the ranks: DDP around it, or itself if it is sharded."""
    if here.world_size == 1 or here.parallel == "fsdp":
        return model
    device_ids = [here.device.index] if here.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # After its first backward pass DDP sorts its buckets anew, by the order in which gradients came; with them the
    # order of summation over four and more ranks changes. Two passes over nothing get that over before the first
    # step, so that a resumed run sums in the same order as one that was never interrupted.
    for _ in range(2):
        _try_pass(wrapped, model, here, batch_size)
    return wrapped


def _try_pass(wrapped: nn.Module, model: nn.Module, here: Job, batch_size: int) -> None:
    """A forward and backward pass over zeros, whose gradients are forgotten."""
    nothing = torch.zeros(batch_size, model.config.block_size, dtype=torch.long, device=here.device)
    try:
        with here.autocast():
            _, loss = wrapped(nothing, nothing)
        loss.backward()
    finally:
        zero_grad(model, here)


def zero_grad(model: nn.Module, here: Job) -> None:
    """Forget the gradients. DDP's stay where they are, in its buckets: micro-batches then add up there, and the memory
    of a second set is saved."""
    model.zero_grad(set_to_none=here.world_size == 1 or here.parallel == "fsdp")


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
    """Rank 0's whole tensor, on the device, laid out over the ranks as parameter p is if it has p's shape: the inverse
    of `whole`. The other ranks hand in one of the same shape, which is overwritten."""
    box = tensor.to(p.device)  # NCCL moves GPU memory only; an optimiser's step count may be on the host
    if here.world_size > 1:
        dist.broadcast(box, src=0)
    tensor = box.to(tensor.device)
    if not hasattr(p, "full_tensor") or tensor.shape != p.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def compile_parts(model: nn.Module, wanted: str, here: Job, batch_size: int) -> str | None:
    """Compile the model's parts in place if `wanted` (auto, True, False), after a trial on every rank.

    Returns why it runs without after all, or None."""
    if wanted == "False" or (wanted == "auto" and here.device.type != "cuda"):
        return None
    failure = None
    for part in model.compiled_parts():
        part.compile()
    import torch._functorch.config  # a second to import

    # Else the compiler keeps an activation beside what it is made from, where a matrix product reads it.
    torch._functorch.config.ban_recompute_materialized_backward = False
    try:
        _try_pass(model, model, here, batch_size)
    except torch.OutOfMemoryError:  # no fault of the compiler's
        raise
    except Exception as error:  # whatever the compiler trips over: training without it is better than none
        failure = one_line(error)
    failures = [f for f in gather(failure, here) if f]
    if failures:
        for part in model.compiled_parts():
            part._compiled_call_impl = None
    return failures[0] if failures else None


def eager(model: nn.Module) -> contextlib.AbstractContextManager:
    """In here the model runs without what was compiled of it: the compiler would make it anew for each new length."""
    if not any(part._compiled_call_impl for part in model.compiled_parts()):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


# Between the ranks


def check_agreement(what: dict[str, Any], here: Job) -> None:
    """Raises ValueError on every rank unless all have the same values of `what` (plain Python)."""
    everyone = gather(what, here)
    faults = [f"{key} is {theirs.get(key)} on {here.name(rank)} and {value} on {here.name(0)}"
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
    dist.all_gather_object(values, value, group=here.talk)
    return values


def on_rank0(do: Callable[[], T], here: Job) -> T:
    """Run `do` on rank 0, which may take long; every rank gets its value (plain Python). If it fails there, the others
    leave: quietly beside it, on other hosts with an OSError that says where to look."""
    if here.world_size == 1:
        return do()
    box: list[Any] = [None, True]  # value, failed
    try:
        if here.rank == 0:
            box = [do(), False]
    finally:
        dist.broadcast_object_list(box, group=here.talk)
    if box[1] and here.hosts[here.rank] != here.hosts[0]:
        raise OSError(f"{here.name(0)} has failed: its screen says why")
    if box[1]:
        sys.exit(2)
    return box[0]
