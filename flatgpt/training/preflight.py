"""What a run will need, printed before its first step: tokens, memory, disk, links between ranks; and what will fail.

The estimates count what grows with the model and the batch, and are meant to be right within a few tens of percent:
enough to see on the first screen that a run cannot end well.
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
from flatgpt.models import fused
from flatgpt.training import compiling, distributed, parallel
from flatgpt.training.checkpoint import RunFolder
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, schedule_warnings
from model import LanguageModel

ROOM = 0.95  # of a GPU's memory, for tensors
HEAP = 1.5  # on a CPU, what a micro-batch takes of the heap, its holes included, to what of it is in use
FIRST_STEP_BYTES = 60_000_000  # that torch's libraries take when they are first used


def report(model: LanguageModel, plan: BatchPlan, epochs: str, run: RunFolder, eval_interval: int, max_iters: int,
           optim: OptimConfig, job: Job) -> Iterator[str]:
    """Lines for people, those that begin with "warning:" about what will fail; every rank has to take part."""
    num_params, block_size = model.num_params(non_embedding=False), model.config.block_size
    groups = f" with shard_size={job.shard_size}" if job.parallel == "hsdp" else ""
    how = f", {job.parallel}{groups}" if job.world_size > 1 else ""
    yield f"{num_params:,} parameters, {job.dtype} on {job.world_size} x {job.device.type}{how}"
    yield (f"{plan.seqs_per_step * block_size:,} tokens a step = {plan.accumulation_steps} micro-batches x "
           f"{plan.micro_batch} sequences x {block_size} tokens x {job.world_size} ranks; an epoch {epochs}")

    parts, room = memory_parts(model, plan, job), memory_room(job)
    yield (f"memory a process: about {size(sum(parts.values()))} of {room / 1e9:,.1f} GB ("
           + ", ".join(f"{part} {size(num_bytes)}" for part, num_bytes in parts.items()) + ")")
    if sum(parts.values()) > room:
        yield ("warning: that will not fit: lower --batch_size, or try --activation_checkpointing=True or "
               "--parallel=fsdp")

    checkpoint, free = 12 * num_params, free_bytes(run.path)  # float32 weights, AdamW's two means (Muon has one)
    copy = copy_bytes(num_params, job.device)
    save_interval = run.config.save_interval or eval_interval
    kept = checkpoints_kept(run, save_interval, max_iters)
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


def fit_batch_size(model: LanguageModel, seqs_per_rank: int, job: Job, compile: str = "False") -> int:
    """The largest micro-batch that every rank's device takes: a divisor of `seqs_per_rank`. Raises ValueError.

    On a GPU it is tried, by a stand-in for the model, compiled if `compile` says so (see compiling.compile_parts);
    elsewhere, where a trial that fails is the end of the process, it is reckoned."""
    on_gpu, largest = job.device.type == "cuda", 0
    fits = _gpu_trial(model, job, compile) if on_gpu else partial(_fits_host, model, job)
    for size in (n for n in range(1, seqs_per_rank + 1) if seqs_per_rank % n == 0):
        plan = BatchPlan(seqs_per_rank * job.world_size, size, seqs_per_rank // size, job.world_size)
        if not all(distributed.gather(fits(plan), job)):  # so that no rank goes on to a size alone
            break
        largest = size
    del fits  # and the stand-in with it: the trial is no part of the run
    if on_gpu:
        torch.compiler.reset()  # or what is trained would be compiled for all sizes, which is slower
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)
    if not largest:
        raise ValueError(f"not even one sequence of {model.config.block_size} tokens fits the memory of {job.device}: "
                         "lower --block_size, or try --activation_checkpointing=True or --parallel=fsdp")
    return largest


def _fits_host(model: LanguageModel, job: Job, plan: BatchPlan) -> bool:
    return sum(memory_parts(model, plan, job).values()) < 0.9 * memory_room(job)


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
    return lambda plan: _fits_gpu(trial, job, plan.micro_batch, state_bytes(model, plan, job) + casts - held)


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


def memory_parts(model: LanguageModel, plan: BatchPlan, job: Job) -> dict[str, float]:
    """What takes how many bytes of the device on one rank; on a CPU, all that lies in the host's memory."""
    parts = {"weights, gradients and the optimiser's means": state_bytes(model, plan, job),
             "a micro-batch": activation_bytes(model, plan.micro_batch, job)}
    if job.device.type != "cuda":
        parts["a micro-batch"] *= HEAP
        copy = copy_bytes(model.num_params(non_embedding=False), job.device)  # rank 0's
        parts["a checkpoint's copy"] = copy / launcher.ranks().local_world_size
        weights = sum(parallel.local(p).nbytes for p in model.parameters()) if job.device.type == "cpu" else 0
        parts["the program itself"] = max(0, resident_bytes() - weights) + FIRST_STEP_BYTES
    return parts


