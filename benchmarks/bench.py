"""Measure the real scripts, and what people would use instead, in turn, because machines are noisy.

    python -m benchmarks.bench train --config=config/shakespeare_char_cpu.py --baseline     whole runs, and a plain loop
    python -m benchmarks.bench train --config=config/gpt2_124m.py --steps=4 --options="--batch_size=4 ..."
    python -m benchmarks.bench sample --baseline                        sample.py on GPT-2 small
    python -m benchmarks.bench data                                     prepare_data.py and two plain ways
    python -m benchmarks.bench checkpoint                               what a save costs the loop
    python -m benchmarks.bench startup                                  the time to a first step
    python -m benchmarks.bench gpu --config=config/gpt2_124m.py         the rows of BENCHMARKS.md's GPU table

Each prints a line a round, then medians and spreads; `--json` prints all numbers as one JSON object in the end.

`train` runs train.py for `--steps`: tokens a second and milliseconds a step without evaluations and saves, the whole
run's seconds, peak memory, MFU. Where the configuration's data set is not there random tokens take its place. With
`--baseline` the plain loop runs in turn with it: what one would write first, and what nanoGPT does: whole logits,
random windows, a read of the loss at every step, evaluations of both splits on random batches, each followed by a
torch.save; on a CPU float32, eager and unfused AdamW, on CUDA bfloat16, compiled as a whole and fused AdamW, as nanoGPT
does there. `--profile=FILE` writes a torch profiler trace of a few steps instead.

`sample` has sample.py write 128 tokens behind a prompt of 16, with random weights of GPT-2 small; the baselines are
the same model without a cache (nanoGPT's way) and transformers' `generate` with its cache, both in float32. Then what a
token past block_size takes, in comparison with those before it.

`data` prints megabytes of text a second on every .py file of this Python with GPT-2's tokenizer: for prepare_data.py,
from start to exit, for a bare multiprocessing.Pool that encodes with tiktoken and throws the result away,
and for nanoGPT's way, `datasets.map(num_proc)` and a memory-mapped file. Then the peak memory of prepare_data.py's
whole process tree on that corpus and on twice of it, and the tokens a second that one core reads as training batches.

`checkpoint` trains GPT-2 small and prints the seconds that writing its checkpoint takes while the loop waits (a
synchronous save), those that the loop waits for the copy of the state (an asynchronous one), and by how much the steps
beside the writing thread are slower in all.

`startup` compares train.py's time to its first step with that of importing torch and building the model.

`gpu` prints a Markdown table: training at the configuration's micro-batch beside the plain loop, and at the largest
that fits; the time to the first step with a cold and a warm compiler cache; sampling 1 and 64 sequences at a time
beside nanoGPT's way.
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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

from flatgpt.data import sources
from flatgpt.data.loader import MixedOrder, TrainOrder, plan_batches
from flatgpt.data.records import text_of
from flatgpt.data.shards import Split, open_dataset
from flatgpt.data.sources import SourceConfig
from flatgpt.data.tokenizer import GPT2Tokenizer
from flatgpt.models.sampling import Sampler
from flatgpt.options import parse_options, run_script
from flatgpt.training.checkpoint import RunConfig, RunFolder
from flatgpt.training.device import pick_device, pick_dtype, pick_numerics
from flatgpt.training.distributed import Job, compile_parts
from flatgpt.training.metrics import peak_memory_gb
from flatgpt.training.optim import OptimConfig, build_optimizer
from flatgpt.training.resume import Progress
from model import GPT, GPTConfig
from train import TrainConfig

PROJECT = Path(__file__).resolve().parent.parent


@dataclass
class BenchConfig:
    what: Literal["train", "sample", "data", "checkpoint", "startup", "gpu", "plain", "generate", "uncached",
                  "transformers", "past", "pool", "map", "build"] = "train"  # from plain on: one way alone, a child's
    config: Annotated[str, "path"] = "config/shakespeare_char_cpu.py"  # configuration of the run
    options: str = ""  # more options for train.py, as on its command line
    steps: int = 0  # steps of a run; 0 = the configuration's max_iters, for gpu 20
    rows: int = 1  # sequences that generate and uncached sample side by side
    rounds: int = 3  # times that all ways are run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of train.py and sample.py; the baselines are float32
    baseline: bool = False  # run what people would use instead as well
    json: bool = False  # print the numbers as JSON
    profile: Annotated[str, "path"] = ""  # write a trace of a few training steps to this file


def main(argv: list[str]) -> None:
    """Run the ways in turn and print the ratios; or, as the child of that, one baseline alone, in this folder."""
    bench, _ = parse_options(BenchConfig, argv, usage=__doc__, bare_word="what")
    ways = {"train": bench_train, "sample": bench_sample, "data": bench_data, "checkpoint": bench_checkpoint,
            "startup": bench_startup, "gpu": bench_gpu, "plain": train_plainly, "generate": sample_rows,
            "uncached": sample_uncached, "transformers": sample_with_transformers, "past": sample_past_block_size,
            "pool": encode_in_pool, "map": prepare_plainly, "build": build_model}
    measured = profile_training(bench) if bench.profile else ways[bench.what](bench)
    if bench.json:
        print(json.dumps(measured))


def train_config(bench: BenchConfig) -> TrainConfig:
    return parse_options(TrainConfig, [bench.config, *shlex.split(bench.options)])[0]


def command(script: str, *args: str) -> list[str]:
    return [sys.executable, str(PROJECT / script), *args]


def run(script: str, *args: str, cwd: str | None = None) -> str:
    """A script's output. Raises OSError with the end of it when the script fails."""
    done = subprocess.run(command(script, *args), text=True, check=False, cwd=cwd, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    if done.returncode:
        raise OSError(f"{script} failed: {done.stdout[-500:]}")
    return done.stdout


def run_baseline(way: str, bench: BenchConfig, *args: str, cwd: str | None = None) -> dict[str, float]:
    out = run("benchmarks/bench.py", way, f"--config={Path(bench.config).resolve()}", f"--options={bench.options}",
              f"--dtype={bench.dtype}", "--json=True", *args, cwd=cwd)
    return json.loads(out.splitlines()[-1])


def rounds(bench: BenchConfig, ways: dict[str, Callable[[], dict[str, float]]], figures: tuple[str, ...]) -> dict:
    """Call all ways in turn, `bench.rounds` times, a line each; then for each figure the median of every way and the
    spread of its ratio, ours (the first way) to each other."""
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(1, bench.rounds + 1):
        for way, measure in ways.items():
            seen[way].append(measure())
            numbers = ", ".join(f"{key} {show(seen[way][-1].get(key))}" for key in figures)
            print(f"round {turn}: {way}: {numbers}", flush=True)
    ours = next(iter(ways))
    for key in figures:
        for way, runs in seen.items():
            if all(each.get(key) for each in (*runs, *seen[ours])):
                ratios = [mine[key] / theirs[key] for mine, theirs in zip(seen[ours], runs)]
                print(f"{way}: {key} median {show(statistics.median(each[key] for each in runs))}"
                      + (f"; {ours} / {way}: {spread(ratios)}" if way != ours else ""))
    return seen


def show(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def spread(ratios: list[float]) -> str:
    return f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"


# Training


def bench_train(bench: BenchConfig) -> dict:
    config = train_config(bench)
    steps = bench.steps or config.max_iters
    with tempfile.TemporaryDirectory() as folder:
        dataset = bench_dataset(config, folder)
        ways = {"train.py": partial(run_train, bench, steps, dataset, folder)}
        if bench.baseline:
            again = dataclasses.replace(bench, options=f"{bench.options} --dataset={dataset}")
            ways["the plain loop"] = partial(run_baseline, "plain", again, f"--steps={steps}")
        seen = rounds(bench, ways, ("tokens_per_sec", "ms_per_step", "run_s", "memory_gb", "mfu", "val_loss"))
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


def run_train(bench: BenchConfig, steps: int, dataset: str, folder: str) -> dict[str, float]:
    """A whole run of train.py, read from its metrics.jsonl. The first step, which warms up, counts for the run only."""
    out_dir = tempfile.mkdtemp(dir=folder)
    run("train.py", bench.config, *shlex.split(bench.options), f"--max_iters={steps}", f"--dtype={bench.dtype}",
        f"--dataset={dataset}", f"--out_dir={out_dir}/run", "--log_interval=1")
    records = [json.loads(line) for line in Path(out_dir, "run", "metrics.jsonl").read_text().splitlines()]
    options = json.loads(Path(out_dir, "run", "train_config.json").read_text())
    shutil.rmtree(out_dir)
    trained, last = [r for r in records if "train/loss" in r], records[-1]
    tokens_per_sec = statistics.median(r["tokens_per_sec"] for r in trained[1:] or trained)
    return {"tokens_per_sec": tokens_per_sec, "ms_per_step": 1000 * trained[0]["tokens"] / tokens_per_sec,
            "run_s": last["elapsed_s"], "memory_gb": trained[-1]["memory_gb"], "mfu": trained[-1]["mfu"],
            "val_loss": last["val/loss"], "batch_size": options["batch_size"]}


def train_plainly(bench: BenchConfig) -> dict[str, float]:
    """The reference: the same model and number of tokens a step."""
    config = train_config(bench)
    steps, folder = bench.steps or config.max_iters, tempfile.mkdtemp()
    dataset = open_dataset(config.data.dataset)
    torch.manual_seed(config.seed)
    device = pick_device(config.where.device)
    vocab_size = dataset.vocab_size or 50304
    model = GPT(GPTConfig(**asdict(config.model) | {"vocab_size": vocab_size})).to(device)
    plan = plan_batches(config.data, {}, config.model.block_size, 1)
    decay = [{"params": [p for p in model.parameters() if (p.dim() > 1) == is_matrix], "weight_decay": weight_decay}
             for is_matrix, weight_decay in ((True, config.optim.weight_decay), (False, 0.0))]
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(decay, config.optim.learning_rate, (config.optim.beta1, config.optim.beta2),
                                  fused=on_cuda)
    torch.set_float32_matmul_precision("high" if on_cuda else "highest")

    def cross_entropy(rows: torch.Tensor) -> torch.Tensor:
        logits = F.linear(model.hidden_states(rows[:, :-1]), model.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    if on_cuda:
        cross_entropy = torch.compile(cross_entropy)

    def loss_on(split: Split) -> torch.Tensor:
        size, tokens = config.model.block_size, split.shards[0]
        starts = torch.randint(len(tokens) - size, (plan.micro_batch,))
        rows = torch.stack([torch.from_numpy(tokens[i:i + size + 1].astype(np.int64)) for i in starts])
        rows = rows.pin_memory().to(device, non_blocking=True) if on_cuda else rows
        with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
            return cross_entropy(rows)

    began, step_seconds = time.perf_counter(), []
    for step in range(steps + 1):
        if step % config.eval_interval == 0 or step == steps:
            with torch.no_grad():
                for split in ("train", "val"):
                    [loss_on(dataset.splits[split]).item() for _ in range(config.eval_iters)]
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder, "ckpt.pt"))
        if step == steps:
            break
        step_began = time.perf_counter()
        for _ in range(plan.accumulation_steps):
            loss = loss_on(dataset.splits["train"]) / plan.accumulation_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        step_seconds.append(time.perf_counter() - step_began)
    shutil.rmtree(folder)
    step_s = statistics.median(step_seconds[1:] or step_seconds)
    return {"tokens_per_sec": plan.seqs_per_step * config.model.block_size / step_s, "ms_per_step": 1000 * step_s,
            "run_s": time.perf_counter() - began, "memory_gb": peak_memory_gb(device)}


def profile_training(bench: BenchConfig) -> None:
    """A trace of three steps of the configuration's model on random tokens, for chrome://tracing or Perfetto."""
    config = train_config(bench)
    device = pick_device(config.where.device)
    model = GPT(GPTConfig(**asdict(config.model) | {"vocab_size": config.model.vocab_size or 50257}))
    rows = max(1, config.data.batch_size) * config.model.block_size
    numerics, _ = pick_numerics(model, bench.dtype, config.attention, device, rows, {})
    job = Job(0, 1, device, numerics.dtype)
    model.to(device).set_attention(numerics.attention)
    if failure := compile_parts(model, config.compile, job, config.data.batch_size):
        print(f"torch.compile failed: {failure}")
    train_step = make_train_step(model, job, config.data.batch_size, config.model.block_size)
    [train_step() for _ in range(3)]
    with torch.profiler.profile() as profile:
        [train_step() for _ in range(3)]
    profile.export_chrome_trace(bench.profile)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))


