"""bench.py: each way runs, and says what it measured."""

import json

import pytest
import torch
from conftest import TINY_RUN

from benchmarks.baselines import train_plainly
from model import GPTConfig

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


def test_without_the_data_set_random_tokens_are_trained_on(cli, config):
    config.write_text('dataset = "nowhere"\n')
    result = cli("benchmarks.bench", "train", f"--config={config}", f"--options={OPTIONS}", "--steps=2", "--rounds=1",
                 "--json=True")
    assert result.code == 0, result.err
    assert "no data set nowhere here: random tokens take its place" in result.out
    assert numbers_of(result.out)["train.py"][0]["val_loss"] == pytest.approx(10.82, abs=0.2)  # ln 50257


@pytest.mark.soak
def test_the_rows_of_the_gpu_table_come_from_any_device(cli, config, monkeypatch):
    monkeypatch.setattr("benchmarks.bench.SAMPLED",
                        GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=160, vocab_size=300))
    options = " ".join(option for option in OPTIONS.split() if not option.startswith(("--batch", "--gradient")))
    result = cli("benchmarks.bench", "gpu", f"--config={config}",
                 f"--options={options} --total_batch_size=128 --batch_size=4", "--steps=3", "--rounds=1", "--json=True")
    assert result.code == 0, result.err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.out.splitlines() if "| " in line]
    table = {row[0]: dict(zip(rows[0][1:], row[1:])) for row in rows[2:]}
    assert table["train.py"]["micro-batch"] == "4"
    assert table["train.py, largest batch"]["micro-batch"] == "8"
    assert {"warm start", "the plain loop", "generate, 64 at a time", "uncached, 1 at a time"} <= set(table)
    assert float(table["cold start"]["seconds"]) > 0.1
    assert all(numbers_of(result.out)[way][0]["tokens_per_sec"] > 0 for way in table if "start" not in way)


def test_a_way_that_fails_leaves_the_gpu_tables_other_rows(cli, config, monkeypatch):
    def measure(*args, **kwargs):
        if train_plainly in args:
            raise torch.OutOfMemoryError("CUDA out of memory")
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
