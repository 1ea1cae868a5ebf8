"""The peak of a training step by torch's own tracker of tensors, and by the forecast, on a CPU or on fake CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from torch.distributed._tools.mem_tracker import MemTracker

from flatgpt.data.loader import BatchPlan
from flatgpt.planning import memory
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, build_optimizer
from model import GPT, GPTConfig


def train_step(model: GPT, optimizer: torch.optim.Optimizer, micro_batch: int, steps: int, job: Job,
               begin: Callable[[], None] = lambda: None) -> None:
    """A step as train.py makes it, over zeros."""
    tokens = torch.zeros(micro_batch, model.config.block_size, dtype=torch.long, device=job.device)
    documents = (tokens.int(), 16) if model.keeps_within_documents else ()
    for _ in range(steps):
        begin()
        with job.autocast():
            _, loss = model(tokens, tokens, torch.ones((), dtype=torch.long, device=job.device), *documents)
        loss.backward()
        del loss
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.zero_grad()


def peak_and_forecast(device: str, dtype: torch.dtype, micro_batch: int, steps: int = 1, optimizer: str = "adamw",
                      checkpointing: bool = False, documents: str = "stream", **shape) -> tuple[int, float]:
    """Bytes of the tensors of the second step, which finds the optimiser's means."""
    job = Job(0, 1, torch.device(device), dtype)
    with job.device:
        model = GPT(GPTConfig(**shape))
    model.activation_checkpointing = checkpointing
    model.set_documents(documents)
    stepper = build_optimizer(model, OptimConfig(optimizer=optimizer), job)
    train_step(model, stepper, micro_batch, steps, job)
    tracker = MemTracker()
    tracker.track_external(model, stepper)
    with tracker:
        train_step(model, stepper, micro_batch, steps, job, tracker.reset_mod_stats)
    peak = tracker.get_tracker_snapshot("peak")[job.device]["Total"]
    moments = memory._moments(model, BatchPlan(micro_batch * steps, micro_batch, steps, 1), job, optimizer)
    weights = 4 * sum(p.numel() for p in model.parameters())
    return peak, weights + memory.optimizer_bytes(model, optimizer) + max(sum(parts.values()) for parts in moments)
