"""This process: signals that ask it to stop, what launched it, torchrun or a Slurm job, and the time since then.

Imports no torch, because a worker has to tie its end to torchrun's before the seconds that this import takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What schedulers, people, clouds and a terminal that closes send.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
_LOADED_S = time.monotonic()


def end_with_torchrun() -> None:
    """Have the kernel kill this process when torchrun dies (Linux): left alone it would hold its GPU, and train on."""
    if not UNDER_TORCHRUN or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    if not _is_launcher(os.getppid()):  # it died before that line, and another process has inherited us
        sys.exit("torchrun is gone")


def _is_launcher(pid: int) -> bool:
    """Whether a process is torchrun, which is Python, or a wrapper that torchrun started between us and itself."""
    try:
        return ("python" in os.readlink(f"/proc/{pid}/exe")
                or b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:  # another user's: ours would be readable
        return False


def end_torchrun() -> None:
    """Have torchrun end the job instead of starting it again, as it would for any worker that exits with an error."""
    if UNDER_TORCHRUN and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ["LOCAL_RANK"] == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it will send us one
        os.kill(os.getppid(), signal.SIGTERM)


def seconds_since_launch() -> float:
    """Since torchrun, or this process without it, was started: a restarted worker shares the job's time limit."""
    try:
        ticks = int(_stat(_torchrun_pid() if UNDER_TORCHRUN else os.getpid())[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux: since this worker was started
        return time.monotonic() - _LOADED_S


def launch() -> dict[str, str]:
    """What launched this process, for `is_restart` to know it again: torchrun's own process, which starts its workers
    again when one dies, and the Slurm job, which is requeued under its id. Empty where there is none."""
    torchrun, job = "", ""
    if UNDER_TORCHRUN:
        pid = _torchrun_pid()
        torchrun = f"{os.environ['TORCHELASTIC_RUN_ID']} on {platform.node()}, process {pid}"
        with contextlib.suppress(OSError):  # on Linux: ids of processes come round again, and so do names of machines
            torchrun += f" of tick {_stat(pid)[19]}, boot {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    if os.environ.get("SLURM_JOB_ID"):
        job = "/".join(os.environ.get(f"SLURM_{key}", "") for key in (
            "CLUSTER_NAME", "JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    return {"torchrun": torchrun, "slurm_job": job, "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT") or "0"}


def is_restart(now: Mapping[str, str], then: Mapping[str, str]) -> bool:
    """Whether the launch of then has started us again: the same torchrun, or the same Slurm job, requeued since."""
    is_requeued = now["slurm_restarts"] not in ("0", then["slurm_restarts"])
    return "" != now["torchrun"] == then["torchrun"] or ("" != now["slurm_job"] == then["slurm_job"] and is_requeued)


def _torchrun_pid() -> int:
    """Of our parent, or of the parent of the wrappers that torchrun has started between us and itself."""
    pid = os.getppid()
    with contextlib.suppress(OSError):
        while b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(_stat(pid)[1])
    return pid


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the process's name, which may hold blanks: state, parent, and at place 19 the
    start in clock ticks since the boot. Raises OSError where there is no such file."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that gets the name of each signal that asks this process to stop, so that the step under way can be
    finished and saved first. A second Ctrl-C, a second or more after the first, is not waited for."""
    asked: list[str] = []
    last_s = 0.0

    def remember(number: int, _frame: Any) -> None:
        nonlocal last_s
        name, now_s = signal.Signals(number).name, time.monotonic()
        if name == "SIGINT" and name in asked and now_s - last_s > 1:  # torchrun sends one Ctrl-C on as another
            raise KeyboardInterrupt
        asked.append(name)
        last_s = now_s

    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before = {number: signal.signal(number, remember) for number in STOP_SIGNALS
              if not (number == signal.SIGHUP and is_nohup)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
