"""What each part of a model is worth: every model and every option on tiny Shakespeare's characters, one table.

    python prepare_data.py shakespeare_char
    python -m benchmarks.zoo                              prints the table, and puts it into docs/models.md
    python -m benchmarks.zoo --steps=40 --page=""         a quick look

Each row is config/shakespeare_char_cpu.py with the options named there, trained twice: for as many tokens as the other
rows, and for as much time as the plain GPT takes for them. What that takes is measured anew before each row, because a
machine is not equally fast all the time. It runs train.py as a person would and reads metrics.jsonl.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":
    signals.begin()

import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from benchmarks.scripts import PROJECT, run_training
from flatgpt.files import write_text
from flatgpt.options import parse_options, run_script

CONFIG = "config/shakespeare_char_cpu.py"
MARKS = "<!-- zoo -->\n", "<!-- /zoo -->\n"
PLAIN_STEPS = 100  # of the plain GPT, ahead of each row
ROWS = {
    "GPT": "",
    "bigram, counted": "--model=bigram --bigram_counts=True",
    "bigram": "--model=bigram --learning_rate=1e-1 --min_lr=1e-2",
    "MLP": "--model=mlp",
    "RNN": "--model=rnn --n_layer=1",
    "GRU": "--model=gru --n_layer=1",
    "LSTM": "--model=lstm --n_layer=1",
    "sinusoidal positions": "--pos=sinusoidal",
    "learned positions that start as sinusoids": "--pos=learned_sinusoidal",
    "RoPE": "--pos=rope",
    "ALiBi": "--pos=alibi",
    "no positions": "--pos=none",
    "GELU by tanh": "--mlp=gelu_tanh",
    "ReLU": "--mlp=relu",
    "squared ReLU": "--mlp=relu2",
    "SwiGLU": "--mlp=swiglu",
    "RMSNorm": "--norm=rmsnorm",
    "norm behind the layers": "--norm_position=post",
    "QK-norm": "--qk_norm=True",
    "one head of keys and values": "--n_kv_head=1",
    "a head of its own": "--tie_embeddings=False",
    "Muon": "--optimizer=muon",
    "Llama's shape": "--pos=rope --norm=rmsnorm --mlp=swiglu",
    "the fast recipe": "config/shakespeare_char_fast.py",
}


@dataclass
class ZooConfig:
    steps: int = 300  # of 768 tokens, for every row
    dataset: Annotated[str, "paths"] = "shakespeare_char"  # data set to train on
    page: Annotated[str, "path"] = "docs/models.md"  # the page that holds the table; empty: only print it


@dataclass
class Trained:
    """What a run came to."""

    params: int
    val_loss: float  # on the whole validation split
    ms_per_step: float
    steps: int


def main(argv: list[str]) -> None:
    config, _ = parse_options(ZooConfig, argv, usage=__doc__)
    page = Path(config.page) if config.page else None
    if page and not all(mark in page.read_text(encoding="utf-8") for mark in MARKS):
        raise ValueError(f"{page} has no {MARKS[0].strip()} and {MARKS[1].strip()} for the table to stand between")
    table = "".join(lines(config))
    if page:
        before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
        write_text(page, f"{before}{MARKS[0]}{table}{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def lines(config: ZooConfig) -> Iterator[str]:
    """Of the table, as they are known."""
    for line in (f"| {config.steps} steps of 768 tokens | options | parameters | val loss | time a step | val loss, "
                 "same time | steps |\n", "| --- | --- | --- | --- | --- | --- | --- |\n"):
        yield show(line)
    for name, options in ROWS.items():
        plain = train("", PLAIN_STEPS, config.dataset)
        run = same_time = train(options, config.steps, config.dataset)
        times = run.ms_per_step / plain.ms_per_step if options else 1.0
        if run.steps and round(config.steps / times) != config.steps:
            same_time = train(options, round(config.steps / times), config.dataset)
        yield show(f"| {name} | {f'`{options}`' if options else ''} | {run.params:,} | {run.val_loss:.3f} | "
                   f"{times:.2f} | {same_time.val_loss:.3f} | {same_time.steps} |\n")


def show(line: str) -> str:
    print(line, end="", flush=True)
    return line


def train(row: str, steps: int, dataset: str) -> Trained:
    """One run of train.py. Raises OSError when it fails."""
    config, *options = shlex.split(row if row.startswith("config/") else f"{CONFIG} {row}")
    records, _, output = run_training(
        str(PROJECT / config), *options, f"--dataset={dataset}", f"--max_iters={steps}", f"--lr_decay_iters={steps}",
        f"--eval_interval={10 * steps}", "--eval_iters=1", "--log_interval=10")
    params = next(line for line in output.splitlines() if " parameters, " in line).split()[0]
    speeds = [768e3 / record["tokens_per_sec"] for record in records[1:] if "tokens_per_sec" in record]
    return Trained(int(params.replace(",", "")), records[-1]["val/loss"], statistics.median(speeds) if speeds else 0.0,
                   records[-1]["step"])


if __name__ == "__main__":
    run_script(main)
