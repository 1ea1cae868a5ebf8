"""How a run folder is read, by every script: the records of metrics.jsonl, the scores of evals.jsonl, and which
checkpoints there are, which is the newest, the best, and which are complete. training/checkpoint.py, which writes the
folder, describes the layout.

Owns how the newest and the best checkpoint of a run are found. The links `latest` and `best` are for people: a copy may
have lost them, or have folders or text files in their places. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flatgpt.files import read_json, refuse_pointer, sha256_file, write_text

LINKS = ("latest", "best")  # in a run's checkpoints/
EVALS = "evals.jsonl"  # what evaluation/watching.py writes: the scores of checkpoints, a task a line
NUMBER = int | float
MAX_INTEGER = 2**63  # of a record: no run counts so far, and floats and pictures cannot hold what JSON can
OPTIONAL_NUMBER = (int, float, type(None))  # a tuple is tested faster than a union, and files of a run are long
TRAINER = {  # trainer.json's keys, and of what kind their values are
    **dict.fromkeys(("step", "next_seq", "bad_steps", "skipped", "rollbacks", "tokens"), int), "best_step": int | None,
    "best_val_loss": NUMBER | None, "elapsed_s": NUMBER, "train_s": NUMBER,
    "options": dict, "spike_detector": dict, "scaler": dict | None}
RECORD = {  # the same for the records of metrics.jsonl; what is not named here are losses, or another version's
    **dict.fromkeys(("tokens", "elapsed_s", "lr", "grad_norm", "tokens_per_sec", "mfu", "memory_gb", "skipped",
                     "rollbacks", "next_seq", "reached", "train_s"), OPTIONAL_NUMBER),
    "batch_hash": str, "machine": str, "fault": str, "samples": list, "prompts": list, "stopped": str,
    "branched_from": str}
EVAL = {  # the same for the records of evals.jsonl
    **dict.fromkeys(("step", "next_seq", "seqs_per_step", "limit"), int), "tokens": NUMBER, "seconds": NUMBER,
    "checkpoint": str, "task": str, "missed": bool, "scores": dict, "versions": dict, "lower_is_better": list,
    "harness": str, "dtype": str}
EVENTS = {"fault": "skipped step", "rollbacks": "rollback", "resumed": "restart",
          "branched_from": "branch"}  # key of a record -> what it is of


def number(value: Any) -> float:
    """A value of a record; NaN for what is null, missing or no number that can be reckoned with."""
    try:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and math.isfinite(value) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def parse_record(line: str | bytes) -> dict | None:
    """A line of metrics.jsonl without the values of another kind than a run writes; None for what is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or abs(record["step"]) > MAX_INTEGER:
        return None
    return {key: value for key, value in record.items()
            if isinstance(value, RECORD.get(key, OPTIONAL_NUMBER if "/" in key else object))
            and not (isinstance(value, int) and abs(value) > MAX_INTEGER)}


def parse_eval(line: str | bytes) -> dict | None:
    """A line of evals.jsonl: of a task's `scores`, of which only numbers are kept, or of a checkpoint that was
    `missed`. None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not {"step", "checkpoint"} <= record.keys() or not (
            all(isinstance(value, EVAL[key]) and (not isinstance(value, int | float) or _is_usable(value))
                for key, value in record.items() if key in EVAL)):
        return None
    if not (record.get("missed") or {"task", "scores"} <= record.keys()):
        return None
    scores = {name: {key: value for key, value in metrics.items()
                     if type(value) in (int, float) and _is_usable(value)}
              for name, metrics in record.get("scores", {}).items() if isinstance(metrics, dict)}
    return record | {"scores": scores}


def read_records(path: Path, parse: Callable[[str], dict | None] = parse_record) -> list[dict]:
    """The records of a metrics.jsonl or, with parse_eval, of an evals.jsonl; none when there is no such file. Lines
    that are none are left out, since a kill, or a run that is just writing, leaves one torn; and so are values of
    another kind than is written there."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if record := parse(line):
                records.append(record)
    return records


def _is_usable(value: float) -> bool:
    """False for a number that is not finite, and for a whole one of hundreds of digits."""
    return -1e300 < value < 1e300


