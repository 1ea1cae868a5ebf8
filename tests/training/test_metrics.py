"""metrics.py: the numbers of a run, and the file they are kept in."""

import json
import math
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, TINY_RUN, records_of, write_shard
from faults import LAYOUTS, start_ranks

from flatgpt import run_folder
from flatgpt.data.order import EvalOrder
from flatgpt.data.shards import Split
from flatgpt.data.tokenizer import CharTokenizer, load_tokenizer
from flatgpt.training.compiling import compile_in_place
from flatgpt.training.distributed import Job
from flatgpt.training.metrics import (
    LogConfig,
    Reporter,
    Validation,
    cut_metrics,
    cut_to_events,
    peak_flops,
    summarize,
    validation_loss,
)
from flatgpt.training.resume import fresh_state
from flatgpt.training.samples import write_samples
from model import GPT, GPTConfig

HERE = Job(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, dropout=0.5))


def test_validation_loss_is_the_mean_over_every_target(tmp_path, model):
    tokens = np.random.default_rng(0).integers(0, 11, 45)
    write_shard(tmp_path / "val_000000.bin", tokens)
    order = EvalOrder(Split([tmp_path / "val_000000.bin"], 11), block_size=8)
    model.eval()
    total = 0.0
    for start in range(0, 44, 8):
        window = torch.from_numpy(tokens[start:start + 9])
        log_probs = model(window[None, :-1])[0][0].log_softmax(-1)
        total -= log_probs[range(len(window) - 1), window[1:]].sum().item()
    model.train()
    for batch_size in (1, 4, 100):
        assert validation_loss(model, order, batch_size, HERE) == pytest.approx(total / 44, abs=1e-5)
    assert model.training


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA L40", None), ("Tesla T4", 65e12), ("NVIDIA A10", None), ("Some GPU", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None)])
def test_peak_is_known_or_unknown_but_never_guessed(monkeypatch, name, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_lines_past_the_checkpoint_and_a_torn_tail_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "tra')
    cut_metrics(path, 2)
    assert path.read_text().splitlines() == lines[:3]
    cut_metrics(path, 0)
    assert path.read_text() == ""


def test_of_what_a_run_went_back_from_the_events_stay_without_the_losses(tmp_path):
    def line(step: int, **others: object) -> dict:
        return {"step": step, "tokens": 8 * step, "train/loss": None, "elapsed_s": 1.0, "skipped": 1} | others

    path = tmp_path / "metrics.jsonl"
    run_folder.write_records(path, [line(1, fault="f"), line(2), line(3), line(4, fault="f"), {
        "step": 4, "val/loss": 2.0, "elapsed_s": 1.0}, {"step": 4, "resumed": True, "elapsed_s": 1.0}])
    cut_to_events(path, 2)
    kept = [line(1, fault="f"), line(2), {"step": 4, "tokens": 32, "elapsed_s": 1.0, "fault": "f"},
            {"step": 4, "resumed": True, "elapsed_s": 1.0}]
    assert run_folder.read_records(path) == kept
    back = {"step": 2, "rollbacks": 1, "elapsed_s": 1.0}
    run_folder.write_records(path, [*kept, back, line(3, fault="g"), line(4)])
    cut_to_events(path, 1)  # and further back
    again = {"step": 3, "tokens": 24, "elapsed_s": 1.0, "fault": "g"}
    assert run_folder.read_records(path) == [kept[0], *kept[2:], back, again]
    run_folder.write_records(path, [*kept, back, line(3), line(4)])
    cut_metrics(path, 3)
    assert run_folder.read_records(path) == [*kept, back, line(3)]
    cut_metrics(path, 2)
    assert run_folder.read_records(path) == [*kept, back]
    cut_metrics(path, 1)
    assert run_folder.read_records(path) == kept[:1]


def test_tokens_of_a_run_that_went_back_and_ended_there_are_not_those_it_lost():
    records = [{"step": 1, "tokens": 8, "train/loss": 2.0, "tokens_per_sec": 5.0, "elapsed_s": 1.0},
               {"step": 3, "tokens": 24, "fault": "f", "elapsed_s": 3.0}, {"step": 1, "rollbacks": 1, "elapsed_s": 4.0}]
    assert summarize(records) == {"step": 1, "elapsed_s": 4.0, "tokens": 8, "tokens_per_sec": 5.0}


def test_a_run_reports_the_documented_fields(cli, tiny_data):
    assert cli("train", *TINY_RUN, "--log_interval=2").code == 0
    records = records_of("out/tiny")
    train = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in train] == [1, 2, 4, 6]
    assert train[0].keys() == {"step", "tokens", "train/loss", "lr", "grad_norm", "tokens_per_sec", "mfu", "memory_gb",
                               "elapsed_s", "batch_hash", "skipped"}
    assert train[0]["tokens"] == 8 * 16
    assert train[0]["mfu"] is None  # the peak of a CPU is unknown
    assert 0 < train[0]["memory_gb"] < 100
    evaluations = [r for r in records if "val/loss" in r]
    assert [r["step"] for r in evaluations] == [0, 3, 6]
    assert evaluations[0]["val/loss"] == pytest.approx(math.log(len(set(TEXT))), abs=0.05)
    assert "val/sampled_loss" in evaluations[-1]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("script"), reason="needs Linux's `script`")
