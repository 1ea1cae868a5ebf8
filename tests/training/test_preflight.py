"""flatgpt.training.preflight.py: the estimates against what is really kept and written, and the warnings."""

import collections
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN

from flatgpt.data.loader import BatchPlan
from flatgpt.training import preflight
from flatgpt.training.checkpoint import RunConfig, RunFolder
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig
from model import GPT, GPTConfig

HERE = Job(0, 1, torch.device("cpu"), torch.float32)
PLAN = BatchPlan(seqs_per_step=8, micro_batch=4, accumulation_steps=2, world_size=1)


def make_model(**options) -> GPT:
    return GPT(GPTConfig(**{"block_size": 64, "vocab_size": 300, "n_layer": 3, "n_head": 2, "n_embd": 64} | options))


def report(tmp_path, model=None, job=HERE, max_iters=100, **run_options) -> list[str]:
    run = RunFolder(RunConfig(str(tmp_path / "run"), **run_options), job)
    optim = OptimConfig(warmup_iters=50, lr_decay_iters=max_iters)
    return list(preflight.report(model or make_model(), PLAN, "has 9 sequences", run, 10, max_iters, optim, job))


def warnings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("warning:")]


def test_a_checkpoint_is_as_large_as_was_said(tmp_path):
    model = make_model(n_embd=256)
    with RunFolder(RunConfig(str(tmp_path / "run")), HERE) as run:
        run.open({}, is_new=True)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
        optimizer.step()
        run.save(model, optimizer, None, {"step": 1}, is_best=False)
        run.finish()
        really = sum(path.stat().st_size for path in run.steps()[0].rglob("*"))
    said = next(line for line in report(tmp_path, model) if line.startswith("saving"))
    assert int(said.split()[1]) == pytest.approx(really / 1e6, abs=1.5)


@pytest.mark.parametrize(("options", "kept"), [
    ({"keep_last": 3}, 5), ({"keep_last": 0}, 11), ({"keep_last": 3, "keep_every": 50}, 7), ({"keep_last": 30}, 11)])
def test_the_checkpoints_kept_are_counted(tmp_path, options, kept):
    assert any(f"at most {kept} kept" in line for line in report(tmp_path, **options))


