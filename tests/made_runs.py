"""Run folders that were never trained: their losses follow a planted law."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import write_run
from safetensors.numpy import save_file

from flatgpt.planning.laws import Law

PLANTED = Law(E=1.2, A=30.0, B=100.0, alpha=0.3, beta=0.35)
OPTIONS = {"dataset": "tiny", "init_from": "scratch", "schedule": "cosine", "decay_lr": True, "lr_decay_iters": 10,
           "decay_fraction": 0.2, "max_iters": 10, "pos": "learned"}


def make_run(folder: Path, num_params: int = 1000, num_tokens: int = 10_000, loss: float | None = 2.0, step: int = 10,
             fingerprint: str = "aa", torn: str = "", **options: object) -> Path:
    """What train.py leaves behind after `step` of OPTIONS' ten steps, as far as it is read here."""
    records = [{"step": 5, "tokens": num_tokens // 2, "val/loss": 9.0},
               {"step": step, "tokens": num_tokens, "train/loss": 1.0, "lr": 1e-4},
               {"step": step, "tokens": num_tokens, "val/loss": loss, "val/sampled_loss": 1.5}]
    write_run(folder, records, OPTIONS | options, torn)
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    (checkpoint / "training").mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    save_file({"weights": np.zeros(num_params, np.int8)}, checkpoint / "model.safetensors")
    trainer = {"step": step, "data_fingerprint": fingerprint}
    (checkpoint / "training" / "trainer.json").write_text(json.dumps(trainer))
    return folder


def make_ladder(out: Path, sizes: tuple = (2_000, 10_000, 50_000), lengths: tuple = (1e4, 1e5, 1e6)) -> list[str]:
    generator = np.random.default_rng(0)
    return [str(make_run(out / f"{size}_{length:g}", size, int(length),
                         float(PLANTED.loss(size, length) * np.exp(0.003 * generator.standard_normal()))))
            for size in sizes for length in lengths]
