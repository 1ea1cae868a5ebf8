"""bench.py: each way runs, and says what it measured."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN

from benchmarks import kernels, scripts
from benchmarks.baselines import train_plainly
from benchmarks.kernels import Size, measure_all
from benchmarks.scripts import Results
from flatgpt.models.fused import ChunkLoss, swiglu
from flatgpt.planning.fit import Point
from flatgpt.training.finished_runs import FinishedRun
from model import GPT, CausalSelfAttention, GPTConfig

OPTIONS = " ".join(option for option in TINY_RUN if not option.startswith(("--dataset", "--out_dir", "--max_iters")))


def numbers_of(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def config(tiny_data):
    path = tiny_data.parent.parent / "tiny_run.py"
    path.write_text(f'dataset = "{tiny_data}"\n')
    return path


def test_training_is_measured_against_the_plain_loop(cli, config):
    result = cli("benchmarks.bench", "train", f"--config={config}", f"--options={OPTIONS}", "--steps=6", "--rounds=1",
                 "--baseline=True", "--json=True")
    assert result.code == 0, result.err
    assert "train.py / the plain loop: median" in result.out
    [ours], [plain] = (numbers_of(result.out)[way] for way in ("train.py", "the plain loop"))
    for way in (ours, plain):
        assert way["tokens_per_sec"] == pytest.approx(128_000 / way["ms_per_step"])
        assert way["run_s"] > 5 * way["ms_per_step"] / 1000
        assert 0.1 < way["memory_gb"] < 10
    assert ours["mfu"] is None
    assert "mfu unknown" in result.out  # of a CPU


def test_the_plain_loop_may_train_another_recipe(cli, config, tiny_data):
    other = config.with_name("other.py")
    other.write_text(f"""
dataset = "{tiny_data}"
n_layer = n_head = gradient_accumulation_steps = eval_iters = 1
n_embd = block_size = 16
batch_size = 4
max_iters = 3
device = "cpu"
""")
    result = cli("benchmarks.bench", "train", f"--config={config}", f"--options={OPTIONS}", "--steps=2", "--rounds=1",
                 "--baseline=True", f"--baseline_config={other}", "--json=True")
    assert result.code == 0, result.err
    [ours], [plain] = numbers_of(result.out).values()
    assert ours["tokens_per_sec"] == pytest.approx(128_000 / ours["ms_per_step"])
    assert plain["tokens_per_sec"] == pytest.approx(64_000 / plain["ms_per_step"])


NANOGPT = """
import os, sys
options = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
assert os.path.getsize("data/bench/train.bin") > os.path.getsize("data/bench/val.bin") > 0
print("step 0: train loss 4.1, val loss 4.2")
for step in range(int(options["max_iters"]) + 1):
    print(f"iter {step}: loss 3.5000, time {1000 if step == 0 else 250}.00ms, mfu -100.00%")
print(f"step {options['max_iters']}: train loss 3.1, val loss 3.25")
"""


def test_nanogpts_own_script_takes_the_place_of_the_plain_loop(cli, config, tmp_path, monkeypatch):
    """A stand-in that prints what nanoGPT's train.py prints, for the options that it gets."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/train.py").write_text(NANOGPT)
    monkeypatch.setattr("benchmarks.bench.NANOGPT", str(tmp_path / "checkout"))
    result = cli("benchmarks.bench", "train", f"--config={config}", f"--options={OPTIONS}", "--steps=2", "--rounds=1",
                 "--baseline=True", "--json=True")
    assert result.code == 0, result.err
    assert "train.py / nanoGPT: median" in result.out
    [theirs] = numbers_of(result.out)["nanoGPT"]
    assert theirs.pop("memory_gb") > 0
    assert theirs == {"tokens_per_sec": 512, "ms_per_step": 250, "run_s": 1.5, "val_loss": 3.25}
    (tmp_path / "checkout/train.py").write_text("import sys; sys.exit('no such option')")
    result = cli("benchmarks.bench", "train", f"--config={config}", f"--options={OPTIONS}", "--steps=2", "--rounds=1",
                 "--baseline=True")
    assert result.code
    assert "nanoGPT's train.py failed: no such option" in result.err


def test_decoding_is_measured_beside_bare_products(cli, monkeypatch):
    monkeypatch.setattr("benchmarks.bench.SAMPLED", GPTConfig(block_size=64, vocab_size=384, n_layer=1, n_head=1,
                                                              n_embd=16))
    result = cli("benchmarks.bench", "decode", "--rounds=1", "--dtype=float32", "--json=True")
    assert result.code == 0, result.err
    seen = numbers_of(result.out)
    [products] = seen["products of 1"]
    num_bytes = 4 * (384 * 16 + 12 * 16**2)
    assert products["gb_per_sec"] == pytest.approx(num_bytes * products["tokens_per_sec"] / 1e9)
    assert "1 at a time / 8 at a time: median" in result.out
    assert "1 at a time / products of 1: median" in result.out


