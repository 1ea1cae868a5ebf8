"""What the time of a few training steps goes to: a trace of torch's profiler, on CUDA a snapshot of the memory, and the
most expensive things in words.

Owns --profile. Rank 0 alone is profiled, a few steps after a start, when kernels are loaded and memory is found. The
profiler only looks on: the run trains the same bytes with it. It slows the steps that it sees, whose speed is not
reported; evaluations and saves among them are in the trace but not in the words.

A product (a, b) x (b, c) is told to belong to the MLP, say, by its sizes. A matrix of the MLP is b x c where it is
multiplied by vectors or their gradients, and a x c where its own gradient is summed over b tokens.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from flatgpt.files import one_line
from flatgpt.training.distributed import Job
from flatgpt.training.metrics import EXCLUDED, LogConfig, Reporter

SKIPPED_STEPS = 2  # after a start; the third is the one in which torch's profiler warms up
NUM_SHOWN = 5
Sizes = tuple[int, int]  # of a matrix, the smaller one first
MAX_MEMORY_EVENTS = 200_000  # of the allocator, in a snapshot
BACKWARD = "autograd::engine::evaluate_function"  # how the engine calls a node of the backward pass
STEP = "ProfilerStep"  # how torch's profiler calls a step; its own time is what no operator within it took
PRODUCT = re.compile(r"aten::(addmm|mm|bmm|baddbmm|matmul|linear|_addmm_activation)$|gemm|mkldnn.*linear")
WORDS = (  # pattern of an operator's name, or of one that it is called in -> what it does; the first that fits counts
    (r"Optimizer\.step|adamw?_|orthogonal", "the optimiser's update"),
    (r"Optimizer\.zero_grad|aten::zero_|aten::fill_|_foreach_zero_", "filling memory with zeros"),
    (r"LinearCrossEntropy|nll_loss|cross_entropy", "the head and the loss"),
    (r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_scatter|broadcast", "communication between the ranks"),
    (r"scaled_dot_product|flash|efficient_attention|cudnn_attention|flex_attention", "attention"),
    (r"(layer|rms|native_layer)_norm", "norms"),
    (r"gelu|relu|silu|swiglu", "the activation function"),
    (r"lstm|gru|rnn_tanh", "the recurrent layers"),
    (r"embedding|index_select", "looking up tokens and positions"),
    (r"dropout|bernoulli", "dropout"),
    (r"softmax", "softmax"),
    (r"aten::(item|_local_scalar_dense)|cuda(Device|Stream|Event)Synchronize", "waiting for the device"),
    (r"_foreach_norm|linalg_vector_norm|clip_grad", "the norm of the gradients"),
    (r"aten::(copy_|_to_copy|to|contiguous|clone|cat|stack)", "copies of tensors, also to another number type"),
    (r"triton_|Torch-Compiled|CompiledFunction", "fused kernels of torch.compile"),
    (r"aten::(add|sub|mul|div|pow|sum|mean|sqrt|neg|exp|where|masked_fill|_foreach_)", "arithmetic, number by number"),
    (STEP, "Python, between the operators"))


class Profiler:
    """Profiles so many steps as `config` says of those that a run makes after `step`, or as many as there are; on ranks
    other than 0, nothing. The files go to `folder`."""

    def __init__(self, folder: Path, config: LogConfig, step: int, model: nn.Module, report: Reporter, job: Job):
        self._folder, self._report, self._job = folder, report, job
        self._first, self._num_calls = step + SKIPPED_STEPS + 2, 0  # the number of the first step that is profiled
        self._num_steps = min(config.profile, report.max_iters - self._first + 1)
        self._matrices = matrices_of(model)
        self._profile: profile | None = None
        if config.profile and self._num_steps <= 0:
            report.log(f"profile={config.profile}: nothing is profiled, since that begins with step {self._first:,}, "
                       f"and max_iters={report.max_iters}")
        elif config.profile and job.rank == 0:
            on_cuda = job.device.type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
            self._profile = profile(activities=activities, record_shapes=True, on_trace_ready=self._write,
                                    schedule=schedule(skip_first=SKIPPED_STEPS, wait=0, warmup=1,
                                                      active=self._num_steps, repeat=1))

    def __enter__(self) -> Profiler:
        self._guarded(lambda: self._profile.start())
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self._finish()

    def step(self) -> None:
        """A step is over, and was reported."""
        if self._profile is None:
            return
        self._num_calls += 1
        if self._num_calls == SKIPPED_STEPS:
            self._guarded(self._record_memory)
        with self._report.excluded():  # the last call writes the trace
            self._guarded(lambda: self._profile.step())
        if self._num_calls == SKIPPED_STEPS + 1 + self._num_steps:
            self._finish()
        elif self._num_calls >= SKIPPED_STEPS:
            self._report.slowed()

    def _finish(self) -> None:
        self._guarded(lambda: self._profile.stop())
        self._close()

    def _close(self) -> None:
        if self._profile is not None and self._job.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None

    def _guarded(self, do: Any) -> None:
        """A profiler that fails, for a driver's sake or a full disk's, ends no run."""
        if self._profile is None:
            return
        try:
            do()
        except (OSError, RuntimeError) as error:
            self._close()
            self._report.log(f"warning: profiling failed ({one_line(error)}); going on without it")

    def _record_memory(self) -> None:
        if self._job.device.type == "cuda":
            # Private by name, as its counterparts in _close and _write, but what torch's documentation of memory
            # snapshots tells to call; there is no public name.
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)

    def _write(self, recorded: profile) -> None:
        """Write the files, and say what took the time. A trace opens in ui.perfetto.dev or chrome://tracing."""
        num_steps = min(self._num_steps, max(0, self._num_calls - SKIPPED_STEPS - 1))
        steps = f"step_{self._first:08d}"
        written = [self._write_file(f"profile_{steps}.json.gz", recorded.export_chrome_trace)]
        if self._job.device.type == "cuda":
            written.append(self._write_file(f"memory_{steps}.pickle", torch.cuda.memory._dump_snapshot))
        lines = describe(recorded.events(), self._matrices, self._job.device.type == "cuda")
        self._report.log(f"profiled {num_steps} steps from step {self._first:,} on; what took the most time:")
        for line in lines:
            self._report.log(f"  {line}")
        self._report.log(f"  {' and '.join(written)}: for ui.perfetto.dev"
                         + (" and pytorch.org/memory_viz" if len(written) > 1 else ""))

    def _write_file(self, name: str, write: Callable[[str], Any]) -> str:
        """Whole or not at all; returns its path."""
        path = self._folder / name
        hidden = path.with_name(f".{name}")
        try:
            write(str(hidden))
            os.replace(hidden, path)
        finally:
            hidden.unlink(missing_ok=True)
        return str(path)