def test_what_will_fail_is_a_warning(tmp_path, monkeypatch):
    assert warnings(report(tmp_path)) == []
    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr("flatgpt.training.preflight.shutil.disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
        assert "the disk will be full" in warnings(report(tmp_path))[0]
    with monkeypatch.context() as small:
        small.setattr("flatgpt.training.preflight.memory_bytes", lambda: 10**6)
        assert "will not fit: lower --batch_size" in warnings(report(tmp_path))[0]
    monkeypatch.setattr("flatgpt.launcher.UNDER_TORCHRUN", True)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in warnings(report(tmp_path))[0]
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert warnings(report(tmp_path)) == []


def test_a_run_says_it_before_anything_is_written(cli, tiny_data, monkeypatch):
    seen = []
    monkeypatch.setattr(RunFolder, "open", lambda *args, **kwargs: seen.append(Path("out").exists()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("train", *TINY_RUN)
    assert seen == [False]


def test_the_micro_batch_is_the_largest_that_memory_holds(monkeypatch):
    model = make_model(n_embd=128)
    monkeypatch.setattr("flatgpt.training.preflight.resident_bytes", lambda: 300_000_000)

    def needed(micro_batch: int) -> float:
        plan = BatchPlan(24, micro_batch, 24 // micro_batch, 1)
        return sum(preflight.memory_parts(model, plan, "adamw", HERE).values())

    for limit, free in (("memory_bytes", "free_memory_bytes"), ("free_memory_bytes", "memory_bytes")):
        monkeypatch.setattr(preflight, free, lambda: 10**12)
        held = 300_000_000 * (limit == "free_memory_bytes")  # what is free comes on top of what is held
        for micro_batch in (1, 4, 6, 24):
            monkeypatch.setattr(preflight, limit,
                                lambda n=micro_batch, held=held: 1.001 * needed(n) / preflight.ROOM - held)
            assert preflight.fit_batch_size(model, 24, HERE) == micro_batch
        monkeypatch.setattr(preflight, limit, lambda held=held: needed(1) - held)
        with pytest.raises(ValueError, match="not even one sequence of 64 tokens fits"):
            preflight.fit_batch_size(model, 24, HERE)


@pytest.mark.parametrize(("allowed", "in_trial"), [(1.0, 0.95), (0.5, 0.5)])
def test_a_gpus_trial_leaves_room_for_what_is_no_tensor(monkeypatch, allowed, in_trial):
    """What a pass is told to hold to, and what holds after the last trial, which has found the memory full."""
    limits, seen = [allowed], []

    def overflow(*args, **kwargs):
        seen.append(limits[-1])
        raise torch.OutOfMemoryError

    monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda device: limits[-1])
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda fraction, device: limits.append(fraction))
    monkeypatch.setattr("flatgpt.models.fused.LinearCrossEntropy.apply", overflow)
    assert preflight._gpu_trial(make_model(), HERE, "False")(PLAN) is False
    assert seen == [in_trial]
    assert limits[-1] == allowed


def test_what_was_fitted_is_forecast_to_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("flatgpt.training.preflight.memory_bytes", lambda: 600_000_000)
    monkeypatch.setattr("flatgpt.training.preflight.resident_bytes", lambda: 300_000_000)
    model = make_model(block_size=256, n_embd=128)
    micro_batch = preflight.fit_batch_size(model, 1024, HERE)
    assert 1 < micro_batch < 1024
    monkeypatch.setitem(globals(), "PLAN", BatchPlan(1024, micro_batch, 1024 // micro_batch, 1))
    lines = report(tmp_path, model)
    assert " of 0.6 GB (" in lines[2]
    assert warnings(lines) == []


def test_the_program_itself_is_part_of_the_forecast(tmp_path, monkeypatch):
    model = make_model()
    weights = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr("flatgpt.training.preflight.resident_bytes", lambda: 250_000_000 + weights)
    assert "program 310 MB" in report(tmp_path, model)[2]


def test_a_checkpoint_kept_for_good_has_to_be_one_that_is_saved(tmp_path):
    assert warnings(report(tmp_path, keep_every=50)) == []
    line, = warnings(report(tmp_path, keep_every=25))
    assert line.startswith("warning: keep_every=25 keeps only steps that are saved, and the run saves every 10 steps")


def test_batch_size_0_is_reported_and_kept_by_a_resume(cli, tiny_data, monkeypatch):
    options = [option for option in TINY_RUN if not option.startswith(("--batch_size", "--gradient"))]
    options += ["--batch_size=0", "--total_batch_size=128"]
    with monkeypatch.context() as small:
        small.setattr(preflight, "fit_batch_size", lambda model, seqs_per_rank, *rest: seqs_per_rank // 4)
        result = cli("train", *options, "--max_iters=3")
        assert result.code == 0, result.err
        assert "128 tokens a step = 4 micro-batches x 2 sequences" in result.out
    result = cli("train", *options)
    assert "4 micro-batches x 2 sequences" in result.out
    assert "changed: max_iters was 3, is 6\n" in result.out


def test_a_full_gpu_names_the_keys_to_turn(refused, tiny_data, monkeypatch):
    def overflow(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore of it.")

    monkeypatch.setattr("flatgpt.models.fused.LinearCrossEntropy.apply", overflow)
    line = refused("train", *TINY_RUN)
    assert "the memory of cpu is full: lower --batch_size (now 4) beside --total_batch_size=128, which keeps" in line
    assert "--activation_checkpointing=True" in line
    assert "Tried to allocate 20.00 GiB." in line
