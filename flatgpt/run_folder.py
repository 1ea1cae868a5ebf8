"""How a run folder is read, by every script: the records of metrics.jsonl, and which checkpoints there are, which is
the newest, the best, and which are complete. training/checkpoint.py, which writes the folder, describes the layout.

Owns how the newest and the best checkpoint of a run are found. The links `latest` and `best` are for people: a copy may
have lost them, or have folders or text files in their places. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from flatgpt.files import read_json, refuse_pointer, sha256_file, write_text

LINKS = ("latest", "best")  # in a run's checkpoints/
NUMBER = int | float
OPTIONAL_NUMBER = (int, float, type(None))  # a tuple is tested faster than a union, and files of a run are long
TRAINER = {  # trainer.json's keys, and of what kind their values are
    **dict.fromkeys(("step", "next_seq", "bad_steps", "skipped", "rollbacks", "tokens"), int), "best_step": int | None,
    "best_val_loss": NUMBER | None, "elapsed_s": NUMBER, "train_s": NUMBER,
    "options": dict, "judge": dict, "scaler": dict | None}
RECORD = {  # the same for the records of metrics.jsonl; what is not named here are losses, or another version's
    **dict.fromkeys(("tokens", "elapsed_s", "lr", "grad_norm", "tokens_per_sec", "mfu", "memory_gb", "skipped",
                     "rollbacks", "next_seq", "reached", "train_s"), OPTIONAL_NUMBER),
    "batch_hash": str, "machine": str, "fault": str, "samples": list, "stopped": str, "branched_from": str}
EVENTS = {"fault": "skipped step", "rollbacks": "rollback", "resumed": "restart",
          "branched_from": "branch"}  # key of a record -> what it is of


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; none when there is no such file. Lines that are none are left out, since a kill,
    or a run that is just writing, leaves one torn; and so are values of another kind than a run writes."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if record := parse_record(line):
                records.append(record)
    return records


def parse_record(line: str | bytes) -> dict | None:
    """A line of metrics.jsonl without the values of another kind than a run writes; None for what is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {key: value for key, value in record.items()
            if isinstance(value, RECORD.get(key, OPTIONAL_NUMBER if "/" in key else object))}


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
