"""Evaluation beside a run: each checkpoint that appears in its folder is scored, in a process of its own.

    with only_watcher(folder):
        Watcher(folder, tasks, ...).run(open_model, ...)    until the run has finished and all is scored

Owns evals.jsonl in the run folder: a line for each task of each checkpoint, added whole (run_folder.py reads it).
Nothing else is written there but the lock that keeps a second watcher away; the run's own lock is not touched, and
nothing that the run writes. Whatever happens here, training does not notice.

A line names the checkpoint by its `checkpoint_id`, so that a watcher that is started again repeats nothing, and a step
that a run has made anew is scored anew. Oldest first: those are the next that the run deletes. Files that were opened
stay readable when the run deletes them; a checkpoint that is gone before it was opened gets a line that it was missed.
While one is scored, a thread looks for others, so that those that come and go meanwhile are known.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from flatgpt import files, run_folder
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.evaluation.tasks import Score, describe
from flatgpt.models.language_model import LanguageModel
from flatgpt.serving.runs import OPTIONS, QUIET_S, FollowedRun, locked_inodes
from flatgpt.training.distributed import Job

POLL_S = 5.0  # between two looks into the run folder
OpenModel = Callable[[Path], tuple[LanguageModel, Tokenizer]]


class Found(NamedTuple):
    """A checkpoint as it was seen."""

    folder: Path
    id: str
    facts: dict[str, Any]  # what each of its lines says

    def is_there(self) -> bool:
        """Whether the folder still holds it, and not another save of the same step."""
        with contextlib.suppress(OSError):
            return run_folder.checkpoint_id(self.folder) == self.id
        return False


@contextlib.contextmanager
def only_watcher(folder: Path) -> Iterator[None]:
    """Raises OSError where another process is watching the run in this folder."""
    lock = FileLock(folder / ".evals.lock")
    files.take_lock(lock, f"another process is watching {folder} already: one is enough")
    try:
        yield
    finally:
        lock.release(force=True)


def check_folder(folder: Path) -> None:
    """Raises FileNotFoundError for a folder that is not there, or holds runs and is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run folder {folder} to watch: `mkdir -p {folder}` lets this wait for its "
                                "run")
    if not (folder / OPTIONS).is_file() and (runs := sorted(path.parent for path in folder.glob(f"*/{OPTIONS}"))):
        raise FileNotFoundError(f"{folder} is no run folder but holds some: watch one of them, {runs[-1]} say")


