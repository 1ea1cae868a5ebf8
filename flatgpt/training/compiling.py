"""torch.compile of a model's parts, in place, on all ranks or on none."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn as nn

from flatgpt.files import one_line
from flatgpt.training.distributed import Job, gather
from flatgpt.training.parallel import stand_in, try_pass


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
        try_pass(trial, trial, job, batch_size)
    except torch.OutOfMemoryError:  # no fault of the compiler's
        raise
    except Exception as error:  # whatever the compiler trips over: training without it is better than none
        failure = one_line(getattr(error, "inner_exception", error))  # of dynamo's own, what its backend raised
    return next((f for f in gather(failure, job) if f), None)


def compile_in_place(model: nn.Module, **options: Any) -> None:
    if torch.are_deterministic_algorithms_enabled():
        # Kernels that are chosen by their speed differ between runs. (An environment variable would come too late
        # where torch's compiler is imported already.)
        options["options"] = {"deterministic": True}
    for part in model.compiled_parts():
        part.compile(**options)
    model.is_compiled = True


def eager(model: nn.Module) -> contextlib.AbstractContextManager:
    """Within this context the model runs uncompiled; torch.compile would compile again for each new length."""
    return torch.compiler.set_stance("force_eager") if model.is_compiled else contextlib.nullcontext()
