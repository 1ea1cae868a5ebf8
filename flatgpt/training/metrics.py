"""What a run reports: console lines or a progress line, metrics.jsonl, validation loss, throughput, MFU.

Owns every number that leaves a run; trackers.py hands them on to wandb and TensorBoard, with the scores that another
process finds for the run's checkpoints (evals.jsonl). Only rank 0 reports; the other
ranks hold a Reporter that says nothing, so that train.py needs no `if` for it. metrics.jsonl has one JSON object a
line, with `step` = updates made; a resume cuts what was written after its checkpoint and adds a line that says
`resumed`, as a stop adds one that says `stopped`, so that but for those the file reads as if the run had never been
interrupted. A rollback leaves, of the lines past its step, what they tell of events (skipped steps above all): those
have happened, while the losses of these steps are yet to come.

Throughput counts training only: the time spent within `excluded()` (evaluation, samples, saving) is left out of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from tqdm import tqdm

from flatgpt import machine
from flatgpt.data.loader import Mixture, batch_to_device, pin_batch, prefetch
from flatgpt.data.order import Batch, EvalOrder
from flatgpt.options import failed_rules
from flatgpt.planning.flops import flops_per_token
from flatgpt.planning.hardware import find_accelerator
from flatgpt.run_folder import EVALS, EVENTS, read_records, write_records
from flatgpt.training import trackers
from flatgpt.training.distributed import Job, sum_over_ranks
from flatgpt.training.parallel import reshard
from flatgpt.training.terminal import ProgressLine
from model import LanguageModel

EXCLUDED = "evaluation, samples or saving"  # what a profiler's trace calls the time that counts as no training


@dataclass
class LogConfig:
    """Logging"""

    log_interval: int = 1  # steps between reports of the training loss
    wandb_log: bool = False  # report to Weights & Biases as well
    wandb_project: str = "owt"  # Weights & Biases project
    wandb_run_name: str = "gpt2"  # name of the run in Weights & Biases
    tensorboard: bool = False  # write event files for TensorBoard to out_dir/tensorboard as well
    sample_interval: int = 0  # steps between text samples from the model; 0 = never
    sample_tokens: int = 100  # tokens in each sample
    sample_prompts: Annotated[str, "path"] = ""  # file with a prompt a line: continue each at every evaluation
    profile: int = 0  # so many steps, soon after the start: what takes their time, and a trace in out_dir; 0 = off

    def validate(self) -> list[str]:
        return failed_rules(self, ("log_interval", self.log_interval > 0, "positive"),
                            ("sample_interval", self.sample_interval >= 0, "0 or more"),
                            ("sample_tokens", self.sample_tokens > 0, "positive"),
                            ("profile", 0 <= self.profile <= 100, "0 to 100: a trace holds every operator"))


def peak_flops(device: torch.device) -> float | None:
    """The peak floating-point operations per second of one device; None when it is not listed."""
    accelerator = find_accelerator(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return accelerator.flops if accelerator else None


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: of the GPU where there is one, else of the machine. In 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@torch.no_grad()
def validation_loss(model: LanguageModel, order: EvalOrder, batch_size: int, job: Job) -> float:
    """Mean loss over all targets of the order's windows, in nats; every rank takes a share and gets the same answer."""
    training = model.training
    model.eval()
    loss_sum, count = torch.zeros((), device=job.device), 0
    first, end = (len(order) * r // job.world_size for r in (job.rank, job.rank + 1))
    # As many batches on each rank, if need be of padding: FSDP's ranks run a model together.
    num_batches = math.ceil(math.ceil(len(order) / job.world_size) / batch_size)

    def load(start: int) -> tuple[Batch, int]:
        batch = order.batch(start, batch_size)
        y = batch.targets
        y[max(0, end - start):] = -1  # the next rank's; whole batches all the same, so compiled blocks meet one shape
        return pin_batch(batch, batch_size, job.device), int((y >= 0).sum())

    for batch, num_targets in prefetch(load, range(first, first + num_batches * batch_size, batch_size)):
        x, y, *documents = batch_to_device(batch, job.device)
        with job.autocast():
            loss_sum += model(x, y, 1, *documents)[1]
        count += num_targets
    reshard(model)
    model.train(training)
    loss_sum, count = sum_over_ranks(torch.stack([loss_sum, torch.full_like(loss_sum, count)]), job)
    return (loss_sum / count).item()


class Validation:
    """The validation losses of a run: of the same sample of the split each time, so that its checkpoints can be
    compared, and of the whole split."""

    def __init__(self, model: LanguageModel, data: Mixture, documents: str, num_seqs: int, num_tokens: int,
                 batch_size: int, job: Job):
        """`num_seqs` windows are the sample, spaced evenly; 0 means all. With `num_tokens` the split is cut behind its
        first so many targets, and read whole. A run with documents=pack is measured as one with mask: on the windows of
        a stream, in which attention stays within documents."""
        splits, self.extent = data.splits("val"), "the whole validation split"
        if num_tokens:
            self.extent = f"the first {num_tokens:,} tokens of the validation split"
            splits, num_seqs = {name: split.first(num_tokens) for name, split in splits.items()}, 0
        self._sample, self._whole = (
            {name: EvalOrder(split, model.config.block_size, count, eot_id=data.eot_id(documents))
             for name, split in splits.items()} for count in (num_seqs, 0))
        self.sample_is_whole = all(order.is_whole for order in self._sample.values())
        self._loss, self._shares = partial(validation_loss, model, batch_size=batch_size, job=job), data.shares

    def losses(self, whole: bool = False) -> dict[str, float]:
        """As metrics.jsonl has them: {"val/loss": loss}, in a mixture the mean weighted by the data sets' shares, with
        {"val/loss/NAME": loss} for each beside it."""
        losses = {name: self._loss(order) for name, order in (self._whole if whole else self._sample).items()}
        mean = sum(share * loss for share, loss in zip(self._shares, losses.values()))
        each = {f"val/loss/{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {}
        return {"val/loss": mean, **each}


def describe_losses(losses: Mapping[str, float]) -> str:
    """val loss 3.2000, or val loss 3.2000 (a 3.1000, b 3.4000) for a mixture."""
    prefix = "val/loss/"
    each = [f"{key.removeprefix(prefix)} {loss:.4f}" for key, loss in losses.items() if key.startswith(prefix)]
    return f"val loss {losses['val/loss']:.4f}" + (f" ({', '.join(each)})" if each else "")


class Reporter:
    """What rank 0 tells: `log` writes a line for people, `record` one of metrics.jsonl. Silent on the other ranks."""

    def __init__(self, folder: Path, config: LogConfig, job: Job):
        """Nothing is written to `folder` before `start`."""
        self._path, self._config, self._job = folder / "metrics.jsonl", config, job
        self._speaks = job.rank == 0
        self._is_missing_lines = False
        self._line: ProgressLine | None = None
        self._trackers = trackers.Trackers(self.log)
        self._scores = trackers.Scores(folder / EVALS)

    def start(self, model: LanguageModel, step: int, trainer: Mapping[str, Any], options: dict[str, Any],
              is_new: bool) -> None:
        """Begin to report at `step`, after the time of earlier work in `trainer`: cut what a killed run wrote past it,
        open the progress line (on a terminal), and wandb and TensorBoard if wanted, which get the `options`. A branch
        begins with a line that says from which run."""
        self.max_iters, parent = options["max_iters"], trainer["branched_from"]
        self._flops_per_token, self._peak_flops = flops_per_token(model), peak_flops(self._job.device)
        self._step, elapsed_s = step, trainer["elapsed_s"]
        self._began = time.perf_counter() - elapsed_s
        self._excluded_s, self._paused_at = 0.0, None
        self._excluded_before_s = elapsed_s - trainer.get("train_s", elapsed_s)  # older checkpoints do not say
        if self._speaks:
            self._scores.start(cut_metrics(self._path, 0 if parent else step))
            if sys.stderr.isatty() and sys.stdout.isatty():
                self._line = ProgressLine(self.max_iters, step)
            config, folder, facts = self._config, self._path.parent, options | {
                "parameters": model.num_params(non_embedding=False), "world_size": self._job.world_size}
            if config.wandb_log:
                self._trackers.add("wandb", lambda: trackers.Wandb(
                    folder, config.wandb_project, config.wandb_run_name, is_new, facts, self.log))
            if config.tensorboard:
                self._trackers.add("TensorBoard", lambda: trackers.TensorBoard(folder, step, facts))
        if step or parent:
            self.record({"step": step, **({"branched_from": parent} if parent else {"resumed": True}),
                         "next_seq": trainer["next_seq"], "elapsed_s": elapsed_s})
        self._restart_clock()

    def log(self, line: str) -> None:
        if self._speaks:
            tqdm.write(line)
            sys.stdout.flush()

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Time within this context does not count as training."""
        if self._job.device.type == "cuda":
            torch.cuda.synchronize(self._job.device)  # the steps that are still under way do count
        self._paused_at = time.perf_counter()
        with torch.profiler.record_function(EXCLUDED):
            yield
        self._excluded_s += time.perf_counter() - self._paused_at
        self._paused_at = None

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._began

    def times(self) -> dict[str, float]:
        """Seconds of the run: all, and those that count as training."""
        until = time.perf_counter() if self._paused_at is None else self._paused_at
        return {"elapsed_s": self.elapsed_s(),
                "train_s": until - self._began - self._excluded_before_s - self._excluded_s}

    def _restart_clock(self) -> None:
        self._excluded_before_s += self._excluded_s
        self._since, self._excluded_s, self._tokens_since = time.perf_counter(), 0.0, 0
        self._is_slowed = False

    def slowed(self) -> None:
        """The next step runs under a profiler: the speed up to the next report is not the run's, and is left out."""
        self._is_slowed = True

    def count(self, tokens: int) -> None:
        """Count a step over `tokens`, which the device may still be computing."""
        self._tokens_since += tokens
        if self._line is not None:
            self._line.advance()

    def train(self, step: int, tokens: int, loss: float, grad_norm: float, lr: float, batch_hash: int, skipped: int,
              fault: str) -> None:
        """Report the latest step, and the speed since the report before; the caller has waited for the device.

        `batch_hash` is of the windows that the step read; `fault` says why its update was skipped, if it was, and
        `skipped` how many were in the whole run."""
        if not self._speaks:
            return
        seconds = max(time.perf_counter() - self._since - self._excluded_s, 1e-9)
        ms_per_step = 1000 * seconds / (step - self._step)
        tokens_per_sec = None if self._is_slowed else self._tokens_since / seconds
        self._step = step
        self._restart_clock()
        mfu = None
        if self._peak_flops and tokens_per_sec is not None:
            mfu = self._flops_per_token * tokens_per_sec / (self._peak_flops * self._job.world_size)
        self.record({"step": step, "tokens": tokens, "train/loss": loss, "lr": lr, "grad_norm": grad_norm,
                     "tokens_per_sec": tokens_per_sec, "mfu": mfu, "memory_gb": peak_memory_gb(self._job.device),
                     "elapsed_s": self.elapsed_s(), "batch_hash": f"{batch_hash:016x}", "skipped": skipped}
                    | ({"fault": fault} if fault else {}))
        if fault:
            self.log(f"warning: step {step}: {fault}; its update was skipped ({skipped} so far)")
        elif self._line is not None:
            self._line.trained(loss, tokens_per_sec)
        else:
            speed = "profiled" if tokens_per_sec is None else (
                f"{tokens_per_sec:,.0f} tok/s, mfu {'unknown' if mfu is None else format(mfu, '.1%')}")
            self.log(f"step {step}/{self.max_iters}: loss {loss:.4f}, lr {lr:.2e}, norm {grad_norm:.2f}, "
                     f"{ms_per_step:.1f} ms, {speed}")

    def validation(self, step: int, tokens: int, losses: dict[str, float], sampled: dict[str, float] | None,
                   target: float | None) -> None:
        """Report the losses of an evaluation; when they are of the whole split, with those of the windows that earlier
        evaluations read beside them. `target`: they are the first at or below it."""
        if self._line is not None:
            self._line.validated(losses["val/loss"])
        line = describe_losses(losses)
        if sampled is not None:
            line = f"{describe_losses(sampled)} on a sample, {line} on the whole validation split"
            losses = losses | {"val/sampled_loss": sampled["val/loss"]}
        self.log(f"step {step}: {line}")
        self.record({"step": step, "tokens": tokens, **losses, "elapsed_s": self.elapsed_s()})
        if target is not None:
            self._reached(step, tokens, target)

    def _reached(self, step: int, tokens: int, target: float) -> None:
        device = self._job.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({machine.processor()})"
        where = f"{self._job.world_size} x {name}"
        times = self.times()
        self.log(f"step {step}: reached the target, a val loss of {target:g}, after {tokens:,} tokens and "
                 f"{times['train_s']:,.1f} s of training on {where}")
        self.record({"step": step, "tokens": tokens, "reached": target, "machine": where, **times})

    def samples(self, step: int, texts: list[str], prompts: list[str]) -> None:
        """Report what the model writes after `step` updates: texts, each with the prompt that it begins with, or ""."""
        for number, text in enumerate(texts, 1):
            self.log(f"step {step}: sample {number} of {len(texts)}\n{printable(text)}\n---------------")
        self.record({"step": step, "samples": texts, "elapsed_s": self.elapsed_s()}
                    | ({"prompts": prompts} if any(prompts) else {}))

    def rollback(self, step: int, rollbacks: int, skipped: int, next_seq: int) -> None:
        """The run goes on from an earlier `step`: of what was reported since only the events stay, with this one."""
        self.log(f"warning: too many bad steps in a row; going back to the checkpoint of step {step}, and on with the "
                 "data that follows")
        self._step = step
        if self._speaks:
            try:
                cut_to_events(self._path, step)
            except OSError as error:
                self._warn_unwritable(error)
            self._trackers.each(lambda tracker: tracker.go_back(step))
            self._scores.rewind()
        self.record({"step": step, "rollbacks": rollbacks, "skipped": skipped, "next_seq": next_seq,
                     "elapsed_s": self.elapsed_s()})
        if self._line is not None:
            self._line.go_back(step)
        self._restart_clock()

    def record(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and pass it on to wandb and TensorBoard where they are wanted."""
        if not self._speaks:
            return
        # JSON has no NaN and no infinity: null.
        values = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}
        size = self._path.stat().st_size if self._path.is_file() else 0
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            self._warn_unwritable(error)
        self._trackers.each(lambda tracker: tracker.log(values))
        for scores in self._scores.after(values) if self._trackers.is_wanted else ():
            self._trackers.each(lambda tracker, scores=scores: tracker.log(scores))

    def _warn_unwritable(self, error: OSError) -> None:
        """Say once that metrics.jsonl cannot be written. The run goes on: it is worth more than its log."""
        if not self._is_missing_lines:
            self.log(f"warning: {self._path} cannot be written ({error.strerror or error}); going on without")
        self._is_missing_lines = True

    def close_line(self) -> None:
        """Leave the terminal to other messages."""
        if self._line is not None:
            self._line.close()

    def close(self) -> None:
        self.close_line()
        self._trackers.each(lambda tracker: tracker.close(summarize(read_records(self._path))))


def printable(text: str) -> str:
    """With control characters, which a terminal would obey, written out as \\x1b; newlines and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def cut_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines that a run has written since it was at `step` (all, for a new run at step 0, and the scores of
    what was here before), and a line torn by a kill. Events past `step` that a rollback has left stay: they lie before
    it. Returns the records that are left."""
    if not step:
        with contextlib.suppress(OSError):  # it is another user's
            path.with_name(EVALS).unlink(missing_ok=True)
    if not path.is_file():
        return []
    records = read_records(path) if step else []
    until = max((number for number, record in enumerate(records, 1) if record["step"] <= step), default=0)
    write_records(path, records[:until])
    return records[:until]


def cut_to_events(path: Path, step: int) -> None:
    """Of the lines past `step` leave those that tell of an event, with its time and place and nothing else."""
    parts = EVENTS.keys() | {"step", "tokens", "elapsed_s"}
    records = [record if record["step"] <= step else {key: value for key, value in record.items() if key in parts}
               for record in read_records(path) if record["step"] <= step or record.keys() & EVENTS.keys()]
    write_records(path, records)


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run came to. Its losses are compared on the windows that all its evaluations read; the final one is of
    the last evaluation, the whole split when the run has come to its end. Unknown values are left out."""
    evaluations = [record for record in records if record.get("val/loss") is not None]
    speeds = [record["tokens_per_sec"] for record in records if record.get("tokens_per_sec") is not None]
    newest = records[-1] if records else {}
    summary: dict[str, Any] = {key: newest[key] for key in ("step", "elapsed_s") if key in newest}
    if evaluations:
        summary["best_val_loss"] = min(record.get("val/sampled_loss") or record["val/loss"] for record in evaluations)
        summary["final_val_loss"] = evaluations[-1]["val/loss"]
    if speeds:
        # A step that the run went back from is not one of them, unless it has been made again.
        summary["tokens"] = max(record.get("tokens") or 0 for record in records if record["step"] <= summary["step"])
        summary["tokens_per_sec"] = statistics.median(speeds)
    return summary
