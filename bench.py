"""Measure the real scripts against the plain way of doing the same, in one run, because machines are noisy.

    python bench.py train --config=config/shakespeare_char_cpu.py     train.py and the plain loop, in turn, whole runs
    python bench.py train --config=... --steps=500 --rounds=5         shorter and more

`train` prints milliseconds a step, evaluations and saves included, for both, and the ratio of each round. The plain
loop is what one would write first, and what nanoGPT does: float32, eager, whole logits, unfused AdamW, random windows,
a read of the loss at every step, evaluations of both splits on random batches, each followed by a torch.save.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import settings
from model import GPT, GPTConfig
from shards import Split, open_dataset
from train import TrainConfig


@dataclass
class BenchConfig:
    what: Literal["train", "plain"] = "train"  # train: both in turn; plain: the plain loop alone
    config: str = "config/shakespeare_char_cpu.py"  # configuration of the run
    steps: int = 0  # steps of a run; 0 = the configuration's max_iters
    rounds: int = 3  # times that both are run
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # of train.py; the plain loop is float32


def main(argv: list[str]) -> None:
    """Run both in turn and print the ratios; or, as the child of that, the plain loop alone."""
    bench, _ = settings.parse(BenchConfig, argv, usage=__doc__, bare_word="what")
    config, _ = settings.parse(TrainConfig, [bench.config])
    steps = bench.steps or config.max_iters
    if bench.what == "plain":
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(train_plainly(config, steps, folder)))
        return
    ratios = []
    for turn in range(1, bench.rounds + 1):
        plain = json.loads(run("bench.py", "plain", f"--config={bench.config}", f"--steps={steps}").splitlines()[-1])
        ours = run_train(bench, steps)
        ratios.append(ours["ms_per_step"] / plain["ms_per_step"])
        print(f"round {turn}: plain {plain['ms_per_step']:.1f} ms a step, ours {ours['ms_per_step']:.1f} ms "
              f"(val loss {ours['val_loss']:.4f}), ratio {ratios[-1]:.2f}", flush=True)
    print(f"ours / plain: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}; "
          f"{steps} steps, {bench.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads")


def run(script: str, *args: str) -> str:
    """A script's output. Raises OSError with the end of it when the script fails."""
    script = str(Path(__file__).with_name(script))
    done = subprocess.run([sys.executable, script, *args], text=True, check=False, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        raise OSError(f"{script} failed: {done.stdout[-500:]}")
    return done.stdout


def run_train(bench: BenchConfig, steps: int) -> dict[str, float]:
    """Whole run of train.py, read from its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as out_dir:
        run("train.py", bench.config, f"--max_iters={steps}", f"--dtype={bench.dtype}", f"--out_dir={out_dir}/run")
        last = json.loads(Path(out_dir, "run", "metrics.jsonl").read_text().splitlines()[-1])
    return {"ms_per_step": 1000 * last["elapsed_s"] / steps, "val_loss": last["val/loss"]}


def train_plainly(config: TrainConfig, steps: int, folder: str) -> dict[str, float]:
    """The reference: the same model and number of tokens a step; it saves in `folder`."""
    dataset = open_dataset(config.data.dataset)
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**asdict(config.model) | {"vocab_size": dataset.vocab_size}))
    decay = [{"params": [p for p in model.parameters() if (p.dim() > 1) == is_matrix], "weight_decay": weight_decay}
             for is_matrix, weight_decay in ((True, config.optim.weight_decay), (False, 0.0))]
    optimizer = torch.optim.AdamW(decay, config.optim.learning_rate, (config.optim.beta1, config.optim.beta2))

    def loss_on(split: Split) -> torch.Tensor:
        size, tokens = config.model.block_size, split.shards[0]
        starts = torch.randint(len(tokens) - size, (config.data.batch_size,))
        rows = torch.stack([torch.from_numpy(tokens[i:i + size + 1].astype(np.int64)) for i in starts])
        logits = F.linear(model._hidden(rows[:, :-1]), model.wte.weight[:dataset.vocab_size])
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    began = time.perf_counter()
    for step in range(steps + 1):
        if step % config.eval_interval == 0 or step == steps:
            with torch.no_grad():
                for split in ("train", "val"):
                    [loss_on(dataset.splits[split]).item() for _ in range(config.eval_iters)]
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder, "ckpt.pt"))
        if step == steps:
            break
        for _ in range(config.data.gradient_accumulation_steps):
            loss = loss_on(dataset.splits["train"]) / config.data.gradient_accumulation_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return {"ms_per_step": 1000 * (time.perf_counter() - began) / steps}


if __name__ == "__main__":
    settings.run(main)
