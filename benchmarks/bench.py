"""Measure the real scripts, and what people would use instead, in turn, because machines are noisy.

    python -m benchmarks.bench train --config=config/shakespeare_char_cpu.py --baseline     whole runs, and a plain loop
    python -m benchmarks.bench train --config=config/shakespeare_char_fast.py --baseline \\
        --baseline_config=config/shakespeare_char_cpu.py        to one loss by another recipe
    python -m benchmarks.bench train --config=config/gpt2_124m.py --steps=4 --options="--batch_size=4 ..."
    python -m benchmarks.bench sample --baseline                        sample.py on GPT-2 small
    python -m benchmarks.bench decode --dtype=float32                   one and eight rows of tokens, and bare products
    python -m benchmarks.bench data                                     prepare_data.py and two plain ways
    python -m benchmarks.bench read                                     batches of a stream, masked, packed
    python -m benchmarks.bench checkpoint                               what a save costs the loop
    python -m benchmarks.bench gpu --config=config/gpt2_124m.py         the rows of BENCHMARKS.md's GPU table

With NANOGPT=FOLDER, a checkout of nanoGPT, --baseline runs its own scripts in the place of a loop that does the same.
Each prints a line a round, then medians and spreads; `--json` prints all numbers as one JSON object in the end.
BENCHMARKS.md says how to read the numbers, and baselines.py what the other ways do.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signals.begin()

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import baselines, kernels, nanogpt
from benchmarks.baselines import NEW_TOKENS, PROMPT_IDS
from benchmarks.scripts import Figures, command, compare, run, run_training, show, spread
from flatgpt.data.documents import find_edges
from flatgpt.data.order import Order, TrainOrder
from flatgpt.data.packing import PackedOrder
from flatgpt.data.shards import Split, open_dataset
from flatgpt.data.tokenizer import GPT2Tokenizer
from flatgpt.models.prepacked import PrepackedLinear, prepack
from flatgpt.models.sampling import Sampler
from flatgpt.options import parse_options, run_script
from flatgpt.training.checkpoint import RunConfig, RunFolder
from flatgpt.training.config import TrainConfig
from flatgpt.training.device import pick_device, pick_dtype, pick_numerics
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, build_optimizer
from flatgpt.training.resume import Progress
from model import GPT, GPTConfig

T = TypeVar("T")
SAMPLED = GPTConfig(bias=True, mlp="gelu_tanh")  # GPT-2 small
KERNEL_SIZE = kernels.Size()
NANOGPT = os.environ.get("NANOGPT")  # a checkout of nanoGPT, for --baseline


@dataclass
class BenchConfig:
    what: Literal["train", "sample", "decode", "data", "read", "checkpoint", "gpu"] = "train"
    config: Annotated[str, "path"] = "config/shakespeare_char_cpu.py"  # configuration of the run
    options: str = ""  # more options for train.py, as on its command line
    steps: int = 0  # steps of a run; 0 = the configuration's max_iters, for gpu 10
    rounds: int = 0  # times that all ways are run; 0 = 3, for gpu 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of train.py and sample.py; the baselines are float32
    baseline: bool = False  # run what people would use instead as well
    baseline_config: Annotated[str, "path"] = ""  # configuration of the plain loop; empty: that of the run
    json: bool = False  # print the numbers as JSON


def main(argv: list[str]) -> None:
    """Run the ways in turn and print the ratios."""
    bench, _ = parse_options(BenchConfig, argv, usage=__doc__, bare_word="what")
    measures = {"train": bench_train, "sample": bench_sample, "decode": bench_decode,
                "data": bench_data, "read": bench_read, "checkpoint": bench_checkpoint, "gpu": bench_gpu}
    bench.rounds = bench.rounds or (1 if bench.what == "gpu" else 3)
    measured = measures[bench.what](bench)
    if bench.json:
        print(json.dumps(measured))


def train_config(bench: BenchConfig) -> TrainConfig:
    return parse_options(TrainConfig, [bench.config, *shlex.split(bench.options)])[0]


def in_child(measure: Callable[..., T], *args: Any) -> T:
    """measure(*args) in a fresh process, which raises here what it raises there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(measure, *args).result()