def make_train_step(model: GPT, job: Job, batch_size: int, block_size: int) -> Callable[[], float]:
    """A function that makes a step on random tokens and gives the seconds it took."""
    optimizer = build_optimizer(model, OptimConfig())
    tokens = torch.randint(model.config.vocab_size, (batch_size, block_size + 1), device=job.device)

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

    train_step.optimizer = optimizer
    return train_step


# Sampling

SAMPLED = GPTConfig(bias=True, mlp="gelu_tanh")  # GPT-2 small
PROMPT_IDS = list(range(100, 116))
NEW_TOKENS = 128


def bench_sample(bench: BenchConfig) -> dict:
    """Rounds of sample.py and its baselines on random weights, then what a token past block_size takes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        GPT(SAMPLED).save_pretrained(folder)
        tokenizer = GPT2Tokenizer()
        tokenizer.save(Path(folder), model_max_length=1024)
        ways = {"sample.py": partial(run_sample, bench, folder, tokenizer.decode(PROMPT_IDS))}
        if bench.baseline:
            ways |= {"without a cache": partial(run_baseline, "uncached", bench, cwd=folder),
                     "transformers": partial(run_baseline, "transformers", bench, cwd=folder)}
        seen = rounds(bench, ways, ("tokens_per_sec",))
        past = run_baseline("past", bench, cwd=folder)
    print(f"{NEW_TOKENS} tokens, torch {torch.__version__}, {torch.get_num_threads()} threads; a token past block_size "
          f"{past['ms_past']:.1f} ms, before it {past['ms_before']:.1f} ms: {past['ms_past'] / past['ms_before']:.2f}")
    return seen | {"past block_size": past}


def run_sample(bench: BenchConfig, folder: str, prompt: str) -> dict[str, float]:
    out = run("sample.py", f"--init_from={folder}", f"--prompt={prompt}", "--num_samples=1",
              f"--max_new_tokens={NEW_TOKENS}", f"--dtype={bench.dtype}")
    return {"tokens_per_sec": float(out.splitlines()[-1].split()[0])}


def load_for_sampling(bench: BenchConfig) -> tuple[GPT, torch.Tensor]:
    """The model in this folder as sample.py would have it, and the prompt, bench.rows times."""
    device = pick_device("auto")
    model = GPT.from_pretrained(".")
    numerics, _ = pick_numerics(model, bench.dtype, "sdpa", device, 1, {}, training=False)
    model.to(device, numerics.dtype).eval()
    model.compile_decoding = device.type == "cuda"
    return model, torch.tensor([PROMPT_IDS] * bench.rows, device=device)


def sample_rows(bench: BenchConfig) -> dict[str, float]:
    """What sample.py does, for several rows at a time; what has to be compiled is compiled before."""
    model, idx = load_for_sampling(bench)
    cache = model.make_cache(bench.rows, idx.size(1) + NEW_TOKENS)
    for _ in range(2):
        began = time.perf_counter()
        for tokens in model.stream(idx, NEW_TOKENS, Sampler(0.8, 200), cache=cache):
            tokens.tolist()
        seconds = time.perf_counter() - began
    return {"tokens_per_sec": bench.rows * NEW_TOKENS / seconds}


def sample_past_block_size(bench: BenchConfig) -> dict[str, float]:
    """Milliseconds a token for the last 500 that fit into block_size, and for the next 500."""
    model, idx = load_for_sampling(bench)
    at = []
    for tokens in model.stream(idx, model.config.block_size - idx.size(1) + 500, Sampler(0.8, 200)):
        tokens.tolist()
        at.append(time.perf_counter())
    return {"ms_before": 2 * (at[-501] - at[-1001]), "ms_past": 2 * (at[-1] - at[-501])}


def sample_uncached(bench: BenchConfig) -> dict[str, float]:
    """nanoGPT's way: every position again for every token, the logits' top 200, multinomial; bfloat16 on CUDA."""
    device = pick_device("auto")
    model, idx = GPT.from_pretrained(".").to(device).eval(), torch.tensor([PROMPT_IDS] * bench.rows, device=device)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        for new_tokens in (8, NEW_TOKENS):  # the first to warm up
            began = time.perf_counter()
            for _ in range(new_tokens):
                logits = model(idx)[0][:, -1] / 0.8
                logits[logits < logits.topk(200).values[:, -1:]] = -float("inf")
                idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], dim=1)
            idx[-1, -1].item()
            seconds = time.perf_counter() - began
    return {"tokens_per_sec": bench.rows * NEW_TOKENS / seconds}


def sample_with_transformers(bench: BenchConfig) -> dict[str, float]:
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(".", dtype=torch.float32).eval()
    idx = torch.tensor([PROMPT_IDS])
    began = time.perf_counter()
    model.generate(idx, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.8,
                   top_k=200, pad_token_id=0)
    return {"tokens_per_sec": NEW_TOKENS / (time.perf_counter() - began)}


# Start-up


def bench_startup(bench: BenchConfig) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config = train_config(bench)
        dataset = bench_dataset(config, folder)
        # Its last words before it builds the optimiser and begins say what saving will take.
        return rounds(bench, {"train.py": partial(time_until, "saving: ", bench, dataset, folder),
                              "import torch and build": partial(time_of, "benchmarks/bench.py", "build", bench),
                              "train.py --help": partial(time_of, "train.py", "--help", None)}, ("seconds",))


def time_of(script: str, word: str, bench: BenchConfig | None) -> dict[str, float]:
    args = [f"--config={bench.config}", f"--options={bench.options}", "--json=True"] if bench else []
    began = time.perf_counter()
    out = run(script, word, *args)
    if bench:
        return json.loads(out.splitlines()[-1])
    return {"seconds": time.perf_counter() - began}


def time_until(words: str, bench: BenchConfig, dataset: str, folder: str, **env: str) -> dict[str, float]:
    """From the start of train.py until it prints a line that begins with `words`."""
    out_dir = tempfile.mkdtemp(dir=folder)
    args = command("train.py", bench.config, *shlex.split(bench.options), f"--dataset={dataset}",
                   f"--out_dir={out_dir}/run")
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


def build_model(bench: BenchConfig) -> dict[str, float]:
    """In a process of its own: the time of importing torch and of building the model, and of nothing else here."""
    config = asdict(train_config(bench).model)
    code = (f"import time; began = time.perf_counter(); import torch; from model import GPT, GPTConfig; "
            f"GPT(GPTConfig(**{config | {'vocab_size': config['vocab_size'] or 50257}})); "
            "print(time.perf_counter() - began)")
    out = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, text=True, check=True,
                         stdout=subprocess.PIPE).stdout
    return {"seconds": float(out)}


# A GPU


def bench_gpu(bench: BenchConfig) -> dict:
    """The rows of BENCHMARKS.md's table; on any device, for the sake of its test."""
    steps, seen = bench.steps or 20, {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = bench_dataset(train_config(bench), folder)
        once = f"{bench.options} --eval_iters=1 --eval_interval={10 * steps}"
        same, largest = (dataclasses.replace(bench, options=f"{once} {more}") for more in ("", "--batch_size=0"))
        plain = dataclasses.replace(same, options=f"{same.options} --dataset={dataset}")
        ways = {"train.py": partial(run_train, same, steps, dataset, folder),
                "the plain loop": partial(run_baseline, "plain", plain, f"--steps={steps}"),
                "train.py, largest batch": partial(run_train, largest, steps, dataset, folder)}
        seen |= rounds(bench, {way: partial(attempt, measure) for way, measure in ways.items()},
                       ("tokens_per_sec", "memory_gb", "mfu"))
        cache = {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=folder)}
        for name in ("cold start", "warm start"):
            seen[name] = [attempt(partial(time_until, "step 1/", same, dataset, folder, **cache))]
        GPT(SAMPLED).save_pretrained(folder)
        for rows in (1, 64):
            ways = {f"{way}, {rows} at a time": partial(run_baseline, way, bench, f"--rows={rows}", cwd=folder)
                    for way in ("generate", "uncached")}
            seen |= rounds(bench, {way: partial(attempt, measure) for way, measure in ways.items()},
                           ("tokens_per_sec",))
    device = pick_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"\n{name}, {pick_dtype(bench.dtype, device)}, torch {torch.__version__}, medians of {bench.rounds}:\n\n"
          "| | micro-batch | tokens/s | MFU | peak memory, GB | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for way, runs in seen.items():
        figures = [[each.get(key) for each in runs] for key in ("batch_size", "tokens_per_sec", "mfu", "memory_gb",
                                                                "seconds")]
        cells = ["" if None in values else show(statistics.median(values)) for values in figures]
        print(f"| {' | '.join([way if all(runs) else f'{way}: failed, see above', *cells])} |")
    return seen


