"""What the tests of faults share: a small run, on ranks that torchrun starts or that are forked, with faults planted in
it. Tests that use the fixtures here name this module among their `pytest_plugins`.

PYTEST_DONT_REWRITE: they import it before pytest could rewrite its assertions.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
from conftest import TEXT, TINY_RUN, on_ranks, records_of
from filelock import FileLock

import prepare_data
import train
from flatgpt.options import run_script
from flatgpt.run_folder import verify

RUN = (*TINY_RUN, "--batch_size=2", "--gradient_accumulation_steps=4", "--max_iters=40", "--lr_decay_iters=40",
       "--eval_interval=20", "--save_interval=10", "--keep_last=0", "--dropout=0.1")
TINY = Path("out/tiny")
LAYOUTS = {"ddp": ("--parallel=ddp",), "fsdp": ("--parallel=fsdp",), "hsdp": ("--parallel=hsdp", "--shard_size=2")}
RANKS = {"ddp": 2, "fsdp": 2, "hsdp": 4}  # that a layout is tested on; hsdp: two copies of the model


def newest_step(run: Path) -> int:
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step_*")), default=0)


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
    """undisturbed("ddp"): the folder of a run on `nproc` ranks (0: the layout's) that nothing happened to."""

    def run(layout: str, nproc: int = 0, *options: str) -> Path:
        nproc = nproc or RANKS[layout]
        out = shared / "out" / "-".join([layout, str(nproc), *options])
        with FileLock(shared / "lock"):
            if not out.exists():
                code, log = start_ranks(nproc, shared, *RUN, *options, *LAYOUTS[layout], f"--out_dir={out}")
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
        run_script(train.main)
    except SystemExit as stop:
        return stop.code or 0
    return 0


class Torchrun:
    """torchrun beside the test, over ranks with faults planted."""

    def __init__(self, cwd: Path, nproc: int, options: tuple[str, ...], agent: tuple[str, ...], faults: dict[str, str],
                 script: Path | str = planted.__file__, within: tuple[str, ...] = ()):
        self.cwd, self._log, self.nproc = cwd, cwd / f"log-{time.monotonic_ns()}", nproc
        env = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **faults}
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                [*within, sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", *agent,
                 str(script), *options], cwd=cwd, env={**os.environ, **env}, stdout=log, stderr=log)

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

    def wait_until_restarted(self, rank: int, pid: int) -> None:
        self.wait_until(lambda: self.ranks().get(rank, pid) != pid)

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

    def kill(self) -> None:
        """SIGKILL torchrun, and see that its ranks do not outlive it."""
        ranks = self.ranks().values() if sys.platform == "linux" else ()
        self.process.kill()
        self.process.wait()
        try:
            until(lambda: not any(map(lives, ranks)), lambda: f"ranks have outlived torchrun:\n{self.log}", limit_s=60)
        finally:
            for pid in filter(lives, ranks):
                os.kill(pid, signal.SIGKILL)


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


def resumed_at(log: str) -> list[int]:
    return [int(line.split(" at step ")[1].split(";")[0]) for line in log.splitlines() if line.startswith("resuming ")]


def assert_same_end(run: Path, other: Path, step: int = 40) -> None:
    model = f"checkpoints/step_{step:08d}/model.safetensors"
    assert (run / model).read_bytes() == (other / model).read_bytes()
    for folder in run.glob("checkpoints/step_*"):
        verify(folder)
    assert [r["step"] for r in records_of(run) if "train/loss" in r] == list(range(1, step + 1))
