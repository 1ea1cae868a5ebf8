"""What serve.py costs beside a run that trains: its share of a core, and its memory, with an event stream open.

    python -m benchmarks.serve                 two minutes
    python -m benchmarks.serve --seconds=20

A small GPT trains on text made for it and reports each step. A plain client follows that run, as the page does. Time is
the processor's, so other work on the machine changes little.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flatgpt.options import check_options, failed_rules, parse_options, run_script

ROOT = Path(__file__).resolve().parent.parent
TRAINING = ("--dataset=made", "--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--batch_size=8",
            "--gradient_accumulation_steps=1", "--max_iters=1000000", "--eval_interval=200", "--eval_iters=5",
            "--sample_interval=200", "--device=cpu", "--out_dir=out/made")


@dataclass
class ServeBenchConfig:
    seconds: int = 120  # to measure for

    def validate(self) -> list[str]:
        return failed_rules(self, ("seconds", self.seconds > 0, "positive"))


def main(argv: list[str]) -> None:
    config, _ = parse_options(ServeBenchConfig, argv, usage=__doc__)
    check_options(config)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "made.txt").write_text("".join(f"Line {i}: {i * i} is the square of {i}.\n" for i in range(5000)))
        subprocess.run([sys.executable, ROOT / "prepare_data.py", "--input=made.txt", "--name=made",
                        "--tokenizer=byte"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        stack.enter_context(process(folder, "train.py", *TRAINING))
        server = stack.enter_context(process(folder, "serve.py", "--port=0", "--open=False"))
        address = server.stdout.readline().split("/ ")[0]
        print(follow(address, server.pid, config.seconds))


@contextlib.contextmanager
def process(folder: Path, script: str, *options: str) -> Iterator[subprocess.Popen]:
    started = subprocess.Popen([sys.executable, ROOT / script, *options], cwd=folder, text=True,
                               stdout=subprocess.PIPE if script == "serve.py" else subprocess.DEVNULL)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def follow(address: str, pid: int, seconds: int) -> str:
    """Read the stream of the only run for so long; what that cost the server."""
    while not (runs := get(f"{address}/api/runs")["runs"]) or not runs[0]["step"]:
        time.sleep(0.5)
    history = get(f"{address}/api/runs/{runs[0]['id']}")
    with urllib.request.urlopen(f"{address}/api/events?runs={history['id']}@{history['position']}") as stream:
        began, cpu_s, num_reports = time.monotonic(), cpu_seconds(pid), 0
        for line in stream:
            if line.startswith(b'data: {"id"'):
                num_reports += len(json.loads(line.removeprefix(b"data: "))["columns"]["step"])
            if (passed_s := time.monotonic() - began) > seconds:
                break
        share = (cpu_seconds(pid) - cpu_s) / passed_s
    return (f"{passed_s:.0f} s: {share:.2%} of a core, {memory_mb(pid):.0f} MB; {num_reports} reports, "
            f"{num_reports / passed_s:.1f} a second")


def get(url: str) -> dict:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def cpu_seconds(pid: int) -> float:
    """Of a process, its own and the system's for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    """The most that a process has held."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


if __name__ == "__main__":
    run_script(main)
