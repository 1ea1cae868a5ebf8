"""The memory and the cores that this process may use: the machine's, or what its control groups leave of them, as a
container, a Slurm job or a systemd service has them. Both versions of Linux's control groups are read.

Owns what is read below /proc and /sys/fs/cgroup; ROOT is where those lie. A group's limit binds all groups within it,
so that of several on the way up to the root the lowest counts. What cannot be read is no limit. It also knows what a
device may be called, for scripts that check their options before they import torch.
"""

from __future__ import annotations

import os
import platform
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from flatgpt import launcher

ROOT = Path("/")
TORCH_BYTES = 200_000_000  # that a process with torch in it takes before it has done anything
MEMORY_FILES = (  # a group's limit, what it uses of it, and what of that is file cache to drop first (in memory.stat)
    ("memory.max", "memory.current", "inactive_file"), ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # version 1


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, int]:
    """A file of lines like `inactive_file 123` or `MemTotal:  123 kB`."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's groups, up to the root: of version 2, and of `controller` in version 1.

    Inside a container the path that the process is told may be the host's: what is not there is passed over, and the
    root of what is mounted is the container's own group."""
    mounts = ROOT / "sys/fs/cgroup"
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and controller not in controllers.split(","):
            continue
        path = Path(posixpath.normpath(f"/{path}").lstrip("/"))
        for mount in {controller, controllers} if controllers else ("", "unified"):
            yield from (folder for part in (path, *path.parents) if (folder := mounts / mount / part).is_dir())


def _number(path: Path) -> int | None:
    """What a file with one number says; None where there is none, or no limit ("max")."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _memory_groups() -> Iterator[tuple[int, int]]:
    """(limit, bytes of it that are free) of each group that has a limit. File cache that can be dropped is free."""
    for group in _groups("memory"):
        for limit_file, usage_file, cache in MEMORY_FILES:
            if (limit := _number(group / limit_file)) is not None:
                used = (_number(group / usage_file) or 0) - _fields(group / "memory.stat").get(cache, 0)
                yield limit, max(0, limit - max(0, used))


def memory_bytes() -> int:
    """The memory that the process may use in all, in bytes."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(limit for limit, _ in _memory_groups())])


def free_memory_bytes() -> int:
    """What can be had of it without swapping. (Only Linux knows that; elsewhere it is half of all.)"""
    available = _fields(ROOT / "proc/meminfo").get("MemAvailable")
    there = memory_bytes() // 2 if available is None else 1024 * available
    return min([there, *(free for _, free in _memory_groups())])


def resident_bytes() -> int:
    """The memory that this process holds at the moment, in bytes; 0 where that is not known."""
    return 1024 * _fields(ROOT / "proc/self/status").get("VmRSS", 0)


def core_quota() -> float | None:
    """The processor time that the groups grant, in cores; None without a limit."""
    quotas = []
    for group in _groups("cpu"):
        quota, period = (_text(group / "cpu.max").split() + ["max", "max"])[:2]  # version 2
        if quota == "max":
            quota, period = _text(group / "cpu.cfs_quota_us").strip(), _text(group / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):  # version 1 says "no limit" as -1
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def num_cores() -> int:
    """Cores that the process may keep busy: those it may run on (a cpuset counts there), within the quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = core_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def processor() -> str:
    """What the machine calls its processor."""
    names = re.findall(r"model name\s*:\s*(.+)", _text(ROOT / "proc/cpuinfo"))
    return names[0] if names else platform.machine()


def device_faults(name: str) -> list[str]:
    """What is wrong with the value of an option `device`, as far as it can be told without torch."""
    is_device = re.fullmatch(r"auto|cpu|mps|cuda(:\d\d?)?", name)
    return [] if is_device else [f"device={name!r} is not a device: use cuda, cuda:N, mps, cpu or auto"]


def warn_of_little_memory() -> None:
    """Warn, before torch is imported, if too little memory is free: the system would kill the process silently."""
    left = free_memory_bytes()
    if left < TORCH_BYTES and launcher.is_rank0():
        print(f"warning: {left / 1e6:,.0f} MB of memory are left, and torch alone takes about "
              f"{TORCH_BYTES / 1e6:,.0f} MB a process: the system may kill this process; give the machine or "
              "the container more memory",
              file=sys.stderr, flush=True)