class Watcher:
    """What is known of a run's checkpoints: those seen, and what of them has been scored."""

    def __init__(self, folder: Path, tasks: Mapping[str, Score], limit: int, log: Callable[[str], None]):
        """`limit` is how many questions the tasks have, 0 for all, and goes into the lines. `log` prints one."""
        self._folder, self._tasks, self._limit, self._log = folder, tasks, limit, log
        self._path, self._run = folder / run_folder.EVALS, FollowedRun(folder.resolve())
        self._seen: dict[str, Found] = {}
        self._lock = threading.Lock()
        self._damaged: dict[str, list] = {}  # checkpoint -> what its files looked like when they could not be read
        self._state = ""
        before = run_folder.read_records(self._path, run_folder.parse_eval)
        self._done = {(record["checkpoint"], record.get("task"), record.get("limit", 0)) for record in before}
        self._missed = {record["checkpoint"] for record in before if record.get("missed")}
        log(f"watching {folder}: {', '.join(tasks)} of each checkpoint, into {self._path}"
            + (f", which has {len(before):,} lines" if before else ""))

    def run(self, open_model: OpenModel, batch_size: int, job: Job) -> None:
        """Score what there is, and what comes, until the run has finished. `open_model` raises OSError or ValueError
        for a folder that cannot be read."""
        stop = threading.Event()
        looking = threading.Thread(target=self._keep_looking, args=(stop,), daemon=True)
        looking.start()
        try:
            while True:
                while found := self._next():
                    self._score(found, open_model, batch_size, job)
                if self._is_over():
                    return
                time.sleep(POLL_S)
        finally:
            stop.set()
            looking.join()

    def _keep_looking(self, stop: threading.Event) -> None:
        while not stop.wait(POLL_S):
            with contextlib.suppress(OSError):  # the disk may be a network's
                self._look()

    def _look(self) -> None:
        """Remember the checkpoints that are whole, oldest first."""
        with self._lock:
            for step, folder in run_folder.step_folders(self._folder).items():
                with contextlib.suppress(OSError, ValueError):  # it is being deleted
                    if run_folder.is_whole(folder) and (key := run_folder.checkpoint_id(folder)) not in self._seen:
                        self._seen[key] = Found(folder, key, facts_of(folder, step, key))

    def _next(self) -> Found | None:
        """The checkpoint of the lowest step that is still to be scored; what the run has deleted gets a line."""
        self._look()
        with self._lock:
            seen = sorted(self._seen.values(), key=lambda found: found.facts["step"])
        for found in seen:
            if not self._due(found) or found.id in self._missed:
                continue
            if not found.is_there():
                self._miss(found)
            elif found.id not in self._damaged or self._damaged[found.id] != looks_of(found.folder):
                return found
        return None

    def _due(self, found: Found) -> list[str]:
        return [task for task in self._tasks if (found.id, task, self._limit) not in self._done]

    def _score(self, found: Found, open_model: OpenModel, batch_size: int, job: Job) -> None:
        """Add a line for each task that has none yet."""
        looks = looks_of(found.folder)
        try:
            model, tokenizer = open_model(found.folder)
        except (OSError, ValueError) as error:
            if found.is_there():
                self._damaged[found.id] = looks
                self._log(f"warning: {found.folder.name} is left out until it changes: {error}")
            return  # else it is missed, as the next look finds
        if not found.is_there():
            return
        for task in self._due(found):
            began = time.monotonic()
            outcome = self._tasks[task](model, tokenizer, batch_size, job)
            self._add(found, {"task": task, **outcome, "dtype": str(job.dtype).removeprefix("torch."),
                              "limit": self._limit, "seconds": round(time.monotonic() - began, 3)})
            for line in describe(outcome["scores"]):
                self._log(f"step {found.facts['step']}: {line}")

    def _miss(self, found: Found) -> None:
        self._missed.add(found.id)
        self._add(found, {"missed": True})
        self._log(f"step {found.facts['step']}: missed, the run has deleted it")

    def _add(self, found: Found, values: dict[str, Any]) -> None:
        files.append_line(self._path, json.dumps({**found.facts, **values}))
        self._done.add((found.id, values.get("task"), self._limit))

    def _is_over(self) -> bool:
        """Whether the run has finished and nothing of it is to come; says it when the run stops before that."""
        try:
            line = self._run.refresh(locked_inodes())
        except OSError:
            line = {"state": "not there yet"}
        state = line["state"]
        if state == "finished":
            # Of a run on another host its last checkpoint may be on its way still.
            is_last = line["step"] in run_folder.step_folders(self._folder)
            if (is_last or time.time() - line["changed_at"] > QUIET_S) and not self._next():
                self._log(f"{self._folder} has finished, and its checkpoints are scored")
                return True
        elif state not in ("running", self._state):
            self._log(f"the run in {self._folder} is {state}: waiting for it (Ctrl-C ends this, and loses nothing)"
                      if state == "not there yet" else
                      f"the run in {self._folder} has {state}: waiting for it to go on (Ctrl-C ends this, and loses "
                      "nothing)")
        self._state = state
        return False


def facts_of(folder: Path, step: int, key: str) -> dict[str, Any]:
    """Of a checkpoint: its step and tokens, where it stands in the data, and which save it is. Raises OSError or
    ValueError."""
    trainer = run_folder.read_trainer(folder)
    places = {name: trainer[name] for name in ("tokens", "next_seq", "seqs_per_step") if name in trainer}
    return {"step": step, **places, "checkpoint": key}


def looks_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a folder's files."""
    with contextlib.suppress(OSError):
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
    return []