@pytest.mark.parametrize(("columns", "line"), [
    (100, r"\d+/30 \|.{12,}\| loss \d\.\d{3} [↓→↑] · val \d\.\d{3} · [\d,]+ tok/s · [\d:?]+ left"),
    (60, r"\d+/30 loss \d\.\d{3} [↓→↑] · val \d\.\d{3} · [\d:?]+ left"),
    (24, r"\d+/30 loss \d\.\d{3} [↓→↑]")])
def test_a_terminal_gets_a_line_that_fits_it(tiny_data, tmp_path, columns, line):
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *TINY_RUN, "--max_iters=30"])
    subprocess.run(["script", "-qec", command, "log"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "COLUMNS": str(columns)})
    shown = [text.strip() for text in re.split(r"[\r\n]", (tmp_path / "log").read_text())]
    lines = [text for text in shown if re.match(r"\d+/30 ", text)]
    assert any(re.fullmatch(line, text) for text in lines), lines
    assert all(len(text) < columns for text in lines)
    assert any(text.startswith("step 3: val loss") for text in shown)
    assert not any(text.startswith("step 2/30: loss") for text in shown)  # the line says it


SAMPLES = ("--sample_interval=2", "--sample_tokens=40")  # more than block_size


@pytest.mark.parametrize(("layout", "nproc"), [
    ("ddp", 1), pytest.param("ddp", 2, marks=pytest.mark.soak), ("fsdp", 2),
    pytest.param("hsdp", 4, marks=pytest.mark.soak)])
def test_a_run_that_writes_samples_ends_as_one_that_does_not(cli, tiny_data, tmp_path, layout, nproc):
    run = (*TINY_RUN, "--dropout=0.1", "--batch_size=2", *LAYOUTS[layout], "--max_iters=7")
    for name, options in (("silent", ()), ("writes", SAMPLES)):
        code, log = start_ranks(nproc, tmp_path, *run, *options, f"--out_dir=out/{name}")
        assert code == 0, log
    silent, writes = Path("out/silent"), Path("out/writes")
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        ours, theirs = (run / "checkpoints/latest" / file for run in (writes, silent))
        assert ours.read_bytes() == theirs.read_bytes()
    records = [record for record in records_of(writes) if "samples" in record]
    assert [record["step"] for record in records] == [2, 4, 6, 7]
    assert all(record.keys() == {"step", "samples", "elapsed_s"} for record in records)
    model, tokenizer = GPT.from_pretrained(writes), load_tokenizer(writes / "checkpoints/latest")
    assert records[-1]["samples"] == write_samples(model, tokenizer, 40, HERE)
    assert [len(text) for record in records for text in record["samples"]] == [40] * 8
    assert log.count("step 6: sample 1 of 2") == 1  # rank 0 alone speaks
    assert records[-1]["samples"][1] in log


