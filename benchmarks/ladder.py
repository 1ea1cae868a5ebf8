"""What each part of the fast recipe is worth, and whether the whole of it holds on larger models: a ladder of sizes.

    python prepare_data.py shakespeare_char
    python prepare_data.py python_source --tokenizer=bpe --vocab_size=4096
    python -m benchmarks.ladder                          all of it: many hours on two cores
    python -m benchmarks.ladder --sizes=0.8M             the parts, and the smallest rung

At the smallest size every part is added to the plain recipe by itself, and left out of the whole. On every rung the
whole gets a third, a sixth and a twelfth of the plain recipe's tokens, and has to reach its loss; a law of parameters
and tokens is fitted to these runs of the whole, and drawn. All runs are made with each seed, and a difference is
between runs of one seed. A bench that was stopped goes on: finished runs stand in out/ladder.jsonl.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":
    signals.begin()

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from benchmarks.scripts import Results
from flatgpt.options import parse_options, run_script
from flatgpt.planning.fit import choose, fit_law
from flatgpt.planning.fit_summary import fit_as_text, summarize_fit, target
from flatgpt.training.fit_plots import picture_of_fit
from flatgpt.training.plots import render

PLAIN = "config/shakespeare_char_cpu.py"
DATA = {"shakespeare_char": "--dataset=shakespeare_char",
        "python_source": "--dataset=python_source --eval_tokens=131072"}
SEEDS = (1337, 2, 3)
STEPS = 600  # of the plain recipe on a rung, of 768 tokens
FRACTIONS = (3, 6, 12)  # of them that the whole gets
PART_STEPS = 200  # of the runs with and without a part


class Part(NamedTuple):
    on: str  # options that add it to the plain recipe
    off: str  # options that take it out of the whole
    needs: str = ""  # options that the plain recipe gets first, without which the part is nothing


SIZES = {"0.8M": "--n_layer=4 --n_head=4 --n_embd=128",
         "3M": "--n_layer=6 --n_head=6 --n_embd=192",
         "10M": "--n_layer=6 --n_head=12 --n_embd=384"}
MUON, OWN_HEAD = "--optimizer=muon --learning_rate=1e-2", "--tie_embeddings=False"
PARTS = {
    "RoPE": Part("--pos=rope", "--pos=learned"),
    "QK-norm": Part("--qk_norm=True", "--qk_norm=False"),
    "RMSNorm": Part("--norm=rmsnorm", "--norm=layernorm"),
    "SwiGLU": Part("--mlp=swiglu", "--mlp=gelu"),
    "Muon": Part(MUON, "--optimizer=adamw --learning_rate=4e-3"),  # AdamW's best rate of those tried: docs/log.md
    "Muon's momentum 0.8, not 0.95": Part("--muon_momentum=0.8", "--muon_momentum=0.95", MUON),
    "NorMuon": Part("--muon_beta2=0.95", "--muon_beta2=0", MUON),
    "a head of its own": Part(OWN_HEAD, "--tie_embeddings=True"),
    "its own rate for the tables": Part("--embed_lr=0.1", "--embed_lr=0", f"{MUON} {OWN_HEAD}"),
    "linear decay to 0": Part("--schedule=linear --min_lr=0", "--schedule=cosine --min_lr=1e-4"),
    "no weight decay": Part("--weight_decay=0", "--weight_decay=0.1"),
}
WHOLE = " ".join(part.on for part in PARTS.values()) + " --width_base=128"


@dataclass
class LadderConfig:
    sizes: str = ",".join(SIZES)  # rungs to climb
    jobs: int = 2  # runs at a time
    num_threads: int = 1  # of each run
    results: Annotated[str, "path"] = "out/ladder.jsonl"  # where finished runs are kept
    pictures: Annotated[str, "path"] = "docs"  # folder for the pictures of the laws

    def validate(self) -> list[str]:
        unknown = set(self.sizes.split(",")) - SIZES.keys()
        return [f"sizes={self.sizes} must be of {', '.join(SIZES)}"] if unknown else []


def main(argv: list[str]) -> None:
    config, _ = parse_options(LadderConfig, argv, usage=__doc__)
    results = Results(Path(config.results), config.num_threads)
    sizes = config.sizes.split(",")
    for name, dataset in DATA.items():
        print(f"\n{name}\n")
        if "0.8M" in sizes:
            print_all(parts_table(dataset, results, config.jobs))
        print_all(rungs_table(dataset, sizes, results, config.jobs))
        print_all(law(dataset, sizes, results, config.jobs, Path(config.pictures, f"ladder_{name}.svg")))


def print_all(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, flush=True)


def runs(dataset: str, size: str, steps: int, recipe: str) -> list[str]:
    """The runs of a recipe, one a seed."""
    options = f"{PLAIN} {dataset} {SIZES[size]} --warmup_iters={steps // 20} {recipe}".strip()
    return [f"{options} --max_iters={steps} --lr_decay_iters={steps} --seed={seed}" for seed in SEEDS]


def whole(dataset: str, size: str) -> list[list[str]]:
    """The runs of the whole, a list for each fraction of the plain recipe's steps."""
    return [runs(dataset, size, STEPS // fraction, WHOLE) for fraction in FRACTIONS]


def parts_table(dataset: str, results: Results, jobs: int) -> Iterator[str]:
    """How much lower the loss is with each part than without it, mean and range over the seeds."""
    def small(recipe: str) -> list[str]:
        return runs(dataset, "0.8M", PART_STEPS, recipe)

    pairs = {name: [(small(part.needs), small(f"{part.needs} {part.on}".strip())),
                    (small(f"{WHOLE} {part.off}"), small(WHOLE))] for name, part in PARTS.items()}
    sides = (side for both in pairs.values() for pair in both for side in pair)
    points = results.get((run for side in sides for run in side), jobs)
    yield f"| {PART_STEPS} steps of 768 tokens, 0.8M parameters | added to the plain recipe | in the whole |"
    yield "| --- | --- | --- |"
    for name, both in pairs.items():
        gains = [[points[without].loss - points[with_it].loss for without, with_it in zip(*pair)] for pair in both]
        yield f"| {name} | {' | '.join(map(spread, gains))} |"


def rungs_table(dataset: str, sizes: list[str], results: Results, jobs: int) -> Iterator[str]:
    """The losses of the plain recipe, and of the whole after a part of its steps, mean and range over the seeds."""
    recipes = {size: [runs(dataset, size, STEPS, ""), *whole(dataset, size)] for size in sizes}
    points = results.get((run for columns in recipes.values() for column in columns for run in column), jobs)
    yield (f"| size | plain, {STEPS * 768:,} tokens | "
           f"{' | '.join(f'the whole, 1/{fraction} of them' for fraction in FRACTIONS)} |")
    yield f"| --- {'| --- ' * (1 + len(FRACTIONS))}|"
    for size, columns in recipes.items():
        cells = (spread([points[run].loss for run in column]) for column in columns)
        yield f"| {size} | {' | '.join(cells)} |"


def law(dataset: str, sizes: list[str], results: Results, jobs: int, picture: Path) -> Iterator[str]:
    """The law of the whole recipe, fitted to its runs; of one size, it is a law of tokens alone."""
    names = {run: f"{size}, 1/{fraction}" for size in sizes
             for fraction, column in zip(FRACTIONS, whole(dataset, size)) for run in column}
    points = [point._replace(name=names[run]) for run, point in results.get(names, jobs).items()]
    left_out: dict[str, str] = {}
    fit = fit_law(*choose(points, left_out))
    to = target(fit)
    picture.write_bytes(render(picture_of_fit(fit, to), "svg"))
    yield from fit_as_text(summarize_fit(fit, to, left_out, {}))


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    run_script(main)
