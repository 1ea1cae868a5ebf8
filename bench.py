"""Measure the real scripts against the plain way of doing the same, in one run, because machines are noisy.

    python bench.py train --config=config/shakespeare_char_cpu.py     train.py and the plain loop, in turn, whole runs
    python bench.py train --config=... --steps=500 --rounds=5         shorter and more
    python bench.py data                                              prepare_data.py and two plain ways, in turn
    python bench.py checkpoint                                        what a save costs the loop, and what it would

`train` prints milliseconds a step, evaluations and saves included, for both, and the ratio of each round. The plain
loop is what one would write first, and what nanoGPT does: float32, eager, whole logits, unfused AdamW, random windows,
a read of the loss at every step, evaluations of both splits on random batches, each followed by a torch.save.

`data` prints megabytes of text a second on every .py file of this Python with GPT-2's tokenizer: for prepare_data.py,
from start to exit, for a bare multiprocessing.Pool that encodes with tiktoken and throws the result away,
and for nanoGPT's way, `datasets.map(num_proc)` and a memory-mapped file. Then the peak memory of prepare_data.py's
whole process tree on that corpus and on twice of it, and the tokens a second that one core reads as training batches.

`checkpoint` trains GPT-2 small and prints the seconds that writing its checkpoint takes while the loop waits (a
synchronous save), those that the loop waits for the copy of the state (an asynchronous one), and by how much the steps
beside the writing thread are slower in all.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import settings
import sources
from checkpoint import Progress, RunConfig, RunFolder
from data import MixedOrder, TrainOrder
from device import pick_device, pick_dtype
from distributed import Job
from model import GPT, GPTConfig
from optim import OptimConfig, build_optimizer
from shards import Split, open_dataset
from sources import SourceConfig, text_of
from train import TrainConfig


@dataclass
class BenchConfig:
    what: Literal["train", "data", "checkpoint", "plain", "pool", "map"] = "train"  # the last three: a plain way alone
    config: str = "config/shakespeare_char_cpu.py"  # configuration of the run
    steps: int = 0  # steps of a run; 0 = the configuration's max_iters
    rounds: int = 3  # times that all ways are run
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # of train.py; the plain loop is float32


def main(argv: list[str]) -> None:
    """Run the ways in turn and print the ratios; or, as the child of that, one plain way alone, in this folder."""
    bench, _ = settings.parse(BenchConfig, argv, usage=__doc__, bare_word="what")
    ways = {"train": bench_train, "data": bench_data, "checkpoint": bench_checkpoint,
            "plain": train_plainly, "pool": encode_in_pool, "map": prepare_plainly}
    measured = ways[bench.what](bench)
    if measured is not None:
        print(json.dumps(measured))


def bench_train(bench: BenchConfig) -> None:
    config, _ = settings.parse(TrainConfig, [bench.config])
    steps = bench.steps or config.max_iters
    ratios = []
    for turn in range(1, bench.rounds + 1):
        plain = json.loads(run("bench.py", "plain", f"--config={bench.config}", f"--steps={steps}").splitlines()[-1])
        ours = run_train(bench, steps)
        ratios.append(ours["ms_per_step"] / plain["ms_per_step"])
        print(f"round {turn}: plain {plain['ms_per_step']:.1f} ms a step, ours {ours['ms_per_step']:.1f} ms "
              f"(val loss {ours['val_loss']:.4f}), ratio {ratios[-1]:.2f}", flush=True)
    print(f"ours / plain: {spread(ratios)}; {steps} steps, {bench.dtype}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")


def spread(ratios: list[float]) -> str:
    return f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"


def command(script: str, *args: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve().with_name(script)), *args]


def run(script: str, *args: str, cwd: str | None = None) -> str:
    """A script's output. Raises OSError with the end of it when the script fails."""
    done = subprocess.run(command(script, *args), text=True, check=False, cwd=cwd, stdout=subprocess.PIPE,
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


def train_plainly(bench: BenchConfig) -> dict[str, float]:
    """The reference: the same model and number of tokens a step."""
    config, _ = settings.parse(TrainConfig, [bench.config])
    steps, folder = bench.steps or config.max_iters, tempfile.mkdtemp()
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


# Checkpoints


def bench_checkpoint(bench: BenchConfig) -> None:
    """Rounds of: a save that is waited for; some steps; a save, and steps beside it until it is written."""
    device = pick_device("auto")
    here = Job(0, 1, device, pick_dtype("auto", device))
    model = GPT(GPTConfig()).to(device)
    optimizer = build_optimizer(model, OptimConfig())
    tokens = torch.randint(model.config.vocab_size, (1, 257), device=device)

    def train_step() -> float:
        began = time.perf_counter()
        with here.autocast():
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder, RunFolder(RunConfig(folder, keep_last=1), here, print) as run:
        run.open({}, is_new=True)
        [train_step() for _ in range(3)]
        stalls, costs = [], []
        for turn in range(1, bench.rounds + 1):
            run.save(model, optimizer, None, asdict(Progress(step=2 * turn - 1)), False)
            began = time.perf_counter()
            run.settle()
            synchronous = time.perf_counter() - began  # writing alone: the copy is what the other way adds
            before = [train_step() for _ in range(10)]
            began = time.perf_counter()
            run.save(model, optimizer, None, asdict(Progress(step=2 * turn)), False)
            copied, beside = time.perf_counter() - began, []
            while run.is_saving:
                beside.append(train_step())
                run.settle(wait=False)
            usual = statistics.mean(before + [train_step() for _ in range(10)])
            slower = sum(beside) - len(beside) * usual
            stalls.append(copied / synchronous)
            costs.append((copied + slower) / synchronous)
            print(f"round {turn}: synchronous {synchronous:.2f} s; asynchronous: the loop waits {copied:.2f} s, and "
                  f"{len(beside)} steps of {usual:.2f} s take {slower:.2f} s longer in all", flush=True)
    print(f"waiting / synchronous: {spread(stalls)}; waiting and slower steps / synchronous: {spread(costs)}; "
          f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads")


# Data


def bench_data(bench: BenchConfig) -> None:
    """Speeds in turn, then memory, then reading, all in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        ratios: dict[str, list[float]] = {"pool": [], "map": []}
        for turn in range(1, bench.rounds + 1):
            began = time.perf_counter()
            run("prepare_data.py", "python_source", f"--name=round{turn}", cwd=folder)
            seconds = {"ours": time.perf_counter() - began}
            for way in ratios:  # these say themselves how long they took, the imports of this file left out
                seconds[way] = json.loads(run("bench.py", way, cwd=folder).splitlines()[-1])["seconds"]
            made = open_dataset(f"{folder}/data/round{turn}")
            megabytes = made.manifest["bytes"] / 1e6
            for way in ratios:
                ratios[way].append(seconds[way] / seconds["ours"])
            print(f"round {turn}: {megabytes:.0f} MB; " + ", ".join(
                f"{way} {megabytes / s:.1f} MB/s ({s:.1f} s)" for way, s in seconds.items()), flush=True)
        for way, name in (("pool", "a bare pool"), ("map", "datasets.map and memmap")):
            print(f"ours / {name}: {spread(ratios[way])}")
        for copies in (1, 2):
            peak = peak_memory_gb(command("prepare_data.py", f"--input={write_corpus(folder, copies)}"), folder)
            print(f"peak memory of the process tree, corpus x {copies}: {peak:.2f} GB", flush=True)
        print(f"reading batches of 12 x 1024: {reading_speed(made.splits['train']) / 1e6:.0f} million tokens/s a core, "
              f"{os.cpu_count()} cores in this machine")


def corpus() -> Iterator[str]:
    """The texts of every .py file of this Python, as prepare_data.py reads them."""
    for part in sources.find_parts(SourceConfig(dataset="python_source")):
        for record in part.read():
            yield text_of(record, "")[0]


def write_corpus(folder: str, copies: int) -> Path:
    """A folder in `folder` with so many copies of those files."""
    root = Path(folder, f"corpus_{copies}")
    for copy in range(copies):
        for number, text in enumerate(corpus()):
            path = root / str(copy) / str(number // 1000) / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return root


def encode_in_pool(bench: BenchConfig) -> dict[str, float]:
    """The bare pool: it encodes every text and throws the tokens away."""
    began = time.perf_counter()
    with multiprocessing.Pool(initializer=_load_tiktoken) as pool:
        num_tokens = sum(pool.imap_unordered(_count_tokens, corpus(), chunksize=64))
    return {"seconds": time.perf_counter() - began, "tokens": num_tokens}


def _load_tiktoken() -> None:
    import tiktoken

    global _encoding
    _encoding = tiktoken.get_encoding("gpt2")


def _count_tokens(text: str) -> int:
    return len(_encoding.encode_ordinary(text))


def prepare_plainly(bench: BenchConfig) -> dict[str, float]:
    """nanoGPT's way: a data set of texts, split, mapped over all cores, and written to a memory-mapped file."""
    began = time.perf_counter()
    os.environ["HF_HOME"] = tempfile.mkdtemp(dir=".")
    import datasets
    import tiktoken

    datasets.disable_progress_bars()
    encoding = tiktoken.get_encoding("gpt2")

    def tokenize(row: dict) -> dict:
        ids = encoding.encode_ordinary(row["text"]) + [encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    texts = datasets.Dataset.from_dict({"text": list(corpus())}).train_test_split(test_size=0.01, seed=1)
    for name, rows in texts.items():
        rows = rows.map(tokenize, remove_columns=["text"], num_proc=os.cpu_count())
        tokens = np.memmap(f"{name}.bin", dtype=np.uint16, mode="w+", shape=(sum(rows["len"]),))
        num_parts, end = min(1024, len(rows)), 0
        for part in range(num_parts):
            batch = rows.shard(num_shards=num_parts, index=part, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            tokens[end:end + len(ids)] = ids
            end += len(ids)
        tokens.flush()
    return {"seconds": time.perf_counter() - began}


def peak_memory_gb(args: list[str], cwd: str) -> float:
    """The most memory that a command and all its children held at a time, looked up every 50 ms (Linux)."""
    peak, unit = 0, os.sysconf("SC_PAGE_SIZE")
    process = subprocess.Popen(args, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        tree, pages = [process.pid], 0
        for pid in tree:
            try:
                tree += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:  # it has ended meanwhile
                continue
        peak = max(peak, pages * unit)
        time.sleep(0.05)
    if process.returncode:
        raise OSError(f"{args[1]} failed: {process.stderr.read()[-500:]}")
    return peak / 1e9


def reading_speed(split: Split, block_size: int = 1024, batch_size: int = 12, batches: int = 2000) -> float:
    """Tokens a second in one thread, the second time over the same batches."""
    order = MixedOrder([TrainOrder(split, block_size, seed=1)], [1.0])
    for _ in range(2):
        began = time.perf_counter()
        for i in range(batches):
            order.batch(i * batch_size, batch_size)
    return batches * batch_size * block_size / (time.perf_counter() - began)


if __name__ == "__main__":
    settings.run(main)
