"""Runs that are killed, stopped, stalled, starved of disk or fed with NaN: nothing is lost that was saved, and the same
command ends where the undisturbed run ends.

Two ranks on CPU. Where torchrun has a part in it, it is torchrun that starts them; elsewhere they are forked, which is
faster. The whole matrix of faults and layouts carries the mark `soak`; `make test` runs a part of it, `make soak` all.
"""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
import torch
from conftest import ROOT, TINY_RUN, files_of, records_of, run_process
from faults import (
    LAYOUTS,
    RANKS,
    RUN,
    TINY,
    Torchrun,
    assert_same_end,
    newest_step,
    resumed_at,
    start_ranks,
    until,
)

import prepare_data
from flatgpt import files, signals
from flatgpt.run_folder import read_trainer, verify
from flatgpt.training import checkpoint, metrics
from flatgpt.training.distributed import Job

pytest_plugins = ["faults"]

OPTIONS = (*TINY_RUN, "--max_iters=100", "--lr_decay_iters=100", "--eval_interval=50", "--save_interval=20",
           "--dropout=0.1", "--keep_last=0")


def kill_after(step: int, delay_s: float, *options: str, cwd: Path, **faults: str) -> None:
    """Start a run and SIGKILL it once its checkpoint of `step` is there."""
    with open(cwd / "log", "w") as log:
        process = subprocess.Popen([sys.executable, planted.__file__, *options], cwd=cwd, env={**os.environ, **faults},
                                   stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while newest_step(cwd / "out" / "tiny") < step:
        assert process.poll() is None, (cwd / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_after_step_60_and_started_again_the_run_ends_byte_identical(cli, tiny_data, tmp_path):
    assert cli("train", *OPTIONS, "--out_dir=out/whole").code == 0
    kill_after(60, 0.0, *OPTIONS, cwd=tmp_path, HOLD_STEP="65")
    out = run_process(ROOT / "train.py", *OPTIONS, cwd=tmp_path)
    assert resumed_at(out) == [60]
    assert_same_end(TINY, Path("out/whole"), 100)


def test_killed_at_any_moment_every_published_checkpoint_is_whole(cli, tiny_data, tmp_path):
    options = (*OPTIONS, "--max_iters=100000", "--save_interval=1", "--eval_interval=100000", "--keep_last=2")
    for delay_s in (0.0, 0.03):
        kill_after(newest_step(tmp_path / "out" / "tiny") + 3, delay_s, *options, cwd=tmp_path)
        for folder in Path("out/tiny/checkpoints").glob("step_*"):
            verify(folder)
        assert Path("out/tiny/checkpoints/latest/SHA256SUMS").is_file()


def killed_at_operation(number: int, folder: Path, argv: list[str]) -> bool:
    """Run prepare_data.py in a forked child of this process that dies on the spot before its `number`-th operation on
    the disk's names, or sync; whether it came to that."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        return code == 9
    try:
        os.chdir(folder)
        count = itertools.count(1)

        def deadly(call):
            def die_or_call(*args, **options):
                if next(count) == number:
                    os._exit(9)
                return call(*args, **options)

            return die_or_call

        for module, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "unlink"),
                             (shutil, "rmtree")):
            setattr(module, name, deadly(getattr(module, name)))
        prepare_data.main(argv)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_data_preparation_survives_a_kill_at_any_operation_on_the_disk(cli, tmp_path, stride):
    documents = [f"document {i} " * (i % 7 + 1) for i in range(60)]
    argv = ["--input=../texts.jsonl", "--name=made", "--tokenizer=byte", "--shard_tokens=600",
            "--val_fraction=0.2", "--dedupe=True"]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents * 2))
    (tmp_path / "whole").mkdir()
    os.chdir(tmp_path / "whole")
    assert cli("prepare_data", *argv).code == 0
    expected = files_of(tmp_path / "whole" / "data" / "made")
    for number in itertools.count(1, stride):
        folder = tmp_path / str(number)
        folder.mkdir()
        was_killed = killed_at_operation(number, folder, argv)
        assert not killed_at_operation(0, folder, argv)  # goes on; no operation has the number 0
        assert files_of(folder / "data" / "made") == expected, f"killed before operation {number}"
        assert [path.name for path in (folder / "data").iterdir() if path.is_dir()] == ["made"]
        if not was_killed:
            break
    assert number > 40
    assert len([name for name in expected if name.endswith(".bin")]) >= 4


# The matrix: faults by layouts. A rank that is held waits after step 25, so that faults strike at a known place.

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


def cells(*quick: str):
    """All layouts, those that are not `quick` in the soak only."""
    return pytest.mark.parametrize("layout", [pytest.param(layout, marks=() if layout in quick else pytest.mark.soak)
                                              for layout in LAYOUTS])


@pytest.fixture
def launch(data):
    """launch("--key=value", HOLD_STEP="25"): start torchrun over two ranks in the current directory."""
    started = []

    def start(*options: str, nproc: int = 2, agent: tuple[str, ...] = ("--standalone", "--max-restarts=3"),
              cwd: Path = data, **faults: str) -> Torchrun:
        started.append(Torchrun(cwd, nproc, (*RUN, *options), agent, faults))
        return started[-1]

    yield start
    for run in started:
        run.kill()


def steps_saved(run: Path = TINY) -> list[int]:
    return [int(folder.name[5:]) for folder in sorted(run.glob("checkpoints/step_*"))]


def test_an_error_ends_all_ranks_without_an_abort(launch):
    """Python aborted in half of these, where threads of gloo outlived it."""
    for _ in range(3):
        run = launch("--resume=must", agent=("--standalone",), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
        assert run.wait() == 1
        assert run.log.count("error: nothing to resume") == 1
        assert "Fatal Python error" not in run.log


@linux
@cells("ddp")
def test_a_killed_rank_is_started_again_and_loses_nothing_that_was_saved(launch, undisturbed, layout):
    run = launch(*LAYOUTS[layout], nproc=RANKS[layout], HOLD_STEP="25")
    run.wait_until_held()
    os.kill(run.ranks()[{"ddp": 1, "fsdp": 0, "hsdp": 3}[layout]], signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert resumed_at(run.log) == [20]
    assert_same_end(TINY, undisturbed(layout))


@linux
@pytest.mark.soak
@cells()
def test_after_torchrun_was_killed_its_ranks_are_gone_and_the_same_command_goes_on(launch, undisturbed, layout):
    run = launch(*LAYOUTS[layout], nproc=RANKS[layout], HOLD_STEP="25")
    run.wait_until_held()
    assert sorted(run.ranks()) == list(range(RANKS[layout]))
    run.kill()
    again = launch(*LAYOUTS[layout], nproc=RANKS[layout])
    assert again.wait() == 0, again.log
    assert resumed_at(again.log) == [20]
    assert_same_end(TINY, undisturbed(layout))


@linux
@pytest.mark.soak
@pytest.mark.parametrize("delay_s", [0.0, 1.0])
def test_ranks_that_had_only_begun_to_start_are_gone_too(launch, delay_s):
    run = launch("--max_iters=100000", "--eval_interval=100000", "--save_interval=100000")
    run.wait_until(lambda: len(run.ranks()) == 2)
    time.sleep(delay_s)
    run.kill()


@linux
@pytest.mark.soak
@cells()
def test_sigterm_to_torchrun_saves_the_step_under_way(launch, undisturbed, layout):
    run = launch(*LAYOUTS[layout], nproc=RANKS[layout], HOLD_STEP="25")
    run.wait_until_held()
    run.process.terminate()
    assert run.wait() != 0
    assert "stopped by SIGTERM at step 26, and saved: the same command goes on from there" in run.log
    assert steps_saved() == [10, 20, 26]
    code, log = start_ranks(RANKS[layout], Path.cwd(), *RUN, *LAYOUTS[layout])
    assert code == 0, log
    assert resumed_at(log) == [26]
    assert_same_end(TINY, undisturbed(layout))


@linux
@pytest.mark.soak
@cells()
def test_a_rank_that_hangs_is_found_by_the_timeout_and_all_start_again(launch, undisturbed, layout):
    run = launch(*LAYOUTS[layout], "--timeout_s=15", nproc=RANKS[layout], HOLD_STEP="25")
    run.wait_until_held()
    os.kill(run.ranks()[1], signal.SIGSTOP)
    assert run.wait() == 0, run.log
    assert resumed_at(run.log) == [20]
    assert_same_end(TINY, undisturbed(layout))


@cells("ddp")
def test_a_full_disk_costs_the_checkpoint_that_did_not_fit(data, undisturbed, layout):
    options = (*RUN, *LAYOUTS[layout])
    code, log = start_ranks(RANKS[layout], data, *options, "--max_iters=25", FULL_AT="20-29")
    assert code == 2
    assert "warning: step 20 could not be saved: " in log
    assert "going on, what was saved before is intact" in log
    assert "saving failed 2 times in a row" in log  # the last one too, and that ends it
    assert steps_saved() == [10]
    code, log = start_ranks(RANKS[layout], data, *options, FULL_AT="30")
    assert code == 0, log
    assert resumed_at(log) == [10]
    assert steps_saved() == [10, 20, 40]
    assert_same_end(TINY, undisturbed(layout))


def flip_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def hide(folder: Path) -> None:
    """As a kill in the midst of a save leaves it."""
    cut_in_half(folder)
    (folder / "SHA256SUMS").unlink()
    folder.rename(folder.with_name(f".{folder.name}"))


@pytest.mark.parametrize("damage", [flip_byte, pytest.param(cut_in_half, marks=pytest.mark.soak), hide])
@cells("ddp")
def test_a_damaged_newest_checkpoint_is_passed_over(data, undisturbed, layout, damage):
    copy_until(30, undisturbed(layout))
    damage(TINY / "checkpoints" / "step_00000030")
    code, log = start_ranks(RANKS[layout], data, *RUN, *LAYOUTS[layout])
    assert code == 0, log
    assert resumed_at(log) == [20]
    assert ("warning: checkpoint out/tiny/checkpoints/step_00000030 is damaged" in log) == (damage is not hide)
    assert_same_end(TINY, undisturbed(layout))
    assert not list(TINY.glob("checkpoints/.*"))


def copy_until(step: int, run: Path) -> None:
    """A copy of a run as if it had been killed after the checkpoint of `step`."""
    shutil.copytree(run, TINY, symlinks=True, ignore=lambda _, names: [
        name for name in names if name.startswith("step_") and int(name[5:]) > step])
    latest = TINY / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to(f"step_{step:08d}")


# Asked to stop, or told to go on elsewhere


@pytest.mark.parametrize("number", [pytest.param(number, marks=() if number == signal.SIGTERM else pytest.mark.soak)
                                    for number in signals.STOP_SIGNALS])
def test_a_signal_finishes_the_step_saves_and_exits_with_75(cli, data, undisturbed, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Reporter, "count", raising_at(15, number, metrics.Reporter.count))
        result = cli("train", *RUN)
    assert result.code == 75
    assert result.out.splitlines()[-1] == (f"stopped by {signal.Signals(number).name} at step 16, and saved: the same "
                                           "command goes on from there")
    assert steps_saved() == [10, 16]
    result = cli("train", *RUN)
    assert result.code == 0
    assert resumed_at(result.out) == [16]
    assert_same_end(TINY, undisturbed("ddp", 1))


def raising_at(step: int, number: int, count: Callable) -> Callable:
    steps = itertools.count(1)

    def count_and_raise(*args):
        count(*args)
        if next(steps) == step:
            signal.raise_signal(number)

    return count_and_raise


@linux
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGHUP", marks=pytest.mark.soak)])
def test_a_reader_that_has_left_does_not_keep_a_run_from_saving(data, undisturbed, name):
    """`train.py | tee log`, where Ctrl-C ends tee as well; a terminal that is closed."""
    run = subprocess.Popen([sys.executable, planted.__file__, *RUN], cwd=data, env={**os.environ, "HOLD_STEP": "15"},
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: (data / "held").exists() or run.poll() is not None, lambda: run.stderr.read().decode())
    run.stdout.close()
    run.send_signal(signal.Signals[name])
    assert run.wait(60) == 75, run.stderr.read()
    assert steps_saved() == [10, 16]
    assert start_ranks(1, Path.cwd(), *RUN)[0] == 0
    assert_same_end(TINY, undisturbed("ddp", 1))


def test_max_minutes_stops_after_the_step_under_way(cli, data, undisturbed):
    for step in (1, 2):
        result = cli("train", *RUN, "--max_minutes=1e-4")
        assert result.code == 75
        assert result.out.splitlines()[-1].startswith(f"stopped by max_minutes=0.0001 at step {step}, and saved: ")
    assert cli("train", *RUN).code == 0
    assert_same_end(TINY, undisturbed("ddp", 1))


@linux
@pytest.mark.soak
@pytest.mark.parametrize(("name", "to"), [("SIGINT", "torchrun"), ("SIGUSR1", "torchrun"), ("SIGUSR1", "one rank")])
def test_the_signals_of_people_and_schedulers_reach_all_ranks(launch, undisturbed, name, to):
    run = launch(agent=("--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"), HOLD_STEP="25")
    run.wait_until_held()
    os.kill(run.process.pid if to == "torchrun" else run.ranks()[1], signal.Signals[name])
    assert run.wait() != 0
    assert f"stopped by {name} at step 26, and saved: the same command goes on from there" in run.log
    assert start_ranks(2, Path.cwd(), *RUN)[0] == 0
    assert_same_end(TINY, undisturbed("ddp"))


@pytest.mark.soak
def test_a_run_that_was_told_to_stop_is_not_started_again_by_torchrun(launch):
    run = launch("--max_minutes=1e-4", agent=("--standalone", "--max-restarts=3"))
    assert run.wait() != 0
    assert run.log.count("stopped by max_minutes=0.0001 at step 1, and saved") == 1
    assert "resuming" not in run.log
    assert steps_saved() == [1]


@linux
@pytest.mark.soak
def test_never_and_overwrite_speak_of_what_was_there_before_the_launch(cli, launch):
    assert cli("train", *RUN, "--max_iters=30").code == 0
    run = launch("--resume=never", "--overwrite=True", HOLD_STEP="25")
    run.wait_until(lambda: Path("held").exists() and steps_saved() == [10, 20])  # the old run is gone
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert resumed_at(run.log) == [20]
    assert steps_saved() == [10, 20, 30, 40]


@linux
@pytest.mark.soak
@pytest.mark.parametrize("held_at", [5, 25])
def test_never_goes_on_after_torchruns_own_restart_before_and_after_the_first_checkpoint(launch, held_at):
    run = launch("--resume=never", HOLD_STEP=str(held_at))
    saved = 20 if held_at > 20 else 0
    run.wait_until(lambda: Path("held").exists() and newest_step(TINY) == saved)
    os.kill(run.ranks()[0], signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert resumed_at(run.log) == [saved][:saved]
    assert steps_saved() == [10, 20, 30, 40]
    again = launch("--resume=never")
    assert again.wait() != 0
    assert "out/tiny holds a run, and resume=never" in again.log


def assert_same_batches(run: Path, other: Path) -> None:
    """Every step read the same windows as the same sequences, and the two runs got equally far."""
    ours, theirs = ({r["step"]: r["batch_hash"] for r in records_of(folder) if "batch_hash" in r}
                    for folder in (run, other))
    assert ours == theirs
    assert len(set(ours.values())) == 40
    assert records_of(run)[-1]["val/loss"] == pytest.approx(records_of(other)[-1]["val/loss"], abs=1e-3)


def test_a_run_goes_on_with_the_same_batches_on_half_the_ranks(data, undisturbed):
    copy_until(20, undisturbed("ddp"))
    code, log = start_ranks(1, data, *RUN)
    assert code == 0, log
    assert resumed_at(log) == [20]
    assert_same_batches(TINY, undisturbed("ddp"))


def test_a_run_goes_on_in_any_layout(data, undisturbed):
    copy_until(10, undisturbed("ddp"))
    for layout, nproc, end in (("hsdp", 4, 20), ("fsdp", 2, 25), ("ddp", 1, 33), ("hsdp", 4, 40)):
        code, log = start_ranks(nproc, data, *RUN, *LAYOUTS[layout], f"--max_iters={end}")
        assert code == 0, log
    assert resumed_at(log) == [10, 20, 25, 33]
    assert_same_batches(TINY, undisturbed("ddp"))


@linux
@pytest.mark.soak
@cells()
def test_a_run_of_four_ranks_ends_on_two_and_on_one(launch, undisturbed, layout):
    run = launch(*LAYOUTS[layout], nproc=4, HOLD_STEP="25")
    run.wait_until_held()
    run.process.terminate()
    assert run.wait() != 0
    for nproc, end in ((2, 33), (1, 40)):
        code, log = start_ranks(nproc, Path.cwd(), *RUN, f"--parallel={layout}", f"--max_iters={end}")
        assert code == 0, log
    assert resumed_at(log) == [26, 33]
    assert_same_batches(TINY, undisturbed(layout, 4))


@linux
@pytest.mark.soak
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_four_ranks_of_which_one_is_killed_end_byte_identical(launch, undisturbed, layout):
    run = launch(*LAYOUTS[layout], nproc=4, HOLD_STEP="25")
    run.wait_until_held()
    os.kill(run.ranks()[2], signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert resumed_at(run.log) == [20]
    assert_same_end(TINY, undisturbed(layout, 4))


@linux
@pytest.mark.soak
def test_a_run_that_is_killed_20_times_ends_byte_identical(launch, undisturbed):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    options = ("--max_iters=2000", "--save_interval=3", "--eval_interval=50", "--keep_last=3", "--log_interval=1")
    agent = ("--standalone", "--max-restarts=100")
    Path("slow").touch()  # so slow that it cannot end before the last kill
    run, victims = launch(*options, agent=agent, SLOW="slow"), []
    while len(victims) < 20:
        saved = newest_step(TINY)
        if rng.random() < 0.5:  # in the midst of training, or of a save; else mostly while it starts
            run.wait_until(lambda saved=saved: newest_step(TINY) > saved)
        time.sleep(rng.uniform(0, 1))
        assert run.process.poll() is None, f"seed {seed}, {victims}: {run.log}"
        ranks = run.ranks()
        victim = rng.choice(["torchrun", *ranks])
        victims.append(victim)
        if victim == "torchrun":
            run.kill()
            run = launch(*options, agent=agent, SLOW="slow")
        else:
            os.kill(ranks[victim], signal.SIGKILL)
            run.wait_until_restarted(victim, ranks[victim])
    assert newest_step(TINY) < 2000
    Path("slow").unlink()
    assert run.wait() == 0, f"seed {seed}, {victims}: {run.log}"
    assert_same_end(TINY, undisturbed("ddp", 2, "--max_iters=2000"), 2000)


# Two nodes


@pytest.fixture
def rendezvous():
    """torchrun's options for two agents that meet at a store in a process of its own, which no agent's end ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host = (f"import time, torch.distributed as d; s = d.TCPStore('127.0.0.1', {port}, is_master=True, "
            "wait_for_workers=False); time.sleep(1000)")
    process = subprocess.Popen([sys.executable, "-c", host])
    yield ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_conf=is_host=0",
           "--max-restarts=3")
    process.kill()
    process.wait()


@pytest.mark.soak
def test_two_agents_train_together(launch, rendezvous, undisturbed):
    agents = [launch(nproc=1, agent=rendezvous) for _ in range(2)]
    for agent in agents:
        assert agent.wait() == 0, agent.log
    assert_same_end(TINY, undisturbed("ddp"))


@linux
@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1])
def test_an_agent_that_is_killed_and_started_again_joins_the_other(launch, rendezvous, undisturbed, victim):
    agents = [launch(nproc=1, agent=rendezvous, HOLD_STEP="25") for _ in range(2)]
    agents[0].wait_until_held()
    agents[victim].kill()
    Path("go").touch()
    agents[victim] = launch(nproc=1, agent=rendezvous)
    for agent in agents:
        assert agent.wait() == 0, agent.log
    assert [step for agent in agents for step in resumed_at(agent.log)] == [20]
    assert_same_end(TINY, undisturbed("ddp"))


