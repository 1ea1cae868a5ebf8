"""Finished runs -> the points that a scaling law is fitted to (planning/fit.py).

Owns which runs can be compared. N is all parameters of the newest checkpoint, a tied table once, as Chinchilla counts
and report.py shows; D is the tokens of all steps, those that were read again in a later epoch and those that a branch
has from its stem included; L is the validation loss that the run ended with. A loss in the middle of a schedule is no
point, because it falls when the learning rate decays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatgpt import run_folder
from flatgpt.files import read_json
from flatgpt.planning.fit import Point
from flatgpt.run_folder import number
from flatgpt.training.plots import count_parameters

# Options by which a recipe differs that a law takes for one, and the loss that it speaks of; sizes and lengths are not
# among them, nor learning rates, which are often chosen for a size.
RECIPE = ("model", "block_size", "documents", "eval_tokens", "dropout", "pos", "norm", "mlp", "qk_norm",
          "tie_embeddings", "optimizer", "schedule", "decay_lr", "width_base")


@dataclass
class FinishedRun:
    point: Point
    options: dict[str, Any]
    fingerprint: str  # of its data
    has_decayed: bool  # its learning rate; if not, it was constant


def gather(folders: Sequence[str]) -> tuple[list[FinishedRun], dict[str, str]]:
    """The runs in these folders that one law can be fitted to, and of the others why they are left out. Raises
    FileNotFoundError for a folder that is not there, and ValueError when runs are of different data."""
    runs: list[FinishedRun] = []
    left_out: dict[str, str] = {}
    for folder in dict.fromkeys(map(Path, folders)):
        name = str(folder)
        if folder.suffix == ".py":
            raise ValueError(f"{name} stands among the runs of --fit: name config files before it")
        if not folder.exists():
            raise FileNotFoundError(f"there is no run folder {folder}")
        try:
            runs.append(finished_run(folder))
        except FileNotFoundError as error:
            left_out[name] = f"it is no run of train.py, or has not begun: it has no {Path(error.filename).name}"
        except (OSError, ValueError) as error:
            left_out[name] = str(error)
    seen: dict[Point, str] = {}
    for run in runs:
        first = seen.setdefault(run.point._replace(name=""), run.point.name)
        if first != run.point.name:
            left_out[run.point.name] = f"the same run as {first}"
        elif not run.has_decayed and any(other.has_decayed for other in runs):
            left_out[run.point.name] = "its learning rate has not decayed, and that of other runs has"
    runs = [run for run in runs if run.point.name not in left_out]
    _check_data(runs)
    return runs, left_out


def finished_run(folder: Path) -> FinishedRun:
    """Raises OSError or ValueError, with the reason, for what is no run, or is one that cannot be compared."""
    if not folder.is_dir():
        raise ValueError("it is no folder")
    options, last = read_json(folder / "train_config.json"), _last_records(folder / "metrics.jsonl")
    newest, max_iters = run_folder.newest_checkpoint(folder), number(options.get("max_iters"))
    if last["val/loss"].get("step") != max_iters:
        step = last["step"]["step"]
        raise ValueError(f"it has reached its target before its learning rate decayed, at step {step:,}"
                         if "reached" in last["step"] else f"it is not finished: step {step:,} of {max_iters:,.0f}")
    num_params = count_parameters(newest) if newest else None
    if num_params is None:
        raise ValueError("it has no checkpoint whose parameters can be counted")
    if options.get("init_from", "scratch") not in ("scratch", "resume") and not options.get("branch_from"):
        raise ValueError(f"it began with the weights of {options['init_from']}, whose tokens are not counted")
    loss, tokens = (number(last["val/loss"].get(key)) for key in ("val/loss", "tokens"))
    if not loss > 0:  # null, where it was not a number
        raise ValueError("its last validation loss is not a number")
    if not tokens > 0:
        raise ValueError("it was trained on no tokens")
    fingerprint = str(run_folder.read_trainer(newest).get("data_fingerprint"))
    return FinishedRun(Point(str(folder), num_params, int(tokens), loss), options, fingerprint,
                       _has_decayed(options, max_iters))


def _last_records(path: Path) -> dict[str, dict[str, Any]]:
    """The last record of all (`step`), and the last that has a `val/loss`, {} where none has. Only the end of the file
    is parsed, which may be long. Raises ValueError where there is no record."""
    last: dict[str, dict[str, Any]] = {}
    for line in reversed(path.read_bytes().splitlines()):
        record = run_folder.parse_record(line) or {}
        last = {key: record for key in ("step", "val/loss") if key in record} | last
        if len(last) == 2:
            return last
    if not last:
        raise ValueError("it has not reported anything yet")
    return last | {"val/loss": {}}


def _has_decayed(options: dict[str, Any], max_iters: float) -> bool:
    """False if the learning rate stayed to the end. Raises ValueError if the run ended in the middle of a decay."""
    if not options.get("decay_lr", True) or options.get("schedule") == "constant":
        return False
    end = number(options.get("lr_decay_iters"))
    if options.get("schedule") == "wsd" and max_iters <= end * (1 - number(options.get("decay_fraction"))):
        return False
    if not max_iters >= end:
        raise ValueError(f"it ended in the middle of its schedule: {max_iters:,.0f} steps of lr_decay_iters={end:,.0f}")
    return True


def _check_data(runs: list[FinishedRun]) -> None:
    by_data: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_data.setdefault(run.fingerprint, []).append(run)
    if len(by_data) > 1:
        groups = "; ".join(f"{group[0].options.get('dataset')}: {_few([run.point.name for run in group])}"
                           for group in by_data.values())
        raise ValueError(f"losses on different data or tokens are not of one law, and these runs have {len(by_data)} "
                         f"kinds of data ({groups}); name the runs of one")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def differences(runs: Sequence[FinishedRun], points: Sequence[Point]) -> dict[str, list[str]]:
    """Options of the recipe that the runs behind these points differ in, with their values."""
    values = {key: sorted({str(run.options.get(key)) for run in runs if run.point in points}) for key in RECIPE}
    return {key: found for key, found in values.items() if len(found) > 1}
