"""Runs as the page shows them: found under folders, followed while they grow, thinned, and in which state they are.

Owns what is read of a run folder for the page, and never writes there nor takes a run's lock. A run is named by a short
hash of its path, so that a browser can name no path. Files of any length and content are read in bounded memory.

    table = RunTable(("out",))
    table.refresh()                  [{"id": "f3a9...", "name": "demo", "state": "running", "step": 120, ...}, ...]
    table.history("f3a9...")         the run's curves and what else it wrote, thinned (curves.py), and its scores

Of each run the list reads the end alone; the history is read whole, when it is asked for the first time.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import math
import os
import platform
import stat
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flatgpt import files
from flatgpt.run_folder import EVALS, current_scores, curves_of_scores, number, parse_eval, parse_record, step_folders
from flatgpt.serving.curves import Curves, plain, tokens_per_step

OPTIONS = "train_config.json"  # what makes a folder a run's
MAX_DEPTH = 6  # of folders below one that was named
MAX_HISTORIES = 64  # kept in memory
MAX_OPTIONS_BYTES = 1 << 20
BLOCK_BYTES = 1 << 20  # read at a time; a longer line is passed over
END_BYTES = 1 << 16  # of metrics.jsonl: what the list reads at first
MAX_EVAL_BYTES = 8 << 20  # at the end of evals.jsonl, which are read; older scores are left out
MAX_SCORES = 60  # curves of scores: tasks times metrics
SEARCH_BYTES = 8 << 20  # at the end of metrics.jsonl, in which the list looks for an evaluation
MARK_BYTES = 256  # before the place up to which a file was read: they tell whether it is the file that was read
OVERVIEW_BYTES = 64 << 20  # with more than this to read, a first picture is made of OVERVIEW_BLOCKS pieces
OVERVIEW_BLOCKS, OVERVIEW_BLOCK_BYTES = 64, 1 << 16
RESCAN_S, REFRESH_S = 5.0, 0.9  # at least so long between two searches for new runs, and two looks at the known ones
QUIET_S = 120.0  # a run on another host that has not written for so long, and for ten of its intervals, has died


def find_runs(patterns: Iterable[str]) -> list[Path]:
    """The run folders that are named, or lie below a folder that is; names may be patterns of a shell. In order, whole
    paths without links. Hidden folders, links below the named ones, and what lies in a run are not searched."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        for root in [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True)):
            top = os.path.realpath(root)
            for folder, children, names in os.walk(top):
                is_run = OPTIONS in names
                if is_run:
                    found[Path(folder)] = None
                is_deep = len(Path(folder).parts) - len(Path(top).parts) >= MAX_DEPTH
                children[:] = [] if is_run or is_deep else [name for name in children if not name.startswith(".")]
    return sorted(found)


# Following a file


class Tail:
    """The records of a metrics.jsonl that were added since the last read. `position` names a place in it for another
    Tail to go on from, with a checksum of what stands before it; "" is the beginning, and "end" END_BYTES from the end.
    """

    def __init__(self, path: Path, position: str = ""):
        self.path, self.start = path, position
        place, _, mark = position.partition(".") if position != "end" else ("", "", "")
        self.offset, self._mark = int(place or 0), int(mark or 0)
        self.size, self.is_at_end, self._is_placed = 0, False, position != "end"

    @property
    def position(self) -> str:
        return f"{self.offset}.{self._mark}"

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The next records, of at most BLOCK_BYTES, and whether they are of another content than was read before: a
        resume or a rollback has rewritten the file, and it is read from the start again. Raises FileNotFoundError."""
        with open_file(self.path) as file:
            self.size = os.fstat(file.fileno()).st_size
            is_another = self.offset > self.size or _mark(file, self.offset) != self._mark
            if is_another or not self._is_placed:
                self.offset = max(0, self.size - END_BYTES) if self.start == "end" else 0
                self._is_placed = True
            file.seek(self.offset)
            block = file.read(BLOCK_BYTES)
            length = block.rfind(b"\n") + 1 or (len(block) if len(block) == BLOCK_BYTES else 0)
            self.offset += length
            self._mark = _mark(file, self.offset)
        self.is_at_end = len(block) < BLOCK_BYTES  # but for a line that is being written
        return [*records_in(block[:length])], is_another


def open_file(path: Path) -> BinaryIO:
    """Raises FileNotFoundError for a pipe or a device too: they have no end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileNotFoundError(path)
    return open(path, "rb")