def matrices_of(model: nn.Module) -> dict[Sizes, str]:
    """Sizes of the model's matrices -> what they belong to; several parts where sizes are the same."""
    found: dict[Sizes, dict[str, None]] = defaultdict(dict)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            owner = ("the head" if "wte" in name or "lm_head" in name or "table" in name else
                     "attention" if ".attn." in name else "the MLP" if "c_fc" in name or "c_proj" in name else
                     "the recurrent layers" if "layers." in name else "")
            if owner:
                found[sizes_of(*p.shape)][owner] = None
    return {sizes: " or ".join(owners) for sizes, owners in found.items()}


def sizes_of(rows: int, columns: int) -> Sizes:
    """Of a matrix, transposed or not."""
    return min(rows, columns), max(rows, columns)


def describe(events: Iterable[Any], matrices: dict[Sizes, str], on_cuda: bool) -> list[str]:
    """The NUM_SHOWN things that took the most time, a line each, with their shares and operators: `31% matrix products
    of the MLP, backward (aten::mm)`. The time is the device's on CUDA, else the processor's."""
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        callers = list(callers_of(event))
        time_us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if event.device_type == DeviceType.CPU and time_us > 0 and not any(c.name == EXCLUDED for c in callers):
            spent[words_for(event, callers, matrices)][event.name] += time_us
    total = sum(sum(operators.values()) for operators in spent.values())
    dearest = sorted(spent.items(), key=lambda item: -sum(item[1].values()))[:NUM_SHOWN]
    return [f"{sum(operators.values()) / total:.0%} {words} ({', '.join(most(operators))})"
            for words, operators in dearest]


def callers_of(event: Any) -> Iterator[Any]:
    """An event, the one that called it, and so on."""
    while event is not None:
        yield event
        event = event.cpu_parent


def words_for(event: Any, callers: list[Any], matrices: dict[Sizes, str]) -> str:
    """What an operator does, in words; its own name where there are none for it."""
    names = [event.name, *(caller.name for caller in callers[1:] if not caller.name.startswith(STEP))]
    words = next((words for name in names for pattern, words in WORDS if re.search(pattern, name)), event.name)
    if re.search("Optimizer", " ".join(names)):
        return WORDS[0][1]
    if PRODUCT.search(event.name) and words != "the head and the loss":
        words = f"matrix products of {owner_of([*filter(None, event.input_shapes or ())], matrices)}"
    if words in ("Python, between the operators", "the optimiser's update", "the norm of the gradients"):
        return words
    return f"{words}, {'backward' if any(name.startswith(BACKWARD) for name in names) else 'forward'}"


def owner_of(shapes: list[list[int]], matrices: dict[Sizes, str]) -> str:
    """The part of the model that multiplies operands of these shapes."""
    if any(len(shape) > 2 for shape in shapes):
        return "attention"  # of queries and keys, or of weights and values: the only ones in batches
    shapes = [shape for shape in shapes if len(shape) == 2][-2:]
    if len(shapes) < 2:
        return "other parts"
    (rows, inner), (_, columns) = shapes
    return matrices.get(sizes_of(inner, columns)) or matrices.get(sizes_of(rows, columns)) or "other parts"


def most(operators: dict[str, float], count: int = 3) -> list[str]:
    """The names of those that took the most time."""
    return sorted(operators, key=lambda name: -operators[name])[:count]
