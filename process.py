"""This process: signals that ask it to stop, torchrun that started it, and the time since the launch.

Imports no torch, because a worker has to tie its end to torchrun's before the seconds that this import takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
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
    pid = os.getppid() if UNDER_TORCHRUN else os.getpid()
    try:
        # Field 22 of /proc/PID/stat, counted behind the name, which may hold blanks: clock ticks since the boot.
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux: since this worker was started
        return time.monotonic() - _LOADED_S


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