def restart_point(record: dict[str, Any]) -> tuple[int, int] | None:
    """(step, next_seq) from which a run went on, for a record of a rollback or a resume; else None."""
    if {"rollbacks", "resumed"} & record.keys() and isinstance(record.get("next_seq"), int):
        return record["step"], record["next_seq"]
    return None


def current_scores(evals: Iterable[dict], restart_points: list[tuple[int, int]], newest_step: int) -> list[dict]:
    """Those records of evals.jsonl with scores of what the run has in its past, in the order of steps: without what a
    rollback, or a resume from an older checkpoint, went back from. `restart_points` are those of the records of
    metrics.jsonl, in their order, and `newest_step` is the last one's.

    Step and next_seq grow together, seqs_per_step at a time, but a rollback goes back in steps and not in the data: so
    what was trained before it, and what was after, differ in what next_seq is at a step. Of two records of one step and
    task the later counts."""
    found = {}
    for record in evals:
        step = record["step"]
        from_step, from_seq = next((point for point in reversed(restart_points) if point[0] < step), (0, 0))
        gained = record.get("next_seq", 0) - from_seq - (step - from_step) * record.get("seqs_per_step", 0)
        is_told = {"next_seq", "seqs_per_step"} <= record.keys()  # else by an earlier version's checkpoint
        if step <= newest_step and record["scores"] and not (is_told and gained):
            found[step, record["task"]] = record
    return sorted(found.values(), key=lambda record: record["step"])


def curves_of_scores(records: Iterable[dict]) -> dict[str, dict[str, Any]]:
    """`current_scores` by task and metric: "arc_easy/acc" -> {"task", "metric", "is_lower_better", "points"}, each
    point a step, its tokens, the score and its standard error (None where none is known)."""
    curves: dict[str, dict[str, Any]] = {}
    for record in records:
        for task, metrics in record["scores"].items():
            for metric, value in metrics.items():
                if metric == "questions" or "_stderr" in metric:
                    continue
                curve = curves.setdefault(f"{task}/{metric}", {
                    "task": task, "metric": metric, "points": [],
                    "is_lower_better": metric.partition(",")[0] in record.get("lower_is_better", ())})
                curve["points"].append({"step": record["step"], "tokens": record.get("tokens"), "value": value,
                                        "stderr": metrics.get(stderr_of(metric))})
    return curves


def stderr_of(metric: str) -> str:
    """The name of a metric's standard error: acc_stderr; exact_match_stderr,strict-match for one with a filter."""
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"


def write_records(path: Path, records: list[dict]) -> None:
    """See `files.write_text`."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


# Checkpoints


def step_folders(run: Path) -> dict[int, Path]:
    """Step -> checkpoint folder, oldest first, whole or not. Where a copy has a folder in a link's place, that one
    stands for its step if the step's own folder is missing or lacks files."""
    found = {}
    for path in sorted((run / "checkpoints").glob("step_*")):
        if re.fullmatch("step_[0-9]+", path.name) and path.is_dir():
            found[step_of(path)] = path
    for path in (run / "checkpoints" / name for name in LINKS):
        step = step_of(path) if path.is_dir() and not path.is_symlink() else None
        if step is not None and (step not in found or (is_whole(path) and not is_whole(found[step]))):
            found[step] = path
    return dict(sorted(found.items()))


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint, which its name says, or else its trainer.json; None where neither does."""
    if found := re.fullmatch("step_([0-9]+)", folder.name):
        return int(found[1])
    with contextlib.suppress(OSError, ValueError):
        return read_trainer(folder)["step"]
    return None


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has all its files; half a copy has not. What is in them is for `verify`."""
    try:
        names = read_sums(folder)
        return bool(names) and all((folder / name).is_file() for name in names)
    except OSError:
        return False