# Training


def bench_train(bench: BenchConfig) -> dict:
    """Tokens a second and milliseconds a step without evaluations and saves, the whole run's seconds, peak memory."""
    config = train_config(bench)
    steps = bench.steps or config.max_iters
    with tempfile.TemporaryDirectory() as folder:
        dataset = bench_dataset(config, folder)
        ways = {"train.py": partial(run_train, bench, steps, dataset)}
        if bench.baseline:
            if bench.baseline_config:
                config = parse_options(TrainConfig, [bench.baseline_config])[0]
            config.data.dataset = dataset
            plain_steps = config.max_iters if bench.baseline_config else steps
            if NANOGPT:
                ways["nanoGPT"] = partial(in_child, nanogpt.train, NANOGPT, config, plain_steps)
            else:
                ways["the plain loop"] = partial(in_child, baselines.train_plainly, config, plain_steps)
        seen = compare(bench.rounds, ways, ("tokens_per_sec", "ms_per_step", "run_s", "memory_gb", "mfu", "val_loss"))
    print(f"{steps} steps, torch {torch.__version__}, {torch.get_num_threads()} threads")
    return seen


def bench_dataset(config: TrainConfig, folder: str) -> str:
    """The configuration's data set as a path, or a new one of random tokens in `folder` where it is not there."""
    with contextlib.suppress(OSError, ValueError):
        return str(open_dataset(config.data.dataset).folder.resolve())
    print(f"no data set {config.data.dataset} here: random tokens take its place")
    for split, count in (("train", 4_000_000), ("val", 4 * config.model.block_size + 1)):
        tokens = np.random.default_rng(0).integers(0, 50257, count).astype(np.uint16)
        Path(folder, f"{split}.bin").write_bytes(tokens.tobytes())  # nanoGPT's format
    return folder


def run_train(bench: BenchConfig, steps: int, dataset: str) -> Figures:
    """A whole run of train.py. The first step, which warms up, counts for the run only."""
    records, options, _ = run_training(
        bench.config, *shlex.split(bench.options), f"--max_iters={steps}", f"--dtype={bench.dtype}",
        f"--dataset={dataset}", "--log_interval=1")
    trained, last = [r for r in records if "train/loss" in r], records[-1]
    tokens_per_sec = statistics.median(r["tokens_per_sec"] for r in trained[1:] or trained)
    return {"tokens_per_sec": tokens_per_sec, "ms_per_step": 1000 * trained[0]["tokens"] / tokens_per_sec,
            "run_s": last["elapsed_s"], "memory_gb": trained[-1]["memory_gb"], "mfu": trained[-1]["mfu"],
            "val_loss": last["val/loss"], "batch_size": options["batch_size"]}


# Sampling