@linux
@pytest.mark.soak
def test_two_agents_without_a_shared_disk(launch, rendezvous, undisturbed, data):
    agents = []
    for name in ("one", "two"):
        (data / name).mkdir()
        (data / name / "data").symlink_to(data / "data")
        agents.append(launch(nproc=1, agent=rendezvous, HOLD_STEP="25", cwd=data / name))
    until(lambda: list(data.glob("*/held")) and list(data.glob("*/out/tiny/checkpoints/step_00000020")),
          lambda: "".join(agent.log for agent in agents))
    agents.sort(key=lambda agent: 1 in agent.ranks())  # the first agent gets rank 0, but that is not ours to know
    agents[1].kill()
    agents[1] = launch(nproc=1, agent=rendezvous, cwd=agents[1].cwd)
    (agents[0].cwd / "go").touch()
    for agent in agents:
        assert agent.wait() == 0, agent.log
    assert resumed_at(agents[0].log) == [20]
    assert_same_end(agents[0].cwd / TINY, undisturbed("ddp"))
    assert not (agents[1].cwd / "out").exists()


def test_without_a_shared_disk_rank_0_must_hold_the_newest_checkpoint(data, undisturbed, monkeypatch):
    (data / "other").mkdir()
    (data / "other" / "data").symlink_to(data / "data")
    copy_until(20, undisturbed("ddp"))
    with monkeypatch.context() as patch:
        patch.chdir("other")
        copy_until(30, undisturbed("ddp"))
    before = files_of(data / "out")
    code, log = start_ranks(2, data, *RUN, LAST_FOLDER="other")
    assert code == 2
    assert ("rank 1 finds the checkpoint of step 30 in out/tiny, but rank 0, which has to read it, finds that of "
            "step 20") in log
    assert files_of(data / "out") == before
    code, log = start_ranks(2, data / "other", *RUN, LAST_FOLDER=str(data))  # the other way round there is no harm
    assert code == 0, log
    assert resumed_at(log) == [30]