def attempt(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What it measures; nothing, and why, where it fails: one way that a card has no memory for, as may be the plain
    loop with its whole logits, is not to cost the table its other rows."""
    try:
        return measure()
    except OSError as error:
        print(f"error: {error}", flush=True)
        return {}


# Checkpoints


def bench_checkpoint(bench: BenchConfig) -> dict:
    """Rounds of: a save that is waited for; some steps; a save, and steps beside it until it is written."""
    device = pick_device("auto")
    job = Job(0, 1, device, pick_dtype("auto", device))
    model = GPT(GPTConfig()).to(device)
    train_step = make_train_step(model, job, batch_size=1, block_size=256)
    with tempfile.TemporaryDirectory() as folder, RunFolder(RunConfig(folder, keep_last=1), job, print) as run:
        run.open({}, is_new=True)
        [train_step() for _ in range(3)]
        stalls, costs = [], []
        for turn in range(1, bench.rounds + 1):
            run.save(model, train_step.optimizer, None, asdict(Progress(step=2 * turn - 1)), False)
            began = time.perf_counter()
            run.poll()
            synchronous = time.perf_counter() - began  # writing alone: the copy is what the other way adds
            before = [train_step() for _ in range(10)]
            began = time.perf_counter()
            run.save(model, train_step.optimizer, None, asdict(Progress(step=2 * turn)), False)
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


# Data


def bench_data(bench: BenchConfig) -> dict:
    """Speeds in turn, then memory, then reading, all in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        ratios: dict[str, list[float]] = {"pool": [], "map": []}
        for turn in range(1, bench.rounds + 1):
            began = time.perf_counter()
            run("prepare_data.py", "python_source", f"--name=round{turn}", cwd=folder)
            seconds = {"ours": time.perf_counter() - began}
            for way in ratios:  # these say themselves how long they took, the imports of this file left out
                seconds[way] = run_baseline(way, bench, cwd=folder)["seconds"]
            made = open_dataset(f"{folder}/data/round{turn}")
            megabytes = made.manifest["bytes"] / 1e6
            for way in ratios:
                ratios[way].append(seconds[way] / seconds["ours"])
            print(f"round {turn}: {megabytes:.0f} MB; " + ", ".join(
                f"{way} {megabytes / s:.1f} MB/s ({s:.1f} s)" for way, s in seconds.items()), flush=True)
        for way, name in (("pool", "a bare pool"), ("map", "datasets.map and memmap")):
            print(f"ours / {name}: {spread(ratios[way])}")
        for copies in (1, 2):
            peak = tree_memory_gb(command("prepare_data.py", f"--input={write_corpus(folder, copies)}"), folder)
            print(f"peak memory of the process tree, corpus x {copies}: {peak:.2f} GB", flush=True)
        speed = reading_speed(made.splits["train"])
        print(f"reading batches of 12 x 1024: {speed / 1e6:.0f} million tokens/s a core, {os.cpu_count()} cores in "
              "this machine")
    return {"ours_to": ratios, "reading_tokens_per_sec": speed}


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


def tree_memory_gb(args: list[str], cwd: str) -> float:
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
    run_script(main)