def test_without_the_data_set_random_tokens_are_trained_on(cli, config):
    config.write_text('dataset = "nowhere"\n')
    result = cli("benchmarks.bench", "train", f"--config={config}", f"--options={OPTIONS}", "--steps=2", "--rounds=1",
                 "--json=True")
    assert result.code == 0, result.err
    assert "no data set nowhere here: random tokens take its place" in result.out
    assert numbers_of(result.out)["train.py"][0]["val_loss"] == pytest.approx(10.82, abs=0.2)  # ln 50257


TINY_KERNELS = Size(B=2, T=16, H=3, C=24, V=300, rows=32, layers=2)


def table_of(out: str, column: str) -> dict[str, dict[str, str]]:
    """The Markdown table that has such a column: its cells by row and column."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and f"| {column} |" in line)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:])]
    return {row[0]: dict(zip(rows[0][1:], row[1:])) for row in rows[2:]}


def test_each_kernel_is_measured_beside_the_way_that_it_replaced():
    measured = measure_all(TINY_KERNELS)
    without_a_row = {name for name, figures in measured.items() if "cuDNN" not in name and "now_ms" not in figures}
    assert without_a_row == set()
    assert sum("before_ms" in figures for figures in measured.values()) == 11
    assert all(figures["at_least_ms"] > 0 for figures in measured.values())


def test_the_ways_that_were_replaced_compute_the_same():
    with torch.no_grad():
        logits, targets = torch.randn(8, 384), torch.randint(-1, 300, (8, 1))
        ours, theirs = (part(logits.clone(), targets, 300, True) for part in (ChunkLoss(), kernels.ScatterLoss()))
        torch.testing.assert_close(ours, theirs)
        h = torch.randn(4, 6)
        assert torch.equal(kernels.two_chunks(h), swiglu(h))
        torch.manual_seed(0)
        config = TINY_KERNELS.config(pos="rope", qk_norm=True)
        context, x = GPT(config).attention_context(*2 * [torch.arange(16)]), torch.randn(2, 16, 24)
        attn, before = CausalSelfAttention(config), kernels.TransposedFirst(config)
        before.load_state_dict(attn.state_dict())
        torch.testing.assert_close(attn(x, context), before(x, context))


@pytest.mark.soak
def test_the_rows_of_the_gpu_table_come_from_any_device(cli, config, monkeypatch):
    monkeypatch.setattr("benchmarks.bench.KERNEL_SIZE", TINY_KERNELS)
    monkeypatch.setattr("benchmarks.bench.SAMPLED",
                        GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=160, vocab_size=300))
    options = " ".join(option for option in OPTIONS.split() if not option.startswith(("--batch", "--gradient")))
    result = cli("benchmarks.bench", "gpu", f"--config={config}",
                 f"--options={options} --total_batch_size=128 --batch_size=4", "--steps=3", "--rounds=1", "--json=True")
    assert result.code == 0, result.err
    table = table_of(result.out, "micro-batch")
    assert table["train.py"]["micro-batch"] == "4"
    assert table["train.py, largest batch"]["micro-batch"] == "8"
    assert {"warm start", "the plain loop", "generate, 64 at a time", "uncached, 1 at a time"} <= set(table)
    assert float(table["cold start"]["seconds"]) > 0.1
    assert all(numbers_of(result.out)[way][0]["tokens_per_sec"] > 0 for way in table if "start" not in way)
    gained = table_of(result.out, "before, ms")
    assert len(gained) == 11
    assert all(float(row["at least, ms"]) > 0 for row in gained.values())


def test_a_way_that_fails_leaves_the_gpu_tables_other_rows(cli, config, monkeypatch):
    def measure(*args, **kwargs):
        if train_plainly in args:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if measure_all in args:
            return {"zeroing": {"before_ms": 2.0, "now_ms": 1.0, "at_least_ms": 0.5}, "cuDNN's": {"at_least_ms": 3.0}}
        return {"tokens_per_sec": 10.0, "seconds": 2.0}

    for name in ("run_train", "in_child", "time_until"):
        monkeypatch.setattr(f"benchmarks.bench.{name}", measure)
    monkeypatch.setattr("benchmarks.bench.SAMPLED",
                        GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=160, vocab_size=300))
    result = cli("benchmarks.bench", "gpu", f"--config={config}", f"--options={OPTIONS}", "--rounds=2")
    assert result.code == 0, result.err
    assert "error: CUDA out of memory" in result.out
    assert "| the plain loop: failed, see above |  |  |  |  |  |" in result.out
    assert "| train.py |  | 10 |  |  | 2 |" in result.out
    assert "| uncached, 64 at a time |  | 10 |  |  | 2 |" in result.out
    assert "| zeroing | 2 | 1 | 0.5 |" in result.out
    assert "| cuDNN's |  |  | 3 |" in result.out


def planted_runs(monkeypatch, loss_of) -> list[str]:
    """Runs of train.py cost nothing and come to `loss_of(options)`; the list of those that were made. Their size is
    that of their blocks' matrices."""
    made: dict[str, str] = {}  # folder -> options

    def finished_run(folder: Path) -> FinishedRun:
        options = made[str(folder)]
        width, steps = (int(re.findall(rf"--{key}=(\d+)", f"--n_embd=128 --max_iters=1 {options}")[-1])
                        for key in ("n_embd", "max_iters"))
        return FinishedRun(Point(str(folder), width**2, 768 * steps, loss_of(options)), {}, "", True)

    def run(script: str, *args: str, **env: str) -> None:
        made[args[-1].removeprefix("--out_dir=")] = " ".join(args[:-1])

    monkeypatch.setattr(scripts, "run", run)
    monkeypatch.setattr(scripts, "finished_run", finished_run)
    return made.values()