# Not the same job


def test_ranks_with_different_options_refuse_to_train(data):
    code, log = start_ranks(2, data, *RUN, LAST_OPTION="--learning_rate=1e-3")
    assert code == 2
    assert ("error: the processes do not run the same job: learning_rate is 0.001 on rank 1 and 0.01 on rank 0. Start "
            "every node with the same command, code and data") in log
    assert not Path("out").exists()


def test_ranks_with_different_data_refuse_to_train(data, shared):
    other = data / "other" / "data" / "tiny"
    shutil.copytree(shared / "data" / "tiny", other)
    shard = other / "train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[-2:] = content[-4:-2]
    content[-4:-2] = b"\1\0" if content[-2:] != b"\1\0" else b"\2\0"
    shard.write_bytes(content)
    code, log = start_ranks(2, data, *RUN, LAST_FOLDER="other")
    assert code == 2
    assert "error: the processes do not run the same job: the data is " in log
    assert ";" not in log  # and nothing else differs
    assert not Path("out").exists()


@pytest.mark.soak
def test_what_a_rank_raises_is_the_last_thing_on_the_screen(launch):
    run = launch(agent=("--standalone",), ERROR_STEP="12")
    assert run.wait() == 1
    summary = run.log.rpartition("Root Cause (first observed failure):")[2]
    assert "rank      : 1 (local_rank: 1)" in summary
    assert "RuntimeError: an error that the test has planted" in summary
    assert len(summary.splitlines()) < 40


