"""What launched this process, torchrun or a Slurm job: the process's rank, its end together with torchrun, whether it
is a restart, and the time since the launch.

Imports no torch: a worker ties its end to torchrun's before the seconds that this import takes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

UNDER_TORCHRUN = bool(os.environ.get("TORCHELASTIC_RUN_ID"))
HOW_TO_START = ("start several processes with torchrun, which sets them all; for one process alone, "
                "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE")
_LOADED_S = time.monotonic()


class Ranks(NamedTuple):
    """This process's place in a job, as a launcher's environment says it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    local_world_size: int = 1


def ranks() -> Ranks:
    """Of this process. A variable that is empty counts as unset; without LOCAL_RANK and LOCAL_WORLD_SIZE each process
    has a machine of its own. Raises ValueError for variables that contradict each other."""
    values = [os.environ.get(key.upper(), "").strip() for key in Ranks._fields]
    rank, world_size, local_rank, local_world_size = values
    if not (rank or world_size):
        return Ranks()
    fault = ""
    if unknown := [key.upper() for key, value in zip(Ranks._fields, values) if not re.fullmatch("[0-9]{0,9}", value)]:
        fault = f"{' and '.join(unknown)} should be a number"
    elif not rank and world_size != "1":
        fault = "RANK, the number of this process, is missing"
    elif int(rank or 0) >= int(world_size or 1):
        fault = f"RANK should be below WORLD_SIZE, which is {world_size or 'missing'}"
    elif local_world_size and int(local_rank or 0) >= int(local_world_size):
        fault = "LOCAL_RANK should be below LOCAL_WORLD_SIZE"
    if fault:
        raise ValueError(f"the environment has {rank_variables()}, and {fault}: {HOW_TO_START}")
    return Ranks(int(rank or 0), int(world_size or 1), int(local_rank or 0), int(local_world_size or 1))


def is_rank0() -> bool:
    """Whether the environment says that this process is rank 0, the one that prints. The variables are not checked."""
    return os.environ.get("RANK", "").strip() in ("", "0")


def rendezvous() -> str:
    """Where the ranks of a job meet, as ADDRESS:PORT. Raises ValueError when the environment does not say it."""
    address, port = (os.environ.get(key, "").strip() for key in ("MASTER_ADDR", "MASTER_PORT"))
    if not address or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"the environment has {rank_variables()}, and so MASTER_ADDR and MASTER_PORT should name the "
                         f"machine and the port, 1 to 65535, where the processes meet: {HOW_TO_START}")
    return f"{address}:{port}"


def rank_variables() -> str:
    """The variables of the environment that say which process of how many this is, for messages."""
    keys = [*(key.upper() for key in Ranks._fields), "MASTER_ADDR", "MASTER_PORT"]
    return ", ".join(f"{key}={os.environ[key]}" for key in keys if os.environ.get(key))


def end_with_torchrun() -> None:
    """Have the kernel kill this process when torchrun dies (Linux): left alone it would hold its GPU, and train on."""
    if not UNDER_TORCHRUN or sys.platform != "linux":
        return
    import ctypes

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


def may_restart() -> bool:
    """Whether torchrun starts a job again that fails."""
    return UNDER_TORCHRUN and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")


def end_torchrun() -> None:
    """Have torchrun end the job instead of starting it again, as it would for any worker that exits with an error."""
    if may_restart() and ranks().local_rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it will send us one
        os.kill(_torchrun_pid(), signal.SIGTERM)


def seconds_since_launch() -> float:
    """Since torchrun, or this process without it, was started: a restarted worker shares the job's time limit."""
    try:
        ticks = int(_stat(_torchrun_pid() if UNDER_TORCHRUN else os.getpid())[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux: since this worker was started
        return time.monotonic() - _LOADED_S


def launch() -> dict[str, str]:
    """What launched this process, for `is_restart` to know it again: torchrun's own process, which starts its workers
    again when one dies, and the Slurm job, which is requeued under its id. Empty where there is none. The `host`
    is for serve.py, which can tell only of processes on its own whether they live."""
    torchrun, job = "", ""
    if UNDER_TORCHRUN:
        pid = _torchrun_pid()
        torchrun = f"{os.environ.get('TORCHELASTIC_RUN_ID')} on {platform.node()}, process {pid}"
        with contextlib.suppress(OSError):  # on Linux: ids of processes come round again, and so do names of machines
            torchrun += f" of tick {_stat(pid)[19]}, boot {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    if os.environ.get("SLURM_JOB_ID"):
        job = "/".join(os.environ.get(f"SLURM_{key}", "") for key in (
            "CLUSTER_NAME", "JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    return {"host": platform.node(), "torchrun": torchrun, "slurm_job": job,
            "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT") or "0"}


def is_restart(now: Mapping[str, str], then: Mapping[str, str]) -> bool:
    """Whether the `launch` of an earlier start has started us again: the same torchrun, or a requeued Slurm job."""
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
