"""What each part of the fast recipe is worth, and whether the whole of it holds on larger models: a ladder of sizes.

    python prepare_data.py shakespeare_char
    python prepare_data.py python_source --tokenizer=bpe --vocab_size=4096
    python -m benchmarks.ladder                          all of it: many hours on two cores
    python -m benchmarks.ladder --sizes=0.8M             the parts, and the smallest rung

At the smallest size every part is added to the plain recipe by itself, and left out of the whole. On every rung the
whole gets a third and a sixth of the plain recipe's tokens, and has to reach its loss. All runs are made with each
seed, and a difference is between runs of one seed. A bench that was stopped goes on: finished runs stand in
out/ladder.jsonl.
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

PLAIN = "config/shakespeare_char_cpu.py"
DATA = {"characters of tiny Shakespeare": "--dataset=shakespeare_char",
        "Python files, a BPE of 4,096": "--dataset=python_source --eval_tokens=131072"}
SEEDS = (1337, 2, 3)
STEPS = 600  # of the plain recipe on a rung, of 768 tokens
FRACTIONS = (3, 6)  # of them that the whole gets
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


def print_all(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, flush=True)


def runs(dataset: str, size: str, steps: int, recipe: str) -> list[str]:
    """The runs of a recipe, one a seed."""
    options = f"{PLAIN} {dataset} {SIZES[size]} --warmup_iters={steps // 20} {recipe}".strip()
    return [f"{options} --max_iters={steps} --lr_decay_iters={steps} --seed={seed}" for seed in SEEDS]


def parts_table(dataset: str, results: Results, jobs: int) -> Iterator[str]:
    """How much lower the loss is with each part than without it, mean and range over the seeds."""
    def small(recipe: str) -> list[str]:
        return runs(dataset, "0.8M", PART_STEPS, recipe)

    pairs = {name: [(small(part.needs), small(f"{part.needs} {part.on}".strip())),
                    (small(f"{WHOLE} {part.off}"), small(WHOLE))] for name, part in PARTS.items()}
    sides = (side for both in pairs.values() for pair in both for side in pair)
    losses = results.val_losses((run for side in sides for run in side), jobs)
    yield f"| {PART_STEPS} steps of 768 tokens, 0.8M parameters | added to the plain recipe | in the whole |"
    yield "| --- | --- | --- |"
    for name, both in pairs.items():
        gains = [[losses[without] - losses[with_it] for without, with_it in zip(*pair)] for pair in both]
        yield f"| {name} | {' | '.join(map(spread, gains))} |"


def rungs_table(dataset: str, sizes: list[str], results: Results, jobs: int) -> Iterator[str]:
    """The losses of the plain recipe, and of the whole after a part of its steps, mean and range over the seeds."""
    recipes = {size: [runs(dataset, size, STEPS, ""),
                      *(runs(dataset, size, STEPS // fraction, WHOLE) for fraction in FRACTIONS)] for size in sizes}
    losses = results.val_losses((run for columns in recipes.values() for column in columns for run in column), jobs)
    yield (f"| size | plain, {STEPS * 768:,} tokens | "
           f"{' | '.join(f'the whole, 1/{fraction} of them' for fraction in FRACTIONS)} |")
    yield f"| --- {'| --- ' * (1 + len(FRACTIONS))}|"
    for size, columns in recipes.items():
        cells = (spread([losses[run] for run in column]) for column in columns)
        yield f"| {size} | {' | '.join(cells)} |"


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    run_script(main)