def test_a_bench_of_many_runs_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    made = planted_runs(monkeypatch, lambda options: float(re.search(r"--seed=(\d+)", options)[1]))
    wanted = [f"config/demo.py --seed={seed}" for seed in (1, 2, 3)]
    first = Results(tmp_path / "out" / "runs.jsonl", 1).get(wanted[:2], jobs=2)
    assert [point.loss for point in first.values()] == [1, 2]
    again = Results(tmp_path / "out" / "runs.jsonl", 1).get([*wanted, wanted[2]], jobs=2)
    assert {run: point.loss for run, point in again.items()} == dict(zip(wanted, [1, 2, 3]))
    assert again.items() >= first.items()
    assert len(made) == 3


def test_a_run_of_a_bench_is_one_of_train_py(tiny_data, tmp_path):
    options = f"config/demo.py --dataset={tiny_data} {OPTIONS} --max_iters=3 --lr_decay_iters=3"
    point = Results(tmp_path / "runs.jsonl", 1).point(options)
    assert 1 < point.loss < 20
    assert point.name == options
    assert point.num_params > 0 < point.num_tokens


def test_the_ladder_compares_runs_of_one_seed(cli, monkeypatch, tmp_path):
    """Losses that differ by seed, and by 0.5 with RoPE, but only where the rest of the whole is not there; and by a law
    of the tokens."""
    def loss_of(options: str) -> float:
        chosen = dict(word.removeprefix("--").split("=") for word in options.split()[1:])  # later ones win
        is_rope, is_whole = chosen.get("pos") == "rope", chosen.get("tie_embeddings") == "False"
        of_tokens = (int(chosen["max_iters"]) / 200) ** -0.5
        return 2 + int(chosen["seed"]) / 1e6 + of_tokens - 0.5 * (is_rope and not is_whole)

    made = planted_runs(monkeypatch, loss_of)
    result = cli("benchmarks.ladder", "--sizes=0.8M", f"--results={tmp_path / 'runs.jsonl'}", f"--pictures={tmp_path}")
    assert result.code == 0, result.err
    assert "| RoPE | 0.500 (0.500 to 0.500) | 0.000 (0.000 to 0.000) |" in result.out
    assert "| 0.8M | 2.578 (2.577 to 2.579) | 3.000 (3.000 to 3.001) | 3.415 (3.414 to 3.416) |" in result.out
    assert len(made) == len(set(made))
    assert {"--max_iters=600", "--max_iters=200", "--max_iters=100", "--max_iters=50"} == {
        word for run in made for word in run.split() if word.startswith("--max_iters")}
    beta = float(re.search(r"beta +(\S+)", result.out)[1])
    assert beta == pytest.approx(0.5, rel=0.02)
    assert (tmp_path / "ladder_python_source.svg").read_bytes().startswith(b"<?xml")


def test_widths_finds_the_best_rate_of_each(cli, monkeypatch, tmp_path):
    """Losses are lowest at 2**-7 with width_base, and else at half of that for twice the width."""
    def loss_of(options: str) -> float:
        width, base, rate = (float(re.search(rf"--{key}=(\S+)", options)[1])
                             for key in ("n_embd", "width_base", "learning_rate"))
        return abs(math.log2(rate) + 7 + (0 if base else math.log2(width / 128)))

    planted_runs(monkeypatch, loss_of)
    result = cli("benchmarks.widths", f"--results={tmp_path / 'runs.jsonl'}", f"--picture={tmp_path / 'widths.svg'}")
    assert result.code == 0, result.err
    assert result.out.count("best rate 0.0078") == 5
    assert "without, 512 channels: best rate 0.0020, val loss 0.0" in result.out
    assert (tmp_path / "widths.svg").read_bytes().startswith(b"<?xml")
