"""The run folder: lock, save, verify, find, load.

    out/run/
        .lock                   held by rank 0 while a run writes here; the system frees it when the process dies
        train_config.json       the options of the run
        metrics.jsonl           metrics.py's
        checkpoints/
            latest -> step_00000500
            best   -> step_00000250
            step_00000250/      a Hugging Face model folder:
                config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
                SHA256SUMS      of every other file here (`sha256sum -c SHA256SUMS` reads it)
                training/       what only a resume needs: optimizer.safetensors, trainer.json

Invariants: a folder named step_* is complete, because it is written under a hidden name, synced to disk and then
renamed; only then are the links moved, each by one rename; only then are old checkpoints deleted. So a kill at any
moment leaves every published checkpoint whole and the links on one of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file

import files
import optim
import weights
from model import GPT
from tokenizer import Tokenizer


@dataclass
class RunConfig:
    """Run folder and checkpoints"""

    out_dir: str = "out"  # run folder
    resume: Literal["auto", "must", "never"] = "auto"  # auto: go on from the newest checkpoint in out_dir, if any
    overwrite: bool = False  # with resume=never: delete the run that is in out_dir
    save_interval: int = 0  # steps between checkpoints; 0 = at each evaluation
    always_save_checkpoint: bool = True  # False: of the evaluations, only those with the best val loss save
    keep_last: int = 3  # checkpoints kept besides the best; 0 = all


def load_model(source: str, **overrides: Any) -> GPT:
    """GPT.from_pretrained, after the checksums of a folder that has them were verified."""
    path = weights.resolve(source)
    if (path / "SHA256SUMS").is_file():
        verify(path)
    return GPT.from_pretrained(str(path), **overrides)


def verify(folder: Path) -> None:
    """Raises ValueError unless every file of SHA256SUMS is there with the content it had when it was saved."""
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        raise ValueError(f"checkpoint {folder} has no SHA256SUMS: it is incomplete or not ours")
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is damaged: {name} is missing")
        if files.sha256_file(path) != digest:
            raise ValueError(f"checkpoint {folder} is damaged: {name} is not what was saved (its checksum differs)")


class RunFolder:
    def __init__(self, out_dir: str):
        self.path = Path(out_dir)
        self.checkpoints = self.path / "checkpoints"
        self._lock = FileLock(self.path / ".lock")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release(force=True)

    def find(self, config: RunConfig, lock: bool, warn: Callable[[str], None]) -> Path | None:
        """The checkpoint that `resume` means, None for a new run; makes nothing. With `lock`, a folder that holds a
        run is locked before anything is read in it. Raises ValueError or OSError."""
        if lock and self.checkpoints.is_dir():
            self._take_lock()
        if config.resume == "never":
            if self.steps() and not config.overwrite:
                raise ValueError(f"{self.path} holds a run, and resume=never: choose another --out_dir, or delete that "
                                 "run with --overwrite=True")
            return None
        folder = self.newest_valid(warn)
        if folder is None and config.resume == "must":
            raise ValueError(f"nothing to resume: {self.path} holds no checkpoint"
                             + (f" of ours (start from nanoGPT's with --init_from={self.path}/ckpt.pt and another "
                                "--out_dir)" if (self.path / "ckpt.pt").is_file() else ""))
        return folder

    def open(self, options: dict[str, Any], is_new: bool, overwrite: bool) -> None:
        """Make the folder this run's: lock it, delete what a killed save left (`overwrite`: the whole old run), and
        write train_config.json. Raises OSError when another run writes here, or has done so since `find`."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if is_new and self.steps() and not overwrite:
            raise OSError(f"another run has begun in {self.path} meanwhile: choose another --out_dir")
        for leftover in [*self.checkpoints.glob("*" if overwrite else ".*")]:
            _remove(leftover)
        files.write_json(self.path / "train_config.json", options)

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OSError(f"{self.path} is in use by another run: wait for it, or choose another --out_dir") from None

    def steps(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted(self.checkpoints.glob("step_*"))

    def newest_valid(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose checksums hold, None when there is no checkpoint at all.

        Raises ValueError when there are checkpoints and all are damaged, rather than let a run start over them."""
        damage = []
        for folder in reversed(self.steps()):
            try:
                verify(folder)
            except (ValueError, OSError) as error:
                damage.append(str(error))
                continue
            for line in damage:
                warn(f"warning: {line}; going back to {folder.name}")
            return folder
        if damage:
            raise ValueError(f"{damage[0]}; no other checkpoint is left in {self.checkpoints}: restore one, or start "
                             "anew with --resume=never --overwrite=True")
        return None

    def save(self, model: GPT, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer | None,
             trainer: dict[str, Any], is_best: bool, keep_last: int) -> Path:
        """Publish the checkpoint of trainer["step"]. Raises OSError, with all that was there untouched, when the disk
        is full."""
        final = self.checkpoints / f"step_{trainer['step']:08d}"
        hidden = self.checkpoints / f".{final.name}"
        _remove(hidden)
        try:
            (hidden / "training").mkdir(parents=True)
            eot_id = tokenizer.eot_id if tokenizer else None
            weights.save_pretrained(model.config, model.state_dict(), hidden, eot_id)
            if tokenizer:
                tokenizer.save(hidden, model_max_length=model.config.block_size)
            state = {name: t.detach().cpu() for name, t in optim.optimizer_state(optimizer, model).items()}
            weights.save_tensors(state, hidden / "training" / "optimizer.safetensors")
            files.write_json(hidden / "training" / "trainer.json", trainer)
            _write_sums(hidden)
            _sync(hidden)
        except BaseException:
            _remove(hidden)
            raise
        if final.exists():  # a damaged one that a resume went back over
            self._retire(final)
        os.rename(hidden, final)
        files.sync(self.checkpoints)
        self._link("latest", final.name)
        if is_best:
            self._link("best", final.name)
        self._prune(keep_last)
        return final

    def _link(self, name: str, target: str) -> None:
        fresh = self.checkpoints / f".{name}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        os.replace(fresh, self.checkpoints / name)

    def _prune(self, keep_last: int) -> None:
        linked = {(self.checkpoints / name).resolve() for name in ("latest", "best")}
        for folder in self.steps()[:-keep_last] if keep_last else []:
            if folder.resolve() not in linked:
                self._retire(folder)

    def _retire(self, folder: Path) -> None:
        """Delete a published checkpoint: hidden first, so that a kill leaves no half of it under its name."""
        hidden = folder.with_name(f".old_{folder.name}")
        _remove(hidden)
        os.rename(folder, hidden)
        _remove(hidden)


def read_trainer(folder: str | Path) -> dict[str, Any]:
    """trainer.json of a checkpoint."""
    return files.read_json(Path(folder) / "training" / "trainer.json")


def read_optimizer(folder: str | Path) -> dict[str, torch.Tensor]:
    """The optimiser's tensors of a checkpoint, on the host. Raises ValueError for a broken file."""
    path = Path(folder) / "training" / "optimizer.safetensors"
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken: {error}") from None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "SHA256SUMS")


def _write_sums(folder: Path) -> None:
    lines = [f"{files.sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def _sync(folder: Path) -> None:
    """Force files and folders to the disk, so that the rename that follows cannot outrun them in a power cut."""
    for path in [*folder.rglob("*"), folder]:
        files.sync(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