def records_in(block: bytes) -> Iterator[dict[str, Any]]:
    return filter(None, map(parse_record, block.split(b"\n")))


def _mark(file: BinaryIO, offset: int) -> int:
    file.seek(max(0, offset - MARK_BYTES))
    return zlib.crc32(file.read(min(offset, MARK_BYTES)))


def overview(path: Path) -> Curves:
    """A first picture of a long metrics.jsonl: the records of OVERVIEW_BLOCKS pieces, evenly spaced."""
    curves, size = Curves(), path.stat().st_size
    with open_file(path) as file:
        for number in range(OVERVIEW_BLOCKS):
            file.seek((size - OVERVIEW_BLOCK_BYTES) * number // (OVERVIEW_BLOCKS - 1))
            block = file.read(OVERVIEW_BLOCK_BYTES)
            curves.add([*records_in(block[block.find(b"\n") + 1 if number else 0:block.rfind(b"\n") + 1])])
    return curves


def newest_evaluation(path: Path) -> dict[str, Any]:
    """The last evaluation within SEARCH_BYTES from the end; {} without one."""
    with open_file(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - SEARCH_BYTES))
        block = file.read(SEARCH_BYTES)
    place = block.rfind(b'"val/loss"')
    line = block[block.rfind(b"\n", 0, place) + 1:block.find(b"\n", place)] if place >= 0 else b""
    return parse_record(line) or {}


def read_scores(path: Path, curves: Curves) -> list[dict[str, Any]]:
    """The scores in an evals.jsonl as curves over what the run has in its past; none where there is no such file."""
    with contextlib.suppress(OSError), open_file(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_EVAL_BYTES))
        records = filter(None, map(parse_eval, file.read(MAX_EVAL_BYTES).split(b"\n")))
        found = curves_of_scores(current_scores(records, curves.restart_points, curves.newest_step))
        return [{"key": key, **curve} for key, curve in [*found.items()][:MAX_SCORES]]
    return []


def size_of(path: Path) -> int:
    """0 where there is no such file."""
    return (_version(path) or (0, 0))[0]


class History:
    """All that a run has written, thinned."""

    def __init__(self, path: Path):
        self._evals = path.with_name(EVALS)
        self._tail, self._curves, self._overview = Tail(path), Curves(), None
        self._lock = threading.Lock()

    def catch_up(self, budget_s: float) -> dict[str, Any]:
        """Read on for at most about that time, and return what is known. `read` is the part of the file that was read:
        below 1 it is a picture of a sample. `position` is where new records begin: a Tail's, and behind it the size of
        evals.jsonl."""
        until = time.monotonic() + budget_s
        with self._lock:
            while True:
                records, is_another = self._tail.read()
                if is_another:
                    self._curves, self._overview = Curves(), None
                self._curves.add(records)
                if self._tail.is_at_end:
                    self._overview, size = None, size_of(self._evals)
                    scores = read_scores(self._evals, self._curves)
                    return self._curves.as_dict() | {
                        "scores": scores, "read": 1.0, "position": f"{self._tail.position}.{size}"}
                if self._overview is None and self._tail.size - self._tail.offset > OVERVIEW_BYTES:
                    self._overview = overview(self._tail.path)
                if time.monotonic() > until:
                    shown = self._overview or self._curves
                    return shown.as_dict() | {"scores": [], "read": self._tail.offset / self._tail.size,
                                              "position": None}


# State


def locked_inodes() -> dict[int, list[tuple[int, str]]] | None:
    """Inode -> (device, process) of every flock that a process on this host holds; None where the system does not tell.
    To read this takes no lock, so no run that starts meanwhile can find its own taken."""
    held: dict[int, list[tuple[int, str]]] = {}
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for fields in map(str.split, lines):
        if fields[1] == "FLOCK":  # 1: FLOCK ADVISORY WRITE 4711 fe:00:2146445 0 EOF; one that waits has an arrow there
            major, minor, inode = fields[5].split(":")
            held.setdefault(int(inode), []).append((os.makedev(int(major, 16), int(minor, 16)), fields[4]))
    return held