def checkpoint_id(folder: Path) -> str:
    """What tells one save from all others, also of the same step: of SHA256SUMS, which covers trainer.json and so the
    time of the save. Raises FileNotFoundError."""
    return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()[:16]


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is whole. Where none is, the newest of them, for its reader to say what it lacks; or
    what `latest` or `best` lead to."""
    folders = [*step_folders(run).values()]
    others = [path for name in LINKS if (path := run / "checkpoints" / name).is_dir()]
    return next(filter(is_whole, reversed(folders)), (folders[-1:] or others or [None])[0])


def best_checkpoint(run: Path, before: int | None = None) -> Path | None:
    """The checkpoint with the best validation loss, of those before a step where one is given; None where none is
    known to be the best.

    The newest whose trainer.json can be read says which it is. Where that checkpoint is not here, it is taken from the
    losses: each checkpoint carries the best of the run so far, and an improvement always saves, so that the first with
    the lowest is the best."""
    folders = {step: folder for step, folder in step_folders(run).items() if before is None or step < before}
    trainers = _readable_trainers(reversed(folders.values()))
    newest, trainer = next(trainers, (run, {"best_step": None}))
    best = trainer.get("best_step", -1)
    if best is None or best in folders:
        return folders.get(best)
    losses = {folder: trainer["best_val_loss"] for folder, trainer in [(newest, trainer), *trainers]
              if trainer.get("best_val_loss") is not None}
    return min(reversed(losses), key=losses.get, default=None)


def _readable_trainers(folders: Iterable[Path]) -> Iterator[tuple[Path, dict]]:
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            yield folder, read_trainer(folder)


def find_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint of a run called `which`: best, latest, or step_5000 (zeros before the number do not count). Raises
    ValueError, which lists the checkpoints that exist."""
    steps = step_folders(run)
    if not steps:
        raise ValueError(f"{run} is not a run folder with checkpoints, as train.py makes one of its --out_dir")
    there = {"best": best_checkpoint(run), "latest": newest_checkpoint(run)} | {
        f"step_{step}": folder for step, folder in steps.items()}
    if folder := there.get(re.sub("^step_0+(?=[0-9])", "step_", which)):
        return folder
    raise ValueError(f"there is no checkpoint {which!r} in {run}; it has "
                     f"{', '.join(name for name, folder in there.items() if folder)}")


def verified_checkpoint(run: Path, which: str) -> Path:
    """The same, once its checksums hold. Raises ValueError, which lists the others, and OSError."""
    folder = find_checkpoint(run, which)
    with reading(folder):
        try:
            verify(folder)
        except ValueError as error:
            others = [f"step_{step}" for step, other in step_folders(run).items() if other != folder]
            raise ValueError(f"{error}; besides it {run} has {', '.join(others) or 'none'}") from None
    return folder


def follow_link(path: Path) -> Path:
    """The path itself; but where it names a run's `best` or `latest`, and no folder is there, that checkpoint."""
    if path.name not in LINKS or path.parent.name != "checkpoints" or path.is_dir():
        return path
    find = best_checkpoint if path.name == "best" else newest_checkpoint
    return find(path.parent.parent) or path


def read_trainer(folder: str | Path) -> dict:
    """trainer.json of a checkpoint. Raises FileNotFoundError, or ValueError for one that a run cannot go on from."""
    path = Path(folder) / "training" / "trainer.json"
    trainer = read_json(path)
    if "judge" in trainer:  # its name in older checkpoints
        trainer["spike_detector"] = trainer.pop("judge")
    for key, kinds in TRAINER.items():
        if not isinstance(trainer.get(key), kinds) and (key in trainer or key == "step"):
            raise ValueError(f"{path} has unexpected content: {key} is {trainer.get(key)!r:.50}")
    return trainer


def read_sums(folder: Path) -> dict[str, str]:
    """A checkpoint's files and their checksums, as SHA256SUMS has them. Raises FileNotFoundError."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def verify(folder: Path) -> None:
    """Raises ValueError unless every file of SHA256SUMS is there with the content it had when it was saved."""
    sums = read_sums(folder) if (folder / "SHA256SUMS").is_file() else {}
    if not sums:
        raise ValueError(f"checkpoint {folder} has no SHA256SUMS: it is incomplete, or flatGPT did not write it")
    for name, digest in sums.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is damaged: {name} is missing")
        if sha256_file(path) != digest:
            refuse_pointer(path)
            raise ValueError(f"checkpoint {folder} is damaged: {name} has changed since it was saved (its checksum "
                             "differs)")


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn an error in this block into a clear one, if the run that is still training has deleted the checkpoint."""
    try:
        yield
    except (OSError, ValueError):
        if folder.exists():
            raise
        raise FileNotFoundError(f"the run that is still training has deleted {folder} in the meantime: give the same "
                                "command again, and it finds a newer checkpoint") from None
