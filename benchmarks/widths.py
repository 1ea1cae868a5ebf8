"""Does the learning rate that is best at one width suit another? Loss over the rate at four widths, with --width_base
and without it.

    python prepare_data.py shakespeare_char
    python -m benchmarks.widths            prints a table, and draws docs/widths.svg

Each run is a GPT of two blocks on tiny Shakespeare's characters, with heads of 32 channels at every width. The rates
are a factor of 1.41 apart. A bench that was stopped goes on: finished runs stand in out/widths.jsonl.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":
    signals.begin()

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from matplotlib.figure import Figure

from benchmarks.scripts import Results
from flatgpt.options import parse_options, run_script
from flatgpt.training.plots import COLOURS, render

WIDTHS = (64, 128, 256, 512)
TITLES = {128: "--width_base=128", 0: "without"}  # width_base -> a title
RATES = [2 ** (power / 2) for power in range(-20, -8)]  # 0.001 to 0.044
Losses = dict[tuple[int, int, float], float]  # width_base, width and rate -> val loss


@dataclass
class WidthsConfig:
    steps: int = 100  # of 768 tokens, in each run
    jobs: int = 2  # runs at a time
    num_threads: int = 1  # of each run
    results: Annotated[str, "path"] = "out/widths.jsonl"  # where finished runs are kept
    picture: Annotated[str, "path"] = "docs/widths.svg"  # the picture to draw


def main(argv: list[str]) -> None:
    config, _ = parse_options(WidthsConfig, argv, usage=__doc__)
    cells = {(width_base, width, rate): options(width_base, width, rate, config.steps)
             for width in WIDTHS for width_base in TITLES for rate in RATES}
    found = Results(Path(config.results), config.num_threads).get(cells.values(), config.jobs)
    losses = {cell: found[run].loss for cell, run in cells.items()}
    for width_base, title in TITLES.items():
        for width in WIDTHS:
            rate = best_rate(losses, width_base, width)
            print(f"{title}, {width} channels: best rate {rate:.4f}, val loss {losses[width_base, width, rate]:.3f}")
    Path(config.picture).write_bytes(render(draw(losses), "svg"))


def options(width_base: int, width: int, rate: float, steps: int) -> str:
    return (f"config/shakespeare_char_cpu.py --width_base={width_base} --n_embd={width} --n_head={width // 32} "
            f"--n_layer=2 --learning_rate={rate:.5f} --min_lr=0 --warmup_iters=10 --max_iters={steps} "
            f"--lr_decay_iters={steps}")


def best_rate(losses: Losses, width_base: int, width: int) -> float:
    return min(RATES, key=lambda rate: losses[width_base, width, rate])


def draw(losses: Losses) -> Figure:
    """Val loss over the learning rate, a curve a width with a dot at its best; a panel with width_base, one without."""
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    for axes, (width_base, title) in zip(figure.subplots(1, 2, sharey=True), TITLES.items()):
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("learning rate")
        for width, colour in zip(WIDTHS, COLOURS):
            curve = [losses[width_base, width, rate] for rate in RATES]
            axes.plot(RATES, curve, color=colour, label=f"{width} channels")
            rate = best_rate(losses, width_base, width)
            axes.plot(rate, losses[width_base, width, rate], color=colour, marker="o")
    figure.axes[0].set_ylabel("val loss")
    figure.axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    run_script(main)
