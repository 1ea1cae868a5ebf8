"""What a run will need, printed before its first step: tokens, memory, disk, links between ranks; and what will fail.

The forecast of memory is planning/memory.py's, as plan.py prints it; here it meets what there is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from flatgpt import launcher
from flatgpt.data.loader import BatchPlan, empty_batch
from flatgpt.machine import free_memory_bytes, memory_bytes, resident_bytes
from flatgpt.planning import memory
from flatgpt.planning.memory import ROOM
from flatgpt.planning.summary import size
from flatgpt.training import compiling, distributed, parallel
from flatgpt.training.checkpoint import RunFolder
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, schedule_warnings
from model import LanguageModel


def report(model: LanguageModel, plan: BatchPlan, epochs: str, run: RunFolder, eval_interval: int, max_iters: int,
           optim: OptimConfig, job: Job) -> Iterator[str]:
    """Lines for people, those that begin with "warning:" about what will fail; every rank has to take part."""
    num_params, block_size = model.num_params(non_embedding=False), model.config.block_size
    groups = f" with shard_size={job.shard_size}" if job.parallel == "hsdp" else ""
    layout = f", {job.parallel}{groups}" if job.world_size > 1 else ""
    yield f"{num_params:,} parameters, {job.dtype} on {job.world_size} x {job.device.type}{layout}"
    yield (f"{plan.seqs_per_step * block_size:,} tokens a step = {plan.accumulation_steps} micro-batches x "
           f"{plan.micro_batch} sequences x {block_size} tokens x {job.world_size} ranks; an epoch {epochs}")

    parts, room = memory_parts(model, plan, optim.optimizer, job), memory_room(job)
    yield (f"memory a process: about {size(sum(parts.values()))} of {room / 1e9:,.1f} GB ("
           + ", ".join(f"{part} {size(num_bytes)}" for part, num_bytes in parts.items()) + ")")
    if sum(parts.values()) > ROOM * room:
        yield ("warning: that will not fit: lower --batch_size, or try --activation_checkpointing=True or "
               "--parallel=fsdp")

    checkpoint, free = memory.checkpoint_bytes(model, optim.optimizer), free_bytes(run.path)
    copy = memory.copy_bytes(model, job.device, optim.optimizer)
    save_interval = run.config.save_interval or eval_interval
    kept = memory.checkpoints_kept(run.config.keep_last, run.config.keep_every, save_interval, max_iters)
    yield (f"saving: {size(checkpoint)} a checkpoint, copied to host memory first ({size(copy)} there); at most {kept} "
           f"kept on the disk, {size(free)} free for {run.path}")
    yield from (f"warning: {line}" for line in schedule_warnings(optim, max_iters))
    if run.config.keep_every % save_interval:
        yield (f"warning: keep_every={run.config.keep_every} keeps only steps that are saved, and the run saves every "
               f"{save_interval} steps: set a multiple of that")
    if copy > free_memory_bytes():
        yield "warning: the host's memory will not hold the copy that is saved: use a machine with more memory"
    if checkpoint * (kept - len(run.steps())) > free:
        yield "warning: the disk will be full before the end: lower --keep_last, or choose another --out_dir"
    if job.world_size > 1:
        speed = distributed.bandwidth(job, min(4 * num_params, 100_000_000))
        yield f"all-reduce: {size(speed)}/s from each of {job.world_size} ranks"
    if launcher.may_restart() and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        yield ("warning: torchrun's restarts can hang on stale addresses: start it with "
               "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment")


def fit_batch_size(model: LanguageModel, seqs_per_rank: int, job: Job, compile: str = "False",
                   optimizer: str = "adamw") -> int:
    """The largest micro-batch that every rank's device takes: a divisor of `seqs_per_rank`. Raises ValueError.

    On a GPU it is tried, by a stand-in for the model, compiled if `compile` says so (see compiling.compile_parts);
    elsewhere, where a trial that fails is the end of the process, it is reckoned."""
    on_gpu = job.device.type == "cuda"
    fits = _gpu_trial(model, job, compile) if on_gpu else partial(_fits_host, model, job, optimizer)
    largest = memory.largest_micro_batch(  # for all, so that no rank goes on to a size alone
        seqs_per_rank, job.world_size, lambda plan, fits=fits: all(distributed.gather(fits(plan), job)))
    del fits  # and the stand-in with it: the trial is no part of the run
    if on_gpu:
        torch.compiler.reset()  # or what is trained would be compiled for all sizes, which is slower
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)
    if not largest:
        raise ValueError(f"not even one sequence of {model.config.block_size} tokens fits the memory of {job.device}: "
                         "lower --block_size, or try --activation_checkpointing=True or --parallel=fsdp")
    return largest


def _fits_host(model: LanguageModel, job: Job, optimizer: str, plan: BatchPlan) -> bool:
    return sum(memory_parts(model, plan, optimizer, job).values()) <= ROOM * memory_room(job)


def _gpu_trial(model: LanguageModel, job: Job, compile: str) -> Callable[[BatchPlan], bool]:
    """A function that tells whether this rank's GPU takes a plan's micro-batch: a stand-in makes two passes over one,
    beside a tensor as large as all else that training holds. No rank waits for another in there."""
    is_compiled = compiling.wants_compiler(compile, job) and compiling.try_compiler(model, job, 1) is None
    trial = parallel.stand_in(model, replace(job, shard_size=1))  # whole on each rank
    block, num_blocks = sum(p.numel() for p in trial.h.parameters()), len(model.h)
    trial.h = nn.ModuleList([*trial.h] * num_blocks)  # what counts is what each of them keeps of a batch
    if is_compiled:
        compiling.compile_in_place(trial, dynamic=True)  # once for all sizes
    held = sum(parallel.local(p).nbytes for p in model.parameters()) + 8 * sum(p.numel() for p in trial.parameters())
    # Autocast's 16-bit weights of the blocks that are not there; FSDP frees them block by block.
    casts = 0 if job.shard_size > 1 or job.dtype == torch.float32 else 2 * block * max(0, num_blocks - 1)
    return lambda plan: _fits_gpu(trial, job, plan.micro_batch, memory.state_bytes(model, plan, job) + casts - held)


def _fits_gpu(trial: LanguageModel, job: Job, micro_batch: int, num_bytes: int) -> bool:
    """Whether two passes fit beside `num_bytes`, all within ROOM of the memory. The rest is for what is no tensor:
    kernels, which are loaded when they are first used, would fail there with other errors than an OutOfMemoryError."""
    torch.cuda.empty_cache()  # else what a smaller size has left would count
    allowed = torch.cuda.get_per_process_memory_fraction(job.device)
    torch.cuda.set_per_process_memory_fraction(min(ROOM, allowed), job.device)
    try:
        others = torch.empty(max(0, num_bytes), dtype=torch.uint8, device=job.device)
        x, y, *documents = empty_batch(micro_batch, trial.config.block_size, trial.keeps_within_documents, job.device)
        for _ in range(2):  # the second time beside gradients
            with job.autocast():
                _, loss = trial(x, y, None, *documents)
            loss.backward()
        del others
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        trial.zero_grad(set_to_none=True)
        torch.cuda.set_per_process_memory_fraction(allowed, job.device)


def memory_room(job: Job) -> float:
    """Bytes that a rank may use: of its GPU, else what it holds and its share of what is free on the host."""
    if job.device.type == "cuda":
        return torch.cuda.get_device_properties(job.device).total_memory
    processes = launcher.ranks().local_world_size
    return min(memory_bytes(), free_memory_bytes() + processes * resident_bytes()) / processes


def memory_parts(model: LanguageModel, plan: BatchPlan, optimizer: str, job: Job) -> dict[str, float]:
    """memory.forecast for this process. On a CPU what it holds is the program and the weights, which are made."""
    weights = sum(parallel.local(p).nbytes for p in model.parameters()) if job.device.type == "cpu" else 0
    return memory.forecast(model, plan, job, optimizer, max(0, resident_bytes() - weights))


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that exists or will be made."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free

