"""Running the project's scripts as a person would, and comparing ways to do the same in turn."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from flatgpt.files import read_json
from flatgpt.planning.fit import Point
from flatgpt.run_folder import read_records
from flatgpt.training.finished_runs import finished_run

PROJECT = Path(__file__).resolve().parent.parent
Figures = dict[str, float]  # what was measured, by its name


class TrainingRun(NamedTuple):
    records: list[dict]  # of metrics.jsonl
    options: dict  # of train_config.json
    output: str


def command(script: str, *args: str) -> list[str]:
    return [sys.executable, str(PROJECT / script), *args]


def run(script: str, *args: str, cwd: str | None = None, **env: str) -> str:
    """A script's output. Raises OSError with the end of it when the script fails."""
    done = subprocess.run(command(script, *args), text=True, check=False, cwd=cwd, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, **env, "PYTHONPATH": str(PROJECT)})
    if done.returncode:
        raise OSError(f"{script} failed: {done.stdout[-500:]}")
    return done.stdout


def run_training(*args: str, **env: str) -> TrainingRun:
    """A whole run of train.py in a folder that is deleted afterwards. Raises OSError when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = run("train.py", *args, f"--out_dir={folder}/run", **env)
        return TrainingRun(read_records(Path(folder, "run/metrics.jsonl")),
                           read_json(Path(folder, "run/train_config.json")), output)


class Results:
    """What runs end with, in the file `path`: a run that stands there is not made again, so that a bench of many hours
    can be stopped and started. A run is known by its options alone, so the file is of one version of the code. Threads
    may share it."""

    def __init__(self, path: Path, num_threads: int):
        """Each run computes on `num_threads` threads."""
        self.path, self.num_threads, self.lock = path, num_threads, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
        self.points = {point.name: point for point in (Point(**json.loads(line)) for line in lines)}

    def point(self, options: str) -> Point:
        """Of the run of train.py with these options: a config of the project, and what a shell would take behind it.
        Raises OSError when it fails."""
        if options not in self.points:
            config, *others = shlex.split(options)
            with tempfile.TemporaryDirectory() as folder:
                run("train.py", str(PROJECT / config), *others, "--eval_interval=1000000", "--eval_iters=1",
                    f"--out_dir={folder}/run", OMP_NUM_THREADS=str(self.num_threads))
                found = finished_run(Path(folder, "run")).point._replace(name=options)
            with self.lock, self.path.open("a", encoding="utf-8") as file:
                self.points[options] = found
                file.write(json.dumps(found._asdict()) + "\n")
            print(f"{found.loss:.4f}  {options}", flush=True)
        return self.points[options]

    def get(self, runs: Iterable[str], jobs: int) -> dict[str, Point]:
        """Of all runs, `jobs` at a time, in this order."""
        runs = list(dict.fromkeys(runs))
        with ThreadPoolExecutor(jobs) as pool:
            return dict(zip(runs, pool.map(self.point, runs)))


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