def is_held(lock: Path, held: dict[int, list[tuple[int, str]]] | None) -> bool:
    """Whether a process on this host holds the lock in that file."""
    with contextlib.suppress(OSError):
        status = lock.stat()
        return any(device == status.st_dev or _has_open(process, lock)
                   for device, process in (held or {}).get(status.st_ino, ()))
    return False


def _has_open(process: str, path: Path) -> bool:
    """On btrfs and overlayfs the kernel's list has another device than stat."""
    with contextlib.suppress(OSError):
        return any(os.readlink(file.path) == str(path) for file in os.scandir(f"/proc/{process}/fd"))
    return False


class FollowedRun:
    """A run folder in the list: its options, and what the end of its metrics.jsonl says."""

    def __init__(self, folder: Path):
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        self.id, self.name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12], folder.name
        self.options: dict[str, Any] = {}
        self._host, self._seen = "", (None, None)
        self._begin()

    def _begin(self, tail: Tail | None = None) -> None:
        self._tail = tail or Tail(self.metrics, "end")
        self._newest, self._facts, self._evaluation, self._has_searched = {}, {}, {}, False
        self.tokens_per_step = 0.0
        self._pace: deque[tuple[float, float]] = deque(maxlen=50)  # (step, elapsed_s) of the latest reports

    def refresh(self, held: dict[int, list[tuple[int, str]]] | None) -> dict[str, Any]:
        """Read what is new, and return the run's line in the list. Raises FileNotFoundError when the folder is gone."""
        options = self.folder / OPTIONS
        status = (_version(options), _version(self.metrics))
        if status[0] is None:
            raise FileNotFoundError(options)
        if status[0] != self._seen[0]:
            self.options = read_options(options)
            self._host = host_of(self.folder)
        if status[1] is None:
            self._begin()
        elif status[1] != self._seen[1]:
            self._read(status[1][0])
        self._seen = status
        changed_at = max(stamp[1] for stamp in status if stamp) / 1e9
        state = self._state(is_held(self.folder / ".lock", held), held is not None, time.time() - changed_at)
        return self._line() | {"state": state, "changed_at": round(changed_at, 3),
                               "time_left_s": plain(self._time_left_s()) if state == "running" else None}

    def _read(self, size: int) -> None:
        tail = self._tail
        if size - tail.offset > SEARCH_BYTES:
            self._begin()
            tail = self._tail
        tail.is_at_end = False
        while not tail.is_at_end:
            records, is_another = tail.read()
            if is_another:
                self._begin(tail)
            for record in records:
                self._take(record)
        if not self._evaluation and not self._has_searched:
            self._evaluation, self._has_searched = newest_evaluation(self.metrics), True

    def _take(self, record: dict[str, Any]) -> None:
        self._newest = record
        self._facts |= {key: value for key, value in record.items() if value is not None}
        self.tokens_per_step = tokens_per_step(record) or self.tokens_per_step
        if "val/loss" in record:
            self._evaluation = record
        place = number(record["step"]), number(record.get("elapsed_s"))
        if {"resumed", "rollbacks"} & record.keys():
            self._pace.clear()
        elif "train/loss" in record and all(map(math.isfinite, place)):
            self._pace.append(place)

    def _state(self, is_held: bool, can_tell: bool, age_s: float) -> str:
        """running, finished, stopped (by a signal or its time limit, and saved) or died."""
        if is_held:
            return "running"
        is_last = self._has_reached_target() or (self._evaluation and self._evaluation["step"] == self._max_iters())
        if is_last and self._evaluation.get("step", 0) <= max(step_folders(self.folder), default=math.inf):
            return "finished"  # and did not die between its last evaluation and its last save
        if "stopped" in self._newest:
            return "stopped"
        if can_tell and self._host == platform.node():
            return "died"
        gaps = [later[1] - earlier[1] for earlier, later in zip(self._pace, [*self._pace][1:])]
        return "running" if age_s < max(QUIET_S, 10 * max(gaps, default=0)) else "died"

    def _has_reached_target(self) -> bool:
        """Whether an evaluation was at or below the target that the run has now; it may have gone on to a lower one."""
        return "reached" in self._facts and self._facts["reached"] == self.options.get("target_val_loss")

    def _max_iters(self) -> int | None:
        value = self.options.get("max_iters")
        return value if type(value) is int else None

    def _time_left_s(self) -> float | None:
        if len(self._pace) < 2 or self._max_iters() is None:
            return None
        (first, began_s), (last, ended_s) = self._pace[0], self._pace[-1]
        return max(0.0, (ended_s - began_s) / max(1, last - first) * (self._max_iters() - last))

    def _line(self) -> dict[str, Any]:
        keys = ("tokens", "train/loss", "lr", "grad_norm", "tokens_per_sec", "mfu", "memory_gb", "elapsed_s", "skipped",
                "rollbacks")
        return {"id": self.id, "name": self.name, "path": str(self.folder), "max_iters": self._max_iters(),
                "step": plain(self._newest.get("step")) or 0, "val/loss": plain(self._evaluation.get("val/loss")),
                **{key: plain(self._facts.get(key)) for key in keys}}