def bench_sample(bench: BenchConfig) -> dict:
    """sample.py and its baselines on random weights."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        GPT(SAMPLED).save_pretrained(folder)
        tokenizer = GPT2Tokenizer()
        tokenizer.save(Path(folder), model_max_length=1024)
        ways = {"sample.py": partial(run_sample, bench, folder, tokenizer.decode(PROMPT_IDS))}
        if bench.baseline:
            ways |= {"nanoGPT": partial(in_child, nanogpt.sample, NANOGPT)} if NANOGPT else {
                "without a cache": partial(in_child, baselines.sample_uncached, folder, 1)}
            ways |= {"transformers": partial(in_child, baselines.sample_with_transformers, folder)}
        seen = compare(bench.rounds, ways, ("tokens_per_sec",))
    print(f"{NEW_TOKENS} tokens, torch {torch.__version__}, {torch.get_num_threads()} threads")
    return seen


def run_sample(bench: BenchConfig, folder: str, prompt: str) -> Figures:
    out = run("sample.py", f"--init_from={folder}", f"--prompt={prompt}", "--num_samples=1",
              f"--max_new_tokens={NEW_TOKENS}", f"--dtype={bench.dtype}")
    return {"tokens_per_sec": float(out.splitlines()[-1].split()[0])}


def sample_rows(folder: str, dtype: str, num_rows: int) -> Figures:
    """What sample.py does, for several rows at a time; what has to be compiled is compiled before."""
    device = pick_device("auto")
    model, idx = GPT.from_pretrained(folder), torch.tensor([PROMPT_IDS] * num_rows, device=device)
    numerics, _ = pick_numerics(model, dtype, "sdpa", device, 1, {}, training=False)
    model.to(device, numerics.dtype).eval()
    model.compile_decoding = device.type == "cuda"
    prepack(model)
    cache = model.make_cache(num_rows, idx.size(1) + NEW_TOKENS)
    for _ in range(2):
        began = time.perf_counter()
        for tokens in model.stream(idx, NEW_TOKENS, Sampler(0.8, 200), cache=cache):
            tokens.tolist()
        seconds = time.perf_counter() - began
    return {"tokens_per_sec": num_rows * NEW_TOKENS / seconds}


def bench_decode(bench: BenchConfig) -> dict:
    """Tokens a second of one row and of eight at a time, and what one row would reach if it took nothing but the
    products of a vector and each of the model's matrices, as they lie in a checkpoint and prepacked."""
    with tempfile.TemporaryDirectory() as folder:
        GPT(SAMPLED).save_pretrained(folder)
        rows = {f"{num_rows} at a time": partial(in_child, sample_rows, folder, bench.dtype, num_rows)
                for num_rows in (1, 8)}
        products = {"products of 1": partial(in_child, multiply_only, folder, bench.dtype, False)}
        if pick_device("auto").type == "cpu":
            products["prepacked products of 1"] = partial(in_child, multiply_only, folder, bench.dtype, True)
        return compare(bench.rounds, rows | products, ("tokens_per_sec", "gb_per_sec"))


@torch.no_grad()
def multiply_only(folder: str, dtype: str, is_prepacked: bool) -> Figures:
    """The products of `sample_rows` for one row, and the speed at which they read the matrices."""
    model, device = GPT.from_pretrained(folder), pick_device("auto")
    model.to(device, pick_numerics(model, dtype, "sdpa", device, 1, {}, training=False)[0].dtype)
    matrices = [p.detach() for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("wpe")]
    num_bytes = sum(matrix.nbytes for matrix in matrices)
    products = [PrepackedLinear(matrix, None) if is_prepacked else partial(F.linear, weight=matrix)
                for matrix in matrices]
    vectors = [torch.randn(1, matrix.size(1), dtype=matrix.dtype, device=device) for matrix in matrices]
    for times in (2, NEW_TOKENS // 4):  # the first to warm up
        began = time.perf_counter()
        for _ in range(times):
            for multiply, vector in zip(products, vectors):
                product = multiply(vector)
        product[0, 0].item()
        seconds = (time.perf_counter() - began) / times
    return {"tokens_per_sec": 1 / seconds, "gb_per_sec": num_bytes / seconds / 1e9}


# A GPU


def bench_gpu(bench: BenchConfig) -> dict:
    """The rows of BENCHMARKS.md's tables for a GPU; on any device, for the sake of its test."""
    steps = bench.steps or 10
    same = dataclasses.replace(bench, options=f"{bench.options} --eval_iters=1 --eval_interval={10 * steps}")
    largest = dataclasses.replace(same, options=f"{same.options} --batch_size=0")
    config = train_config(same)
    with tempfile.TemporaryDirectory() as folder:
        config.data.dataset = dataset = bench_dataset(config, folder)
        ways = {"train.py": partial(run_train, same, steps, dataset),
                "the plain loop": partial(in_child, baselines.train_plainly, config, steps),
                "train.py, largest batch": partial(run_train, largest, steps, dataset)}
        seen = compare(bench.rounds, {way: partial(attempt, measure) for way, measure in ways.items()},
                       ("tokens_per_sec", "memory_gb", "mfu"))
        cache = {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=folder)}
        for name in ("cold start", "warm start"):
            seen[name] = [attempt(partial(time_until, "step 1/", same, dataset, **cache))]
        GPT(SAMPLED).save_pretrained(folder)
        for rows in (1, 64):
            ways = {f"generate, {rows} at a time": partial(in_child, sample_rows, folder, bench.dtype, rows),
                    f"uncached, {rows} at a time": partial(in_child, baselines.sample_uncached, folder, rows)}
            seen |= compare(bench.rounds, {way: partial(attempt, measure) for way, measure in ways.items()},
                            ("tokens_per_sec",))
    measured = in_child(kernels.measure_all, KERNEL_SIZE)
    print_gpu_table(bench, seen)
    print_kernel_table(measured)
    return seen | measured


