"""A run that branches from a checkpoint of another one: it ends as if that one had been told so from its start."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY_RUN, files_of, records_of
from faults import start_ranks

from flatgpt import run_folder
from flatgpt.run_folder import read_trainer
from flatgpt.training.metrics import Reporter
from flatgpt.training.optim import OptimConfig, decay_from, learning_rate

CONSTANT = (*TINY_RUN, "--schedule=constant", "--max_iters=6", "--save_interval=2", "--keep_last=0",
            "--eval_interval=4", "--min_lr=1e-4")
DECAY = ("--schedule=wsd", "--max_iters=8")  # what a user tells the branch
FROM = ("--init_from=out/tiny", "--branch_from=step_4", "--out_dir=out/branch", "--device=cpu")
BRANCH = (*FROM, *DECAY)
WHOLE = (*CONSTANT, *DECAY, "--lr_decay_iters=8", "--decay_fraction=0.5", "--out_dir=out/whole")
STEP_8 = "checkpoints/step_00000008"


def state_of(run: str) -> list[bytes]:
    """What must not differ by a byte."""
    return [Path(run, STEP_8, name).read_bytes() for name in ("model.safetensors", "training/optimizer.safetensors")]


def batches_of(run: str, after: int = 0) -> dict[int, str]:
    return {r["step"]: r["batch_hash"] for r in records_of(run) if "batch_hash" in r and r["step"] > after}


@pytest.fixture
def lines(cli) -> str:
    """data/lines: documents of 1 to 60 bytes."""
    Path("lines.jsonl").write_text("".join(f'{{"text": "{i} {"so it goes " * (i * i % 6)}"}}\n' for i in range(150)))
    assert cli("prepare_data", "--input=lines.jsonl", "--tokenizer=byte", "--val_fraction=0.1").code == 0
    return "--dataset=lines"


@pytest.fixture
def constant(cli, tiny_data) -> Path:
    """A run at a constant learning rate that has saved steps 2, 4 and 6; its folder."""
    assert cli("train", *CONSTANT).code == 0
    return Path("out/tiny")


@pytest.mark.parametrize("options", [
    ("--documents=mask",), ("--optimizer=muon", "--muon_beta2=0.9", "--width_base=8", "--dropout=0.2"),
    ("--model=lstm", "--spike_sigma=3")])
def test_a_branch_equals_the_run_that_was_told_to_decay_from_the_start(cli, tiny_data, lines, options):
    for told in (CONSTANT, WHOLE):
        assert cli("train", *told, lines, *options).code == 0
    before = files_of(Path("out/tiny"))
    result = cli("train", *BRANCH)
    assert result.code == 0, result.err
    assert "branching from out/tiny/checkpoints/step_00000004 into out/branch at step 4; changed: " in result.out
    assert "schedule was constant, is wsd" in result.out
    assert "learning rate: 0.01 in the run that it branches from, 0.01 here, 0.002575 in the last step" in result.out
    assert state_of("out/branch") == state_of("out/whole")
    assert batches_of("out/branch") == batches_of("out/whole", after=4)
    assert files_of(Path("out/tiny")) == before
    first, *others = records_of("out/branch")
    assert first.items() >= {"step": 4, "branched_from": str(Path("out/tiny").absolute())}.items()
    assert all(record["step"] > 4 and "resumed" not in record for record in others)
    assert [read_trainer(f"out/{run}/{STEP_8}")["tokens"] for run in ("branch", "whole")] == [8 * 8 * 16] * 2


@pytest.mark.parametrize("options", [("--parallel=ddp", "--dropout=0.1"), ("--parallel=fsdp", "--optimizer=muon")])
def test_a_branch_on_two_processes_equals_that_run_too_and_one_process_reads_the_same(cli, tiny_data, tmp_path,
                                                                                     options):
    layout = options[0]
    for told in ((*CONSTANT, *options), (*WHOLE, *options), (*BRANCH, layout)):
        code, log = start_ranks(2, tmp_path, *told)
        assert code == 0, log
    assert log.count("branching from") == 1
    assert state_of("out/branch") == state_of("out/whole")
    assert cli("train", *BRANCH, "--out_dir=out/alone").code == 0
    assert batches_of("out/alone") == batches_of("out/whole", after=4)
    assert records_of("out/alone")[-1]["val/loss"] == pytest.approx(records_of("out/whole")[-1]["val/loss"], abs=1e-4)


def test_a_branch_that_is_interrupted_begins_anew_or_goes_on_from_its_own_checkpoint(cli, constant, monkeypatch):
    """Without its parent, once it has saved."""
    assert cli("train", *BRANCH, "--out_dir=out/whole").code == 0
    for num_steps, saved in ((1, []), (3, [6])):
        with monkeypatch.context() as patch:
            patch.setattr(Reporter, "count", interrupted(num_steps))
            result = cli("train", *BRANCH, "--save_interval=2")
        assert result.code == 130
        assert "branching from out/tiny/checkpoints/step_00000004" in result.out
        assert list(run_folder.step_folders(Path("out/branch"))) == saved
    constant.rename("out/elsewhere")
    assert "resuming out/branch at step 6\n" in cli("train", *BRANCH, "--save_interval=2").out
    assert state_of("out/branch") == state_of("out/whole")
    assert ["branched_from" in r for r in records_of("out/branch")].count(True) == 1
    assert json.loads(Path("out/branch/train_config.json").read_text())["branch_from"].endswith("step_00000004")
    assert "is finished: 8 steps" in cli("train", *BRANCH).out


def interrupted(num_steps: int):
    """Reporter.count that ends the process in this step."""
    count, steps = Reporter.count, itertools.count(1)

    def count_and_stop(reporter, tokens):
        count(reporter, tokens)
        if next(steps) == num_steps:
            raise KeyboardInterrupt

    return count_and_stop


@pytest.mark.parametrize("change", ["--branch_from=step_2", "--init_from=out/copy"])
def test_a_branch_stays_where_it_branched(cli, refused, constant, change):
    shutil.copytree(constant, "out/copy")
    assert cli("train", *BRANCH).code == 0
    assert "out/branch branches from out/tiny/checkpoints/step_00000004" in refused("train", *BRANCH, change)


def test_the_best_checkpoint_of_a_branch_is_one_of_its_own(cli, constant):
    """Though a step of its parent was better than all of them."""
    result = cli("train", *FROM, "--max_iters=8", "--eval_interval=2", "--learning_rate=10")
    assert result.code == 0, result.err
    own = {r["step"]: r.get("val/sampled_loss", r["val/loss"]) for r in records_of("out/branch") if "val/loss" in r}
    assert sorted(own) == [6, 8]
    assert min(own.values()) > read_trainer(constant / "checkpoints/step_00000004")["best_val_loss"]
    best = run_folder.best_checkpoint(Path("out/branch"))
    assert run_folder.step_of(best) == min(own, key=own.get)
    assert read_trainer(f"out/branch/{STEP_8}")["best_val_loss"] == min(own.values())


def test_a_branch_has_its_parents_options_but_for_those_that_it_was_told(cli, constant):
    assert cli("train", *FROM, "--max_iters=7", "--beta2=0.9").code == 0
    parents, own = (json.loads(Path(f"out/{run}/train_config.json").read_text()) for run in ("tiny", "branch"))
    assert {key for key in own if own[key] != parents[key]} == {
        "out_dir", "branch_from", "max_iters", "beta2", "save_interval", "keep_last"}
    assert own["init_from"] == "scratch"
    assert cli("report", "out/tiny", "out/branch").code == 0
    assert f"branch: {Path('out/tiny').absolute()}" in Path("report.html").read_text()
    assert cli("export", "--run=out/branch", "--to=model").code == 0
    assert "| branched from | step 4 of `tiny` |" in Path("model/README.md").read_text()


def test_a_branch_of_a_branch_goes_on_from_it(cli, constant):
    assert cli("train", *FROM, "--max_iters=8").code == 0
    assert cli("train", "--init_from=out/branch", "--branch_from=latest", "--out_dir=out/twig", "--max_iters=10",
               "--device=cpu").code == 0
    assert cli("train", *CONSTANT, "--max_iters=10", "--out_dir=out/whole").code == 0
    twig, whole = (Path(run, "checkpoints/step_00000010/model.safetensors") for run in ("out/twig", "out/whole"))
    assert twig.read_bytes() == whole.read_bytes()


REFUSED = [
    (["--branch_from=step_5"], "no checkpoint 'step_5' in out/tiny; it has best, latest, step_2, step_4, step_6"),
    (["--init_from=data/tiny"], "data/tiny is not a run folder with checkpoints"),
    (["--init_from=gpt2"], "gpt2 is not a run folder with checkpoints"),
    (["--init_from=scratch"], "branch_from=step_4 trains on from a checkpoint of --init_from=RUN, the folder of a run"),
    (["--init_from=resume"], "branch_from=step_4 trains on from a checkpoint of --init_from=RUN"),
    (["--eval_only=True"], "this is init_from=out/tiny, eval_only=True"),
    (["--out_dir=out/../out/tiny"], "is the run that is to be branched: choose another --out_dir"),
    (["--branch_from=latest", "--max_iters=6"], "step_00000006 has made 6 steps, and max_iters=6: raise --max_iters"),
    (["--seed=1", "--n_embd=32", "--batch_size=2"],
     "settings: seed was 1337, is 1; n_embd was 16, is 32; seqs_per_step was 8, is 4. Go on with those"),
    (["--optimizer=muon", "--dataset=lines"], "the tokens or the shares of the data sets changed"),
    (["--decay_lr=False"], "schedule=wsd needs decay_lr=True"),
    (["--resume=must"], "nothing to resume: out/branch holds no checkpoint"),
]


def test_what_cannot_be_branched_is_one_line_and_writes_nothing(refused, constant, lines):
    before = files_of(Path.cwd())
    for options, message in REFUSED:
        assert message in refused("train", *BRANCH, *options)
        assert files_of(Path.cwd()) == before
        assert not Path("out/branch").exists()


def test_a_damaged_checkpoint_is_not_branched_and_the_others_are_named(refused, constant):
    weights = constant / "checkpoints/step_00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert "model.safetensors has changed since it was saved (its checksum differs); besides it out/tiny has step_2, " \
        "step_6" in refused("train", *BRANCH)
    assert not Path("out/branch").exists()


@pytest.mark.parametrize(("given", "rates"), [
    ({"schedule": "wsd"}, {4999: 1.0, 5000: 1.0, 5250: 0.5, 5499: 0.002}),
    ({"schedule": "wsd", "decay_fraction": 0.1}, {4950: 1.0, 5225: 0.5}),
    ({"schedule": "wsd", "lr_decay_iters": 6000}, {5000: 1.0, 5500: 0.5}),
    ({}, {5000: 1.0, 5499: 1.0})])
def test_a_decay_that_is_not_told_otherwise_goes_from_the_branch_to_the_end(given, rates):
    config = OptimConfig(**{"schedule": "constant", "learning_rate": 1.0, "min_lr": 0.0, **given})
    decay_from(5000, 5500, config, given)
    assert {step: learning_rate(step, config) for step in rates} == pytest.approx(rates)


def test_a_decay_begins_at_a_whole_step_whatever_the_digits_of_its_fraction():
    for end in (5500, 7, 333, 600_000):
        for begin in range(1, end, max(1, end // 50)):
            config = OptimConfig(schedule="wsd", learning_rate=6e-4, warmup_iters=0, lr_decay_iters=end,
                                 decay_fraction=1 - begin / end)
            assert learning_rate(begin - 1, config) == learning_rate(begin, config) == 6e-4
            assert learning_rate(begin + 1, config) < 6e-4
