"""--profile: a trace and words of a few steps, from a run that trains the same bytes as without it."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_RUN, records_of
from faults import start_ranks
from torch.autograd import DeviceType

from flatgpt.training.profiling import BACKWARD, describe, matrices_of
from model import GPT, GPTConfig

RUN = (*TINY_RUN, "--max_iters=8", "--eval_interval=5", "--dropout=0.1")
MODEL = "checkpoints/step_00000008/model.safetensors"


def events_of(path: Path) -> list[str]:
    with gzip.open(path) as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_a_run_trains_the_same_bytes_and_says_what_took_the_time(cli, tiny_data):
    assert cli("train", *RUN, "--out_dir=out/plain").code == 0
    result = cli("train", *RUN, "--profile=3")
    assert result.code == 0, result.err
    assert Path("out/tiny", MODEL).read_bytes() == Path("out/plain", MODEL).read_bytes()
    assert [path.name for path in Path("out/tiny").glob("profile*")] == ["profile_step_00000004.json.gz"]
    names = events_of(Path("out/tiny/profile_step_00000004.json.gz"))
    assert len({name for name in names if name.startswith("ProfilerStep")}) == 3
    assert {"aten::mm", "evaluation, samples or saving"} <= set(names)  # that of step 5 fell into it
    said = result.out.partition("profiled 3 steps from step 4 on; what took the most time:\n")[2].splitlines()
    shares = [int(line.strip().split("%")[0]) for line in said[:5]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 102  # each is rounded
    assert "out/tiny/profile_step_00000004.json.gz: for ui.perfetto.dev" in said[5]
    speeds = {r["step"]: r["tokens_per_sec"] for r in records_of("out/tiny") if "tokens_per_sec" in r}
    assert [step for step, speed in speeds.items() if speed is None] == [3, 4, 5, 6]  # 3: the profiler warms up
    assert result.out.count("ms, profiled") == 4


def test_a_run_with_fewer_steps_left_writes_what_there_is(cli, tiny_data):
    assert "profiled 2 steps from step 4 on" in cli("train", *RUN, "--max_iters=5", "--profile=10").out
    result = cli("train", *RUN, "--max_iters=6", "--profile=10")  # goes on at step 5
    assert "nothing is profiled, since that begins with step 9, and max_iters=6" in result.out
    assert len(list(Path("out/tiny").glob("profile*"))) == 1


def test_rank_0_alone_is_profiled_and_a_stop_loses_nothing(tiny_data, tmp_path):
    code, log = start_ranks(2, tmp_path, *RUN, "--profile=20", "--max_iters=40", STOP_STEP="7")
    assert code == 75, log
    assert log.count("what took the most time") == 1
    steps = {name for name in events_of(Path("out/tiny/profile_step_00000004.json.gz"))
             if name.startswith("ProfilerStep")}
    assert len(steps) >= 3


def test_a_profiler_that_fails_ends_no_run(cli, tiny_data, monkeypatch):
    def fail(_, path: str):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", fail)
    result = cli("train", *RUN, "--profile=2")
    assert result.code == 0
    assert "warning: profiling failed (OSError: [Errno 28] No space left on device); going on without it" in result.out
    assert Path("out/tiny", MODEL).is_file()
    assert list(Path("out/tiny").glob("*profile*")) + list(Path("out/tiny").glob(".*profile*")) == []


@pytest.mark.parametrize(("options", "message"), [
    (["--profile=-1"], "profile=-1 must be 0 to 100"), (["--profile=101"], "profile=101 must be 0 to 100"),
    (["--profile=x"], "profile='x' is not a whole number"),
    (["--profile=5", "--eval_only=True"], "profile=5 is for training")])
def test_what_cannot_be_profiled_is_one_line(refused, tiny_data, options, message):
    assert message in refused("train", *RUN, *options)
    assert not Path("out").exists()


# Words

ROOT = SimpleNamespace(name="ProfilerStep*", cpu_parent=None)
NODE = SimpleNamespace(name=f"{BACKWARD}: MmBackward0", cpu_parent=ROOT)
HEAD = SimpleNamespace(name="LinearCrossEntropy", cpu_parent=ROOT)
EVALUATION = SimpleNamespace(name="evaluation, samples or saving", cpu_parent=ROOT)


def event(name: str, time_us: float, *shapes: list[int], parent: SimpleNamespace = ROOT) -> SimpleNamespace:
    return SimpleNamespace(name=name, cpu_parent=parent, input_shapes=shapes, device_type=DeviceType.CPU,
                           self_cpu_time_total=time_us, self_device_time_total=2 * time_us)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_the_words_are_of_the_shares_of_time_and_name_the_part_of_the_model(on_cuda):
    """Worked by hand: 100 microseconds in all, but for an evaluation's and a kernel's own event on the device."""
    matrices = matrices_of(GPT(GPTConfig(block_size=8, vocab_size=200, n_layer=1, n_head=2, n_embd=16)))
    events = [
        event("aten::mm", 20, [60, 24], [24, 16], parent=NODE),  # of no matrix of the model
        event("aten::addmm", 12, [64], [72, 16], [16, 64]), event("aten::mm", 10, [72, 64], [64, 16]),
        event("aten::mm", 18, [64, 72], [72, 16], parent=NODE),  # the gradient of c_fc, from 72 tokens
        event("aten::bmm", 5, [4, 72, 8], [4, 8, 72]), event("aten::mm", 5, [72, 16], [16, 256], parent=HEAD),
        event("aten::_fused_adamw_", 4), event("aten::gelu_backward", 15, [72, 64], parent=NODE),
        event("vendor::something", 11), event("aten::mm", 900, [72, 16], [16, 64], parent=EVALUATION)]
    kernel = event("sgemm", 500)
    kernel.device_type = DeviceType.CUDA
    assert describe([*events, kernel], matrices, on_cuda) == [
        "22% matrix products of the MLP, forward (aten::addmm, aten::mm)",
        "20% matrix products of other parts, backward (aten::mm)",
        "18% matrix products of the MLP, backward (aten::mm)",
        "15% the activation function, backward (aten::gelu_backward)",
        "11% vendor::something, forward (vendor::something)"]


def test_parts_of_one_size_are_named_together():
    matrices = matrices_of(GPT(GPTConfig(block_size=8, vocab_size=200, n_layer=1, n_head=2, n_embd=16, mlp_hidden=16)))
    assert matrices[16, 16] == "attention or the MLP"
    assert matrices[16, 256] == "the head"  # in rows padded to a multiple of 128
    assert torch.Size([48, 16]) == GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16)).h[0].attn.c_attn.weight.shape
    assert matrices[16, 48] == "attention"