# Divergence

one_and_two = pytest.mark.parametrize(("layout", "nproc"), [
    ("ddp", 1), pytest.param("ddp", 2, marks=pytest.mark.soak), pytest.param("fsdp", 2, marks=pytest.mark.soak),
    pytest.param("hsdp", 4, marks=pytest.mark.soak)])


@pytest.mark.parametrize(("layout", "nproc"), [
    ("ddp", 1), pytest.param("ddp", 2, marks=pytest.mark.soak), ("fsdp", 2),
    pytest.param("hsdp", 4, marks=pytest.mark.soak)])
def test_a_step_without_a_finite_loss_is_skipped_on_all_ranks_and_reported(data, layout, nproc):
    code, log = start_ranks(nproc, data, *RUN, *LAYOUTS[layout], NAN_STEPS="30")
    assert code == 0, log
    [warning] = [line for line in log.splitlines() if line.startswith("warning: step")]
    assert "step 30: the loss is nan; its update was skipped" in warning
    losses = {r["step"]: r["train/loss"] for r in records_of(TINY) if "train/loss" in r}
    assert [step for step, loss in losses.items() if loss is None] == [30]
    assert [r["skipped"] for r in records_of(TINY) if "skipped" in r] == [0] * 29 + [1] * 11
    assert steps_saved() == [10, 20, 40]  # not amid bad steps
    trainer = read_trainer(TINY / "checkpoints" / "latest")
    assert [trainer[key] for key in ("step", "skipped", "bad_steps", "rollbacks")] == [40, 1, 0, 0]
    assert records_of(TINY)[-1]["val/loss"] < losses[1]


