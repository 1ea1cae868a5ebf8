"""Runs that are killed, stopped, stalled, starved of disk or fed with NaN: nothing is lost that was saved, and the same
command ends where the undisturbed run ends.

Two ranks on CPU. Where torchrun has a part in it, it is torchrun that starts them; elsewhere they are forked, which is
faster. The whole matrix of faults and layouts carries the mark `soak`; `make test` runs a part of it, `make soak` all.
"""

import itertools
import json
import os
import random
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
from conftest import ROOT, TEXT, TINY_RUN, files_of, on_ranks, records_of, run_process
from filelock import FileLock

import metrics
import prepare_data
import settings
import train
from checkpoint import read_trainer, verify

OPTIONS = (*TINY_RUN, "--max_iters=100", "--lr_decay_iters=100", "--eval_interval=50", "--save_interval=20",
           "--dropout=0.1", "--keep_last=0")


def newest_step(run: Path) -> int:
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step_*")), default=0)


def kill_after(step: int, delay_s: float, *options: str, cwd: Path) -> None:
    """Start a run and SIGKILL it once its checkpoint of `step` is there."""
    with open(cwd / "log", "w") as log:
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *options], cwd=cwd, stdout=log, stderr=log)
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
    # An evaluation of the whole split after every step gives the killer time to meet the run before its end.
    command = (*OPTIONS, "--eval_interval=1", "--eval_iters=0")
    kill_after(60, 0.0, *command, cwd=tmp_path)
    killed_at = newest_step(tmp_path / "out" / "tiny")
    assert 60 <= killed_at < 100
    out = run_process(ROOT / "train.py", *command, cwd=tmp_path)
    assert f"resuming out/tiny at step {killed_at}" in out
    model = "checkpoints/step_00000100/model.safetensors"
    assert Path("out/tiny", model).read_bytes() == Path("out/whole", model).read_bytes()
    steps = [record["step"] for record in records_of("out/tiny") if "train/loss" in record]
    assert steps == list(range(1, 101))


def test_killed_at_any_moment_every_published_checkpoint_is_whole(cli, tiny_data, tmp_path):
    options = (*OPTIONS, "--max_iters=100000", "--save_interval=1", "--eval_interval=100000", "--keep_last=2")
    for delay_s in (0.0, 0.013, 0.05):
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


def test_data_preparation_survives_a_kill_at_any_operation_on_the_disk(cli, tmp_path):
    documents = [f"document {i} " * (i % 7 + 1) for i in range(60)]
    argv = ["--input=../texts.jsonl", "--name=made", "--tokenizer=byte", "--shard_tokens=600",
            "--val_fraction=0.2", "--dedupe=True"]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents * 2))
    (tmp_path / "whole").mkdir()
    os.chdir(tmp_path / "whole")
    assert cli("prepare_data", *argv).code == 0
    expected = files_of(tmp_path / "whole" / "data" / "made")
    for number in itertools.count(1):
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


# The matrix: faults by layouts. `held` is a rank that waits after step 25, so that faults strike at a known place.

RUN = (*TINY_RUN, "--batch_size=2", "--gradient_accumulation_steps=4", "--max_iters=40", "--lr_decay_iters=40",
       "--eval_interval=20", "--save_interval=10", "--keep_last=0", "--dropout=0.1")
TINY = Path("out/tiny")
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


def cells(*quick: str):
    """Both layouts, those that are not `quick` in the soak only."""
    return pytest.mark.parametrize("layout", [pytest.param(layout, marks=() if layout in quick else pytest.mark.soak)
                                              for layout in ("ddp", "fsdp")])


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder for what several tests read, the same one in each of pytest's processes; data/tiny is in it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shared"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"), pytest.MonkeyPatch.context() as patch:
        if not (folder / "data").exists():
            patch.chdir(folder)
            Path("tiny.txt").write_text(TEXT)
            prepare_data.main(["--input=tiny.txt", "--name=tiny", "--tokenizer=char"])
    return folder


@pytest.fixture
def data(shared, tmp_path, monkeypatch) -> Path:
    """The current directory, with data/tiny in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(shared / "data")
    return tmp_path


@pytest.fixture
def undisturbed(shared) -> Callable[..., Path]:
    """undisturbed("ddp"): the folder of a run on `nproc` ranks that nothing happened to."""

    def run(layout: str, nproc: int = 2, *options: str) -> Path:
        out = shared / "out" / "-".join([layout, str(nproc), *options])
        with FileLock(shared / "lock"):
            if not out.exists():
                code, log = start_ranks(nproc, shared, *RUN, *options, f"--parallel={layout}", f"--out_dir={out}")
                assert code == 0, log
        return out

    return run


def start_ranks(nproc: int, cwd: Path, *options: str, **faults: str) -> tuple[int, str]:
    """Forked ranks run train.py with faults planted; rank 0's exit status and what all of them said."""
    codes = on_ranks(nproc, be_train, cwd, options, faults)
    return codes[0], (cwd / "log").read_text()


def be_train(cwd: Path, options: tuple[str, ...], faults: dict[str, str]) -> int:
    os.chdir(cwd)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["train.py", *options]
    planted.plant({**os.environ, **faults})
    try:
        settings.run(train.main)
    except SystemExit as stop:
        return stop.code or 0
    return 0