def read_options(path: Path) -> dict[str, Any]:
    """The options in a train_config.json; those that JSON has no plain value for as text."""
    return {key: value if isinstance(value, str | bool | None) or plain(value) is not None else str(value)
            for key, value in _read_small(path).items()}


def host_of(folder: Path) -> str:
    """The host on which the run was last started; "" when the run does not say."""
    with contextlib.suppress(LookupError, TypeError):
        return str(_read_small(folder / "launch.json")["ranks"][0]["host"])
    return ""


def _read_small(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; {} if the file is missing, much too long, or something else."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_file() and path.stat().st_size <= MAX_OPTIONS_BYTES:
            return files.read_json(path)
    return {}


def _version(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change of a file; None if there is no such file, or something else in its place."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
    return None


class RunTable:
    """All runs under the folders, by id. Its methods may be called by several threads."""

    def __init__(self, patterns: Iterable[str]):
        self.patterns = tuple(patterns)
        self._runs: dict[str, FollowedRun] = {}
        self._lines: dict[str, dict[str, Any]] = {}
        self._histories: dict[str, History] = {}
        self._lock = threading.Lock()
        self._scanned_at = self._refreshed_at = float("-inf")

    def refresh(self) -> list[dict[str, Any]]:
        """A line for each run, in the order of their paths. A folder that was deleted has none any more."""
        with self._lock:
            now = time.monotonic()
            if now - self._scanned_at >= RESCAN_S:
                known = {run.folder: run for run in self._runs.values()}
                runs = [known.get(folder) or FollowedRun(folder) for folder in find_runs(self.patterns)]
                above = os.path.commonpath([run.folder.parent for run in runs]) if runs else ""
                for run in runs:
                    run.name = os.path.relpath(run.folder, above)
                self._runs, self._scanned_at = {run.id: run for run in runs}, now
            if now - self._refreshed_at >= REFRESH_S:
                self._lines, held = {}, locked_inodes()
                for run in self._runs.values():
                    with contextlib.suppress(OSError):
                        self._lines[run.id] = run.refresh(held)
                self._refreshed_at = time.monotonic()
            return [*self._lines.values()]

    def get(self, run_id: str) -> FollowedRun:
        """Raises KeyError for a run that is not, or no more, in the list."""
        self.refresh()
        with self._lock:
            if run_id not in self._lines:
                raise KeyError(run_id)
            return self._runs[run_id]

    def history(self, run_id: str, budget_s: float) -> dict[str, Any]:
        """See `History.catch_up`; with the run's options. Raises KeyError."""
        run = self.get(run_id)
        with self._lock:
            history = self._histories.pop(run_id, None) or History(run.metrics)
            self._histories[run_id] = history  # the newest is the last
            for oldest in [*self._histories][:-MAX_HISTORIES]:
                del self._histories[oldest]
        try:
            shown = history.catch_up(budget_s)
        except OSError:  # it has not reported yet, or nobody can read it
            shown = Curves().as_dict() | {"scores": [], "read": 1.0, "position": ""}
        return {"id": run_id, "options": run.options, **shown}