@one_and_two
def test_bad_steps_in_a_row_take_the_run_back_and_on_behind_the_bad_data(data, undisturbed, layout, nproc):
    whole = undisturbed(layout, nproc, "--max_iters=60")
    options = (*RUN, *LAYOUTS[layout], "--max_bad_steps=3")
    code, log = start_ranks(nproc, data, *options, NAN_STEPS="30-32")
    assert code == 0, log
    assert "warning: too many bad steps in a row; going back to the checkpoint of step 20, and on with" in log
    [event] = [r for r in records_of(TINY) if "rollbacks" in r]
    assert [event[key] for key in ("step", "rollbacks", "skipped", "next_seq")] == [20, 1, 3, 32 * 8]
    trainer = read_trainer(TINY / "checkpoints" / "latest")
    assert [trainer[key] for key in ("step", "next_seq", "skipped", "bad_steps", "rollbacks")] == [40, 52 * 8, 3, 0, 1]
    at = records_of(TINY).index(event)
    assert [[*record] for record in records_of(TINY)[at - 3:at]] == [["step", "tokens", "elapsed_s", "fault"]] * 3
    assert [r["step"] for r in records_of(TINY) if "fault" in r] == [30, 31, 32]
    # Steps 21 to 32 of the data are left out, as if the run had gone from step 20 to what was step 33.
    ours, theirs = ([r["batch_hash"] for r in records_of(run) if "batch_hash" in r] for run in (TINY, whole))
    assert ours == theirs[:20] + theirs[32:52]
    TINY.rename("out/back")
    copy_until(20, whole)
    folder = TINY / "checkpoints" / "step_00000020"
    files.write_json(folder / "training" / "trainer.json", read_trainer(folder) | {"next_seq": 32 * 8})
    checkpoint._write_sums(folder)
    code, log = start_ranks(nproc, data, *options)
    assert code == 0, log
    assert_same_end(Path("out/back"), TINY)