class Torchrun:
    """torchrun beside the test, over ranks with faults planted."""

    def __init__(self, cwd: Path, nproc: int, options: tuple[str, ...], agent: tuple[str, ...], faults: dict[str, str]):
        self.cwd, self._log, self.nproc = cwd, cwd / f"log-{time.monotonic_ns()}", nproc
        env = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **faults}
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", *agent, planted.__file__,
                 *options], cwd=cwd, env={**os.environ, **env}, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """For the end; the exit status."""
        try:
            return self.process.wait(300)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end in sight:\n{self.log}") from None

    def wait_until(self, condition: Callable[[], object]) -> None:
        until(lambda: condition() or self.process.poll() is not None, lambda: self.log)
        assert condition(), f"it ended before that:\n{self.log}"

    def wait_until_held(self) -> None:
        """Until all ranks wait for the last one, and the save before that is done."""
        self.wait_until(lambda: (self.cwd / "held").exists() and newest_step(self.cwd / TINY) == 20)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of those that live."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                env = (folder / "environ").read_bytes().split(b"\0") if parent == self.process.pid else []
            except OSError:  # it has gone
                continue
            found |= {int(entry[5:]): int(folder.name) for entry in env if entry.startswith(b"RANK=")}
        return found

    def stop(self) -> None:
        """Leave nothing behind."""
        ranks = self.ranks() if sys.platform == "linux" else {}
        self.process.kill()
        self.process.wait()
        for pid in ranks.values():
            until(lambda pid=pid: not lives(pid), lambda: f"process {pid} has outlived torchrun")


def until(condition: Callable[[], object], report: Callable[[], str], limit_s: float = 300) -> None:
    """Wait for a condition; the test fails with the report when that takes too long."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, report()
        time.sleep(0.01)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def launch(data):
    """launch("--key=value", HOLD_STEP="25"): start torchrun over two ranks in the current directory."""
    started = []

    def start(*options: str, nproc: int = 2, agent: tuple[str, ...] = ("--standalone", "--max-restarts=3"),
              cwd: Path = data, **faults: str) -> Torchrun:
        started.append(Torchrun(cwd, nproc, (*RUN, *options), agent, faults))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def resumed_at(log: str) -> list[int]:
    return [int(line.split(" at step ")[1].split(";")[0]) for line in log.splitlines() if line.startswith("resuming ")]


def steps_saved(run: Path = TINY) -> list[int]:
    return [int(folder.name[5:]) for folder in sorted(run.glob("checkpoints/step_*"))]


def assert_same_end(run: Path, other: Path, step: int = 40) -> None:
    model = f"checkpoints/step_{step:08d}/model.safetensors"
    assert (run / model).read_bytes() == (other / model).read_bytes()
    for folder in run.glob("checkpoints/step_*"):
        verify(folder)
    assert [r["step"] for r in records_of(run) if "train/loss" in r] == list(range(1, step + 1))


@linux
@cells("ddp")
def test_a_killed_rank_is_started_again_and_loses_nothing_that_was_saved(launch, undisturbed, layout):
    run = launch(f"--parallel={layout}", HOLD_STEP="25")
    run.wait_until_held()
    os.kill(run.ranks()[{"ddp": 1, "fsdp": 0}[layout]], signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert resumed_at(run.log) == [20]
    assert_same_end(TINY, undisturbed(layout))


@linux
@cells("ddp")
def test_after_torchrun_was_killed_its_ranks_are_gone_and_the_same_command_goes_on(launch, undisturbed, layout):
    run = launch(f"--parallel={layout}", HOLD_STEP="25")
    run.wait_until_held()
    ranks = run.ranks()
    assert sorted(ranks) == [0, 1]
    run.process.kill()
    until(lambda: not any(map(lives, ranks.values())), lambda: f"{ranks} outlived torchrun", limit_s=20)
    again = launch(f"--parallel={layout}")
    assert again.wait() == 0, again.log
    assert resumed_at(again.log) == [20]
    assert_same_end(TINY, undisturbed(layout))


@linux
@cells("ddp")
def test_sigterm_to_torchrun_saves_the_step_under_way(launch, undisturbed, layout):
    run = launch(f"--parallel={layout}", HOLD_STEP="25")
    run.wait_until_held()
    run.process.terminate()
    assert run.wait() != 0
    assert "stopped by SIGTERM at step 26, and saved: the same command goes on from there" in run.log
    assert steps_saved() == [10, 20, 26]
    again = launch(f"--parallel={layout}")
    assert again.wait() == 0, again.log
    assert resumed_at(again.log) == [26]
    assert_same_end(TINY, undisturbed(layout))


@linux
@pytest.mark.soak
@cells()
def test_a_rank_that_hangs_is_found_by_the_timeout_and_all_start_again(launch, undisturbed, layout):
    run = launch(f"--parallel={layout}", "--timeout_s=15", HOLD_STEP="25")
    run.wait_until_held()
    os.kill(run.ranks()[1], signal.SIGSTOP)
    assert run.wait() == 0, run.log
    assert resumed_at(run.log) == [20]
    assert_same_end(TINY, undisturbed(layout))


@cells("ddp", "fsdp")
def test_a_full_disk_costs_the_checkpoint_that_did_not_fit(data, undisturbed, layout):
    options = (*RUN, f"--parallel={layout}")
    code, log = start_ranks(2, data, *options, "--max_iters=25", FULL_AT="20-29")
    assert code == 2
    assert "warning: step 20 could not be saved: " in log
    assert "going on, what was saved before is intact" in log
    assert "saving failed 2 times in a row" in log  # the last one too, and that ends it
    assert steps_saved() == [10]
    code, log = start_ranks(2, data, *options, FULL_AT="30")
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


@pytest.mark.parametrize("damage", [flip_byte, cut_in_half, hide])
@cells("ddp", "fsdp")
def test_a_damaged_newest_checkpoint_is_passed_over(data, undisturbed, layout, damage):
    copy_until(30, undisturbed(layout))
    damage(TINY / "checkpoints" / "step_00000030")
    code, log = start_ranks(2, data, *RUN, f"--parallel={layout}")
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
