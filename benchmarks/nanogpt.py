"""nanoGPT's own scripts, from a checkout of its repository, beside ours: NANOGPT=FOLDER python -m benchmarks.bench ...

bench.py runs each of these in a process of its own, in the place of baselines.py's stand-ins.
"""

from __future__ import annotations

import pickle
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.baselines import NEW_TOKENS, PROMPT_IDS
from benchmarks.scripts import Figures
from flatgpt.data.loader import plan_batches
from flatgpt.data.shards import open_dataset
from flatgpt.training.config import TrainConfig
from flatgpt.training.device import pick_device

SAME = ("n_layer", "n_head", "n_embd", "dropout", "bias", "block_size", "learning_rate", "weight_decay", "beta1",
        "beta2", "grad_clip", "warmup_iters", "lr_decay_iters", "min_lr", "eval_interval", "eval_iters")  # of both
ITERATION = re.compile(r"^iter \d+: loss .*, time ([\d.]+)ms", re.M)
EVALUATION = re.compile(r"^step \d+: train loss .*, val loss ([\d.]+)", re.M)


def train(checkout: str, config: TrainConfig, steps: int) -> Figures:
    """Its train.py, eager and in float32 on a CPU, on the same tokens, with the same model and batch. Raises OSError
    with the end of its output when it fails."""
    dataset, device = open_dataset(config.data.dataset), pick_device(config.where.device)
    plan = plan_batches(config.data, {}, config.model.block_size, 1)
    ours = vars(config) | vars(config.model) | vars(config.optim) | vars(config.data)
    options = {key: ours[key] for key in SAME} | {
        "dataset": "bench", "max_iters": steps, "log_interval": 1, "batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation_steps, "device": device.type, "out_dir": "out",
        "compile": device.type == "cuda", "dtype": "bfloat16" if device.type == "cuda" else "float32"}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "nanoGPT")  # it reads its files and its data where it is started
        shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", "data", "out*"))
        data = folder / "data" / "bench"
        data.mkdir(parents=True)
        for name in ("train", "val"):
            np.concatenate(dataset.splits[name].shards).astype(np.uint16).tofile(data / f"{name}.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": dataset.vocab_size}))
        done = subprocess.run([sys.executable, "train.py", *(f"--{key}={value}" for key, value in options.items())],
                              cwd=folder, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = [float(ms) / 1000 for ms in ITERATION.findall(done.stdout)]
    if done.returncode or not seconds:
        raise OSError(f"nanoGPT's train.py failed: {done.stdout[-500:]}")
    step_s = statistics.median(seconds[1:] or seconds)
    return {"tokens_per_sec": plan.seqs_per_step * config.model.block_size / step_s, "ms_per_step": 1000 * step_s,
            "run_s": sum(seconds), "val_loss": float(EVALUATION.findall(done.stdout)[-1]),
            "memory_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9}


def sample(checkout: str) -> Figures:
    """Its model's `generate` on random weights of GPT-2 small."""
    sys.path.insert(0, checkout)
    del sys.modules["model"]  # ours, which has the same name
    from model import GPT, GPTConfig

    device = pick_device("auto")
    model, idx = GPT(GPTConfig()).to(device).eval(), torch.tensor([PROMPT_IDS], device=device)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        model.generate(idx, 8, temperature=0.8, top_k=200)  # to warm up
        began = time.perf_counter()
        model.generate(idx, NEW_TOKENS, temperature=0.8, top_k=200)[-1, -1].item()
    return {"tokens_per_sec": NEW_TOKENS / (time.perf_counter() - began)}
