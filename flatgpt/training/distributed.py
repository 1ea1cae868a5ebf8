"""Several processes: their process group, what they tell each other, clean-up.

How a model lies over them is parallel.py's. One process without torchrun is the job of world size 1, and all functions
here and there work without a process group, so that train.py has no second path.

Invariants: rank 0 decides what depends on files (where to resume) and broadcasts it; what the ranks must agree on is
compared at the start.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from flatgpt import launcher, machine
from flatgpt.options import failed_rules
from flatgpt.planning.layout import Layout
from flatgpt.training import hosts
from flatgpt.training.device import DeviceConfig, pick_device, pick_dtype

T = TypeVar("T")
FILE_TIMEOUT_S = 3600  # that the others wait while rank 0 reads, verifies or writes files


@dataclass
class ParallelConfig:
    """Several processes"""

    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"  # a process holds the model (ddp), a part (fsdp; hsdp: in groups)
    shard_size: int = 0  # hsdp: processes that hold one copy of the model together, neighbours; 0 = those of a node
    reshard_after_forward: bool = True  # fsdp, hsdp; False keeps gathered weights for the backward pass
    reduce_every_micro_batch: bool = False  # of gradients, with fsdp, hsdp: less memory, more traffic
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto = nccl on CUDA, else gloo
    timeout_s: int = 600  # seconds that a rank waits for the others before it gives up, and torchrun restarts all

    def validate(self) -> list[str]:
        return failed_rules(self, ("timeout_s", self.timeout_s > 0, "positive"),
                            ("shard_size", self.shard_size >= 0, "0 or more"))

    def ranks_per_copy(self, world_size: int, local_world_size: int) -> int:
        """How many ranks hold one copy of the model together."""
        return {"ddp": 1, "fsdp": world_size, "hsdp": self.shard_size or local_world_size}[self.parallel]

    def conflicts(self, given: Collection[str]) -> list[str]:
        """Which of the given keys do nothing in this layout."""
        users = {"shard_size": ("hsdp",), "reshard_after_forward": ("fsdp", "hsdp"),
                 "reduce_every_micro_batch": ("fsdp", "hsdp")}
        return [f"{key}={getattr(self, key)} does nothing with parallel={self.parallel}: leave it out, or use "
                f"--parallel={' or '.join(layouts)}" for key, layouts in users.items()
                if key in given and self.parallel not in layouts]


@dataclass
class Job(Layout):
    """This process's place among the ranks, and the groups in which they talk."""

    shard_group: dist.ProcessGroup | None = None  # the ranks of this one's copy; None where each has a whole one
    replica_group: dist.ProcessGroup | None = None  # the ranks that hold the same part; None where there is one copy
    cpu_group: dist.ProcessGroup | None = None  # for plain Python between the ranks, with patience for slow disks
    hosts: tuple[str, ...] = ()  # of each rank, "east (10.0.0.1)": its host's name, and where gloo listens there

    def name(self, rank: int) -> str:
        """A rank in words, with its host where there are several."""
        return f"rank {rank} on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else f"rank {rank}"

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Raises ValueError where the layout does not go with it."""
        if self.parallel != "ddp" and dtype == torch.float16:
            raise ValueError(f"dtype=float16 does not work with parallel={self.parallel}, which has no loss scaler "
                             "here: use --dtype=bfloat16 or float32")
        self.dtype = dtype


@contextlib.contextmanager
def init_job(config: DeviceConfig, parallel: ParallelConfig | None = None, alone: bool = False) -> Iterator[Job]:
    """Join the process group of the launcher's ranks, where there are several, and leave it at the end; `alone`: this
    process has nobody to join, whatever the environment says. Raises ValueError."""
    parallel = parallel or ParallelConfig()
    rank, world_size, local_rank, local_world_size = launcher.Ranks() if alone else launcher.ranks()
    device = pick_device(config.device, local_rank)
    job = Job(rank, world_size, device, pick_dtype(config.dtype, device), parallel.parallel,
              parallel.ranks_per_copy(world_size, local_world_size), parallel.reshard_after_forward,
              parallel.reduce_every_micro_batch)
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
        _join_groups(job, None)
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
            _join_groups(job, timeout)
        try:
            yield job
        finally:
            job.cpu_group = None
            # Gloo's threads may still hold Python objects of their last work, and need the interpreter's lock to drop
            # them. The closing of a group keeps it while it waits for them, and a Python that ends aborts on them.
            time.sleep(0.1)
    # Not after an error: the others may be waiting for us, closing the groups would wait for them, our end wakes them.
    dist.destroy_process_group()


def _join_groups(job: Job, timeout: datetime.timedelta | None) -> None:
    """Set the job's groups. Raises ValueError on every rank where its ranks do not fall into groups of shard_size."""
    check_agreement({"parallel": job.parallel, "shard_size": job.shard_size}, job)  # by default each node has its own
    if job.world_size % job.shard_size:
        sizes = [str(n) for n in range(1, job.world_size + 1) if job.world_size % n == 0]
        raise ValueError(f"shard_size={job.shard_size} does not divide the {job.world_size} processes: it can be "
                         f"{', '.join(sizes)}")
    if 1 < job.shard_size < job.world_size:
        places = torch.arange(job.world_size).view(-1, job.shard_size)  # (replica, shard) -> rank
        job.shard_group, _ = dist.new_subgroups_by_enumeration(places.tolist(), timeout)
        job.replica_group, _ = dist.new_subgroups_by_enumeration(places.T.tolist(), timeout)
    elif job.world_size > 1:
        job.shard_group = dist.group.WORLD if job.shard_size > 1 else None
        job.replica_group = dist.group.WORLD if job.shard_size == 1 else None


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


def all_to_all(flat: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None
               ) -> torch.Tensor:
    """Send the first send[0] elements of a flat tensor to the first rank of the group, the next send[1] to the second,
    and so on; what they send, receive[0] elements and so on, in that order. Without a group there is no other rank."""
    if group is None:
        return flat
    received = flat.new_empty(sum(receive))
    dist.all_to_all_single(received, flat, receive, send, group=group)
    return received


def all_gather(flat: torch.Tensor, counts: list[int], group: dist.ProcessGroup | None) -> torch.Tensor:
    """The flat tensors of the group's ranks, of counts[0] elements and so on, one behind the other. A zero may
    lose its sign."""
    if group is None:
        return flat
    if len(counts) * max(counts) > 2 * sum(counts):  # many ranks have little: a sum with zeros takes less than padding
        total, start = flat.new_zeros(sum(counts)), sum(counts[:dist.get_rank(group)])
        total[start:start + len(flat)] = flat
        dist.all_reduce(total, group=group)
        return total
    parts = list(flat.new_empty(len(counts), max(counts)))  # of one length, as gloo wants them
    dist.all_gather(parts, torch.nn.functional.pad(flat, (0, max(counts) - len(flat))), group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


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


def kept_on_rank0(do: Callable[[], T], job: Job) -> T | None:
    """As `on_rank0`, for a value that is not sent to the other ranks: they get None."""
    made: list[T] = []
    on_rank0(lambda: made.append(do()), job)
    return made[0] if made else None