def print_kernel_table(measured: dict[str, Figures]) -> None:
    print("\n| | before, ms | now, ms | at least, ms |\n| --- | --- | --- | --- |")
    for name, figures in measured.items():
        cells = (show(figures[key]) if key in figures else "" for key in ("before_ms", "now_ms", "at_least_ms"))
        print(f"| {' | '.join([name, *cells])} |")


def print_gpu_table(bench: BenchConfig, seen: dict[str, list[Figures]]) -> None:
    device = pick_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"\n{name}, {pick_dtype(bench.dtype, device)}, torch {torch.__version__}, medians of {bench.rounds}:\n\n"
          "| | micro-batch | tokens/s | MFU | peak memory, GB | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for way, runs in seen.items():
        figures = [[each.get(key) for each in runs] for key in ("batch_size", "tokens_per_sec", "mfu", "memory_gb",
                                                                "seconds")]
        cells = ["" if None in values else show(statistics.median(values)) for values in figures]
        print(f"| {' | '.join([way if all(runs) else f'{way}: failed, see above', *cells])} |")


def attempt(measure: Callable[[], Figures]) -> Figures:
    """What it measures, or nothing where it fails, as the plain loop may for lack of memory: the table keeps its other
    rows."""
    try:
        return measure()
    except (OSError, RuntimeError) as error:  # of a script; of a child
        print(f"error: {error}", flush=True)
        return {}


def time_until(words: str, bench: BenchConfig, dataset: str, **env: str) -> Figures:
    """From the start of train.py until it prints a line that begins with `words`."""
    with tempfile.TemporaryDirectory() as folder:
        args = command("train.py", bench.config, *shlex.split(bench.options), f"--dataset={dataset}",
                       f"--out_dir={folder}/run")
        began = time.perf_counter()
        with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env=os.environ | env) as process:
            for line in process.stdout:
                if line.startswith(words):
                    break
            else:
                raise OSError(f"train.py ended before it said {words!r}: {line}")
            seconds = time.perf_counter() - began
            process.kill()
    return {"seconds": seconds}


# Checkpoints