def copy_bytes(num_params: int, device: torch.device) -> int:
    """Of host memory that rank 0's copy for a checkpoint takes, float32: weights, two means, and the weights once more
    as Hugging Face has them. What a GPU copies to is pinned, which torch hands out in powers of two."""
    copies = [4 * num_params, 8 * num_params]
    if device.type == "cuda":
        copies = [1 << (num_bytes - 1).bit_length() for num_bytes in copies]
    return sum(copies) + 4 * num_params


def state_bytes(model: LanguageModel, plan: BatchPlan, job: Job) -> int:
    """Of weights, gradients and AdamW's two means, in float32, on one rank. Muon, which keeps one mean of its matrices,
    takes up to a quarter less."""
    count = sum(p.numel() for p in model.parameters())
    if job.shard_size == 1:
        return 16 * count
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.h]
    # Weights and gradients at a time: of a block, and of all that is in none.
    gathered = 8 * (max(blocks, default=0) + count - sum(blocks))
    if not job.reshard_after_forward:
        gathered += job.dtype.itemsize * (sum(blocks) - max(blocks, default=0))
    # Whole gradients, until the last micro-batch.
    unsynced = 4 * count if plan.accumulation_steps > 1 and not job.reduce_every_micro_batch else 0
    return 16 * count // job.shard_size + gathered + unsynced


def activation_bytes(model: LanguageModel, micro_batch: int, job: Job) -> int:
    """Bytes that a micro-batch keeps for its backward pass, and of the largest chunk of logits."""
    c = model.config
    rows = micro_batch * c.block_size
    if not model.h:
        return _activation_bytes_without_blocks(model, rows, job)
    # A block keeps the inputs of both norms (float32), and in the type of the products 2 C values a position (both
    # norms' outputs), 5 H D (q, k and v, attention's output twice) and the MLP's hidden layer before its activation.
    heads, hidden = 5 * c.n_head * c.head_size, c.hidden * (2 if c.mlp == "swiglu" else 1)
    block = rows * (2 * 4 * c.n_embd + (2 * c.n_embd + heads + hidden) * (4 if job.dtype == torch.float32 else 2))
    blocks = c.n_layer * block
    if model.activation_checkpointing:
        blocks = c.n_layer * rows * c.n_embd * 4 + block
    last_norm = rows * c.n_embd * 2 * 4
    return blocks + last_norm + _mask_bytes(model, micro_batch, job) + _head_bytes(model, rows, job)


def _mask_bytes(model: LanguageModel, micro_batch: int, job: Job) -> int:
    """Of what says which keys a query sees, as truth values twice and as numbers, where they are needed."""
    c = model.config
    with job.autocast():
        has_rows = model.keeps_within_documents and not model.has_varlen_kernel()
    if not has_rows and c.pos != "alibi":
        return 0
    return (2 + 4) * c.block_size**2 * (micro_batch if has_rows else 1) * (c.n_head if c.pos == "alibi" else 1)


def _activation_bytes_without_blocks(model: LanguageModel, rows: int, job: Job) -> int:
    """The same of a model of baselines.py, in float32: that 16-bit products take less is not counted."""
    c = model.config
    if c.model == "bigram":  # its logits, those of the vocabulary alone, and their softmax
        return 4 * rows * 3 * c.padded_vocab_size
    if c.model == "mlp":  # the window, the hidden layer before and after its activation, what the head reads
        kept = (c.window + 1) * c.n_embd + (3 if c.mlp == "swiglu" else 2) * c.hidden
    else:  # so many C a layer are kept on a CPU, cuDNN keeps fewer; the vectors, the norm's input and output
        kept = ({"rnn": 2, "gru": 8, "lstm": 16}[c.model] * c.n_layer + 3) * c.n_embd
    return 4 * rows * kept + _head_bytes(model, rows, job)


def _head_bytes(model: LanguageModel, rows: int, job: Job) -> int:
    """Bytes of the head's gradient, and of the logits that exist at a time."""
    chunk = fused.LOGITS_CHUNK_BYTES_CUDA if job.device.type == "cuda" else fused.LOGITS_CHUNK_BYTES
    # On a GPU their copy in float32, which compiled code does not make.
    softmax = 4 * fused.SOFTMAX_ELEMENTS if job.device.type == "cpu" else 2 * chunk
    return 4 * model.head.numel() + min(chunk + softmax, 8 * rows * model.config.padded_vocab_size)


def checkpoints_kept(run: RunFolder, save_interval: int, max_iters: int) -> int:
    """The most that lie in the run folder at a time, with the best one and the one that is being written."""
    saves = max_iters // save_interval + 1
    nth = max_iters // run.config.keep_every if run.config.keep_every else 0
    return min(saves, run.config.keep_last + nth + 2) if run.config.keep_last else saves


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that exists or will be made."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def size(num_bytes: float) -> str:
    """1.5 GB, 23 MB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