@one_and_two
def test_a_run_that_keeps_diverging_stops_with_a_report_and_leaves_its_checkpoints(data, layout, nproc):
    code, log = start_ranks(nproc, data, *RUN, *LAYOUTS[layout], "--max_bad_steps=3", NAN_STEPS="30-")
    assert code == 2
    assert log.count("going back to the checkpoint of step 20") == 3
    [line] = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "the run diverges: 3 bad steps in a row up to step 23 (the last one: the loss is nan)" in line
    assert "12 in all, and going back 3 times did not help" in line
    assert steps_saved() == [10, 20]
    for folder in TINY.glob("checkpoints/step_*"):
        verify(folder)


def test_divergence_before_the_first_checkpoint_is_reported_too(data):
    code, log = start_ranks(1, data, *RUN, "--max_bad_steps=3", NAN_STEPS="5-")
    assert code == 2
    assert "and there is no checkpoint to go back to" in log.splitlines()[-1]
    assert steps_saved() == []


def test_three_failed_saves_in_a_row_end_the_run_and_with_more_disk_it_goes_on(data, undisturbed):
    options = (*RUN, "--save_interval=5")
    code, log = start_ranks(1, data, *options, "--max_iters=400", FULL_AT="20-")
    assert code == 2
    failed = [int(line.split()[2]) for line in log.splitlines() if "could not be saved" in line]
    assert failed in ([20, 25, 30], [20, 25, 30, 35])  # the fourth may have begun before the third was over
    assert f"error: saving failed {len(failed)} times in a row: " in log.splitlines()[-1]
    assert steps_saved() == [5, 10, 15]
    for folder in TINY.glob("checkpoints/step_*"):
        verify(folder)
    code, log = start_ranks(1, data, *options, FULL_AT="20-29")  # two do not
    assert code == 0, log
    assert resumed_at(log)[-1] == 15
    assert steps_saved() == [5, 10, 15, 30, 35, 40]
    assert_same_end(TINY, undisturbed("ddp", 1))


def test_a_stop_amid_bad_steps_is_saved_and_gone_when_the_run_has_gone_back(data):
    options = (*RUN, "--max_bad_steps=4")
    code, log = start_ranks(1, data, *options, NAN_STEPS="13-", STOP_STEP="14")
    assert code == 75, log
    assert steps_saved() == [10, 15]
    assert read_trainer(TINY / "checkpoints" / "latest")["bad_steps"] == 3
    code, log = start_ranks(1, data, *options, NAN_STEPS="1")  # the fourth
    assert code == 0, log
    assert resumed_at(log)[-1] == 15
    assert "going back to the checkpoint of step 10" in log
    assert steps_saved() == [10, 20, 30, 40]


def test_a_log_that_cannot_be_written_is_said_and_does_not_end_the_run(data, capsys):
    reporter = metrics.Reporter(data, metrics.LogConfig(), Job(0, 1, torch.device("cpu"), torch.float32))
    reporter.record({"step": 1, "loss": 2.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
    try:
        for step in (2, 3):
            reporter.record({"step": step, "loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    reporter.record({"step": 4, "loss": 2.0})
    assert [r["step"] for r in records_of(data)] == [1, 4]  # no torn line
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written (File too large)") == 1