def bench_checkpoint(bench: BenchConfig) -> dict:
    """On GPT-2 small: the seconds of a save that is waited for; those that the loop waits for an asynchronous one; and
    by how much the steps beside the writing thread are slower in all."""
    device = pick_device("auto")
    job = Job(0, 1, device, pick_dtype("auto", device))
    model = GPT(GPTConfig()).to(device)
    train_step, optimizer = make_train_step(model, job)
    with tempfile.TemporaryDirectory() as folder, RunFolder(RunConfig(folder, keep_last=1), job, print) as run:
        run.open({}, is_new=True)
        [train_step() for _ in range(3)]
        stalls, costs = [], []
        for turn in range(1, bench.rounds + 1):
            run.save(model, optimizer, None, asdict(Progress(step=2 * turn - 1)), False)
            began = time.perf_counter()
            run.poll()
            synchronous = time.perf_counter() - began  # writing alone: the copy is what the other way adds
            before = [train_step() for _ in range(10)]
            began = time.perf_counter()
            run.save(model, optimizer, None, asdict(Progress(step=2 * turn)), False)
            copied, beside = time.perf_counter() - began, []
            while run.is_saving:
                beside.append(train_step())
                run.poll(wait=False)
            usual = statistics.mean(before + [train_step() for _ in range(10)])
            slower = sum(beside) - len(beside) * usual
            stalls.append(copied / synchronous)
            costs.append((copied + slower) / synchronous)
            print(f"round {turn}: synchronous {synchronous:.2f} s; asynchronous: the loop waits {copied:.2f} s, and "
                  f"{len(beside)} steps of {usual:.2f} s take {slower:.2f} s longer in all", flush=True)
    print(f"waiting / synchronous: {spread(stalls)}; waiting and slower steps / synchronous: {spread(costs)}; "
          f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    return {"waiting": stalls, "waiting_and_slower_steps": costs}


def make_train_step(model: GPT, job: Job) -> tuple[Callable[[], float], torch.optim.Optimizer]:
    """A function that makes a step on 256 random tokens and gives the seconds it took, and its optimiser."""
    optimizer = build_optimizer(model, OptimConfig())
    tokens = torch.randint(model.config.vocab_size, (1, 257), device=job.device)

    def train_step() -> float:
        began = time.perf_counter()
        with job.autocast():
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - began

    return train_step, optimizer


# Data


def bench_data(bench: BenchConfig) -> dict:
    """Megabytes of text a second on every .py file of this Python with GPT-2's tokenizer."""
    megabytes = sum(len(text.encode()) for text in baselines.corpus()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        def prepare() -> float:
            shutil.rmtree(f"{folder}/data", ignore_errors=True)
            began = time.perf_counter()
            run("prepare_data.py", "python_source", cwd=folder)
            return time.perf_counter() - began

        def with_speed(measure: Callable[[], float]) -> Figures:
            seconds = measure()
            return {"mb_per_sec": megabytes / seconds, "seconds": seconds}

        # The plain ways say themselves how long they took, the imports of this file left out.
        ways = {"prepare_data.py": prepare, "a bare pool": partial(in_child, baselines.encode_in_pool),
                "datasets.map and memmap": partial(in_child, baselines.prepare_plainly, folder)}
        return compare(bench.rounds, {way: partial(with_speed, measure) for way, measure in ways.items()},
                       ("mb_per_sec", "seconds"))


def bench_read(bench: BenchConfig) -> dict:
    """Millions of tokens a second that one core reads, in steps of 512 windows of 1,024 tokens, from documents as long
    as web pages (log-normal, half of them below 500 tokens); and what an order takes before its first batch."""
    rng, num_tokens = np.random.default_rng(0), 100_000_000
    tokens = rng.integers(0, 50256, num_tokens).astype(np.uint16)
    lengths = rng.lognormal(np.log(500), 1.0, num_tokens // 500).astype(np.int64) + 1
    tokens[lengths.cumsum()[lengths.cumsum() < num_tokens]] = 50256
    split = Split([Path("train_000000.bin")], 50257, [tokens])
    began = time.perf_counter()
    edges = find_edges(tokens, 50256)
    print(f"{len(edges) - 1:,} documents, found in {time.perf_counter() - began:.2f} s; their index takes "
          f"{edges.nbytes / tokens.nbytes:.2%} of the shard")

    def read(make: Callable[[], Order]) -> Figures:
        began = time.perf_counter()
        order = make()
        order.batch(0, 1)
        ready = time.perf_counter()
        num_seqs = order.epoch_seqs(0) // 512 * 512
        padding = sum(int((order.batch(first, 512).targets < 0).sum()) for first in range(0, num_seqs, 512))
        return {"mtokens_per_sec": num_seqs * 1.024e-3 / (time.perf_counter() - ready), "start_s": ready - began,
                "padding": padding / num_seqs / 1024}

    ways = {"stream": partial(TrainOrder, split, 1024, 1337), "mask": partial(TrainOrder, split, 1024, 1337, 50256),
            "pack": partial(PackedOrder, split, [edges], 1024, 1337)}
    return compare(bench.rounds, {way: partial(read, make) for way, make in ways.items()},
                   ("mtokens_per_sec", "start_s", "padding"))


if __name__ == "__main__":
    run_script(main)
