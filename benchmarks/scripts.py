"""Running the project's scripts as a person would, and comparing ways to do the same in turn."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flatgpt.files import read_json
from flatgpt.run_folder import read_records

PROJECT = Path(__file__).resolve().parent.parent
Figures = dict[str, float]  # what was measured, by its name


class TrainingRun(NamedTuple):
    records: list[dict]  # of metrics.jsonl
    options: dict  # of train_config.json
    output: str


def command(script: str, *args: str) -> list[str]:
    return [sys.executable, str(PROJECT / script), *args]


def run(script: str, *args: str, cwd: str | None = None) -> str:
    """A script's output. Raises OSError with the end of it when the script fails."""
    done = subprocess.run(command(script, *args), text=True, check=False, cwd=cwd, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    if done.returncode:
        raise OSError(f"{script} failed: {done.stdout[-500:]}")
    return done.stdout


def run_training(*args: str) -> TrainingRun:
    """A whole run of train.py in a folder that is deleted afterwards. Raises OSError when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = run("train.py", *args, f"--out_dir={folder}/run")
        return TrainingRun(read_records(Path(folder, "run/metrics.jsonl")),
                           read_json(Path(folder, "run/train_config.json")), output)


def compare(rounds: int, ways: dict[str, Callable[[], Figures]], figures: tuple[str, ...]) -> dict[str, list[Figures]]:
    """Call all ways in turn, `rounds` times, and print a line each; then for each figure the median of every way, and
    the ratio of the first way, ours, to each other."""
    seen: dict[str, list[Figures]] = {way: [] for way in ways}
    for turn in range(1, rounds + 1):
        for way, measure in ways.items():
            seen[way].append(measure())
            numbers = ", ".join(f"{key} {show(seen[way][-1].get(key))}" for key in figures)
            print(f"round {turn}: {way}: {numbers}", flush=True)
    ours = next(iter(ways))
    for key in figures:
        for way, runs in seen.items():
            if all(each.get(key) for each in (*runs, *seen[ours])):
                ratios = [mine[key] / theirs[key] for mine, theirs in zip(seen[ours], runs)]
                print(f"{way}: {key} median {show(statistics.median(each[key] for each in runs))}"
                      + (f"; {ours} / {way}: {spread(ratios)}" if way != ours else ""))
    return seen


def show(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def spread(ratios: list[float]) -> str:
    return f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"