def test_a_run_that_goes_on_writes_no_sample_twice(cli, tiny_data):
    assert cli("train", *TINY_RUN, *SAMPLES, "--max_iters=4", "--save_interval=4").code == 0
    first = records_of("out/tiny")
    assert cli("train", *TINY_RUN, *SAMPLES).code == 0
    assert [r["step"] for r in records_of("out/tiny") if "samples" in r] == [2, 4, 6]
    assert records_of("out/tiny")[:len(first)] == first


def test_samples_do_not_count_as_training(cli, tiny_data, monkeypatch):
    monkeypatch.setattr("flatgpt.training.samples.write_samples", lambda *args: time.sleep(0.5) or ["text"])
    assert cli("train", *TINY_RUN, "--sample_interval=1").code == 0
    speeds = [record["tokens_per_sec"] for record in records_of("out/tiny") if "tokens_per_sec" in record]
    assert min(speeds[1:]) > 128 / 0.5


def test_the_time_of_training_leaves_out_evaluations_and_is_kept_over_a_restart(cli, tiny_data, monkeypatch):
    losses = Validation.losses
    monkeypatch.setattr(Validation, "losses", lambda *args, **options: (time.sleep(0.4), losses(*args, **options))[1])
    seen = [run_folder.read_trainer(Path("out/tiny/checkpoints/latest")) for steps in (3, 6)
            if cli("train", *TINY_RUN, f"--max_iters={steps}").code == 0]
    assert seen[0]["elapsed_s"] - seen[0]["train_s"] > 0.8  # at step 0 and 3
    assert seen[1]["elapsed_s"] - seen[1]["train_s"] > 1.2
    assert 0 < seen[0]["train_s"] < seen[1]["train_s"]


def test_samples_do_not_meet_the_compiler(model):
    met = []
    compile_in_place(model, backend=lambda graph, inputs: met.append(graph) or graph.forward)
    tokenizer = CharTokenizer(list("abcdefghij\n"))
    write_samples(model, tokenizer, 12, HERE)
    assert not met
    model(torch.zeros(1, 8, dtype=torch.long))
    assert met  # and training does


def test_control_characters_of_a_sample_do_not_reach_the_terminal(tmp_path, model, capsys):
    reporter = Reporter(tmp_path, LogConfig(), HERE)
    reporter.start(model, 0, fresh_state(), {"max_iters": 1}, is_new=True)
    text = "a\tb\n\x1b[31mred\x00\x07\r\x7f\x9b2J \\x1b \xa0\xe9 end"
    reporter.samples(1, [text], [""])
    assert "a\tb\n\\x1b[31mred\\x00\\x07\\x0d\\x7f\\x9b2J \\x1b \xa0\xe9 end\n---" in capsys.readouterr().out
    assert records_of(tmp_path)[-1]["samples"] == [text]


def test_going_back_on_a_full_disk_is_said_and_does_not_end_the_run(tmp_path, model, capsys):
    reporter = Reporter(tmp_path, LogConfig(), HERE)
    reporter.start(model, 0, fresh_state(), {"max_iters": 9}, is_new=True)
    for step in (1, 2, 3):
        reporter.record({"step": step, "loss": 2.0, "tokens": step})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        reporter.rollback(1, 1, 2, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record["step"] for record in records_of(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written (") == 1


def test_samples_need_a_tokenizer_and_sound_numbers(refused, cli, tiny_data):
    (tiny_data / "tokenizer.json").unlink()
    assert "sample_interval=2 needs a tokenizer, and tiny has none" in refused("train", *TINY_RUN, *SAMPLES)
    assert "sample_tokens=0 must be positive" in refused("train", *TINY_RUN, "--sample_tokens=0")
