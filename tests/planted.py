"""train.py with a fault planted from outside, by environment variables: started in its place, it takes its options.

    NAN_STEPS=30         the loss of that step of this process is NaN on the last rank; 30-39: of those; 30-: for good
    ERROR_STEP=30        the last rank raises an error there
    HOLD_STEP=30         the last rank waits there until it is asked to stop, or killed, or the file `go` is there; made
                         known by the file `held` in the current directory, and done once: not where that file is
    STOP_STEP=30         the last rank gets SIGTERM there
    SLOW=FILE            a step takes a tenth of a second more while that file is there
    FULL_AT=30           the disk is full for the checkpoint of step 30; 30-39, 30-: for those
    LAST_OPTION=--a=b    one more option on the last rank
    LAST_FOLDER=PATH     the last rank works in another directory
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flatgpt import launcher, signals

if __name__ == "__main__":
    signals.begin()
    launcher.end_with_torchrun()

from torch.distributed.elastic.multiprocessing.errors import record

import train
from flatgpt.options import run_script
from flatgpt.training.checkpoint import RunFolder
from flatgpt.training.metrics import Reporter
from model import GPT

FULL_BYTES = 40_000  # between the size of the tests' metrics.jsonl and that of their optimizer.safetensors


def within(number: int, wanted: str | None) -> bool:
    """Whether "30", "30-39" or "30-" says a number."""
    if not wanted:
        return False
    first, dash, last = wanted.partition("-")
    return int(first) <= number <= (int(last) if last else math.inf if dash else int(first))


def plant(env: Mapping[str, str], put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Plant what `env` names; `put` is setattr, or a test's monkeypatch.setattr, which undoes it."""
    is_last = int(env.get("RANK", "0")) == int(env.get("WORLD_SIZE", "1")) - 1
    forward, count, write, stop_requests = GPT.forward, Reporter.count, RunFolder._write, signals.stop_requests
    steps_done = 0
    asked: list[str] = []  # the loop's own list of signals

    def planted_forward(model, idx, targets=None, num_targets=None, *documents):
        logits, loss = forward(model, idx, targets, num_targets, *documents)
        is_training = model.training and num_targets is not None  # no evaluation, no trial run
        if is_training and is_last and within(steps_done + 1, env.get("NAN_STEPS")):
            loss = loss * math.nan
        return logits, loss

    def planted_count(reporter, tokens):
        nonlocal steps_done
        steps_done += 1
        count(reporter, tokens)
        if is_last and within(steps_done, env.get("ERROR_STEP")):
            raise RuntimeError("an error that the test has planted")
        if is_last and within(steps_done, env.get("HOLD_STEP")) and not Path("held").exists():
            Path("held").touch()
            deadline = time.monotonic() + 300
            while not asked and not Path("go").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        if is_last and within(steps_done, env.get("STOP_STEP")):
            signal.raise_signal(signal.SIGTERM)
        if "SLOW" in env and Path(env["SLOW"]).exists():
            time.sleep(0.1)

    def planted_write(run, config, tokenizer, trainer, is_best):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if within(trainer["step"], env.get("FULL_AT")):  # a write past the limit fails, since Python ignores SIGXFSZ
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, before[1]))
        try:
            return write(run, config, tokenizer, trainer, is_best)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @contextlib.contextmanager
    def planted_stop_requests():
        nonlocal asked
        with stop_requests() as asked:
            yield asked

    put(GPT, "forward", planted_forward)
    put(Reporter, "count", planted_count)
    put(RunFolder, "_write", planted_write)
    put(signals, "stop_requests", planted_stop_requests)
    if is_last and "LAST_FOLDER" in env:
        os.chdir(env["LAST_FOLDER"])
    if is_last and "LAST_OPTION" in env:
        sys.argv.append(env["LAST_OPTION"])


if __name__ == "__main__":
    plant(os.environ)
    record(run_script)(train.main)
