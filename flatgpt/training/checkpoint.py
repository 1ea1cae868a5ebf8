"""The run folder as train.py holds it: the lock, where a run goes on from, saving, and what is deleted.

    out/run/
        .lock                   held by rank 0 while a run writes here; the system frees it when the process dies
        train_config.json       the options of the run
        launch.json             what began it, and may go on with it against resume=never
        metrics.jsonl           metrics.py's
        evals.jsonl             of eval.py --watch, which locks it by .evals.lock and writes nothing else here
        checkpoints/
            latest -> step_00000500     links for people and other programs, on disks that have links; a script
            best   -> step_00000250     here goes by the step folders and their trainer.json (run_folder.py)
            step_00000250/      a Hugging Face model folder:
                config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
                SHA256SUMS      of every other file here (`sha256sum -c SHA256SUMS` reads it)
                training/       what only a resume needs: optimizer.safetensors, trainer.json

Invariants: a folder named step_* is complete, because it is written under a hidden name, synced to disk and then
renamed; only then are the links moved, each by one rename; only then are old checkpoints deleted, but never the best.
So a kill at any moment leaves every published checkpoint whole and the links on one of them.

A save costs the loop a copy of the state into host memory; a thread writes the copy. One save is under way at a time.
A checkpoint holds whole tensors, so it does not depend on the number of ranks or on how they share the model.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from filelock import FileLock

from flatgpt import files, launcher
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.models import weights
from flatgpt.options import failed_rules
from flatgpt.run_folder import LINKS, best_checkpoint, read_trainer, step_folders, step_of, verify
from flatgpt.training import distributed, optim, parallel
from flatgpt.training.distributed import Job
from flatgpt.training.resume import fresh_state
from model import GPTConfig, LanguageModel

MAX_FAILED_SAVES = 3  # in a row; then a run stops
LEFTOVERS = (".step_", ".old_", ".latest", ".best")  # of a save or a deletion that was killed
ALIGNMENT = 64  # bytes; of each tensor in the host's copy
State = dict[str, torch.Tensor]


@dataclass
class RunConfig:
    """Run folder and checkpoints"""

    out_dir: Annotated[str, "path"] = "out"  # run folder
    resume: Literal["auto", "must", "never"] = "auto"  # auto: go on from the newest checkpoint in out_dir, if any
    branch_from: str = ""  # with init_from=RUN: best, latest or step_5000 of it, to go on from in this folder
    overwrite: bool = False  # with resume=never: delete the run that is in out_dir
    save_interval: int = 0  # steps between checkpoints; 0 = at each evaluation
    always_save_checkpoint: bool = True  # False: after an evaluation save only if its val loss is the best so far
    keep_last: int = 3  # checkpoints kept besides the best; 0 = all
    keep_every: int = 0  # also keep the checkpoints at multiples of this step; 0 = only keep_last

    def validate(self) -> list[str]:
        faults = failed_rules(
            self, ("save_interval", self.save_interval >= 0, "0 or more"),
            ("keep_last", self.keep_last >= 0, "0 or more"), ("keep_every", self.keep_every >= 0, "0 or more"),
            ("out_dir", self.out_dir.strip() != "", "the name of a folder"))
        if self.overwrite and self.resume != "never":
            faults.append("overwrite=True needs resume=never, which says that the old run is to go")
        return faults


class RunFolder:
    """The folder `config.out_dir`; `log` prints a line for the user. Only rank 0 reads and writes the folder."""

    def __init__(self, config: RunConfig, job: Job, log: Callable[[str], None] = print):
        self.config, self.path = config, Path(config.out_dir)
        self.checkpoints = self.path / "checkpoints"
        self._job, self._log = job, log
        self._lock = FileLock(self.path / ".lock")
        self._host: tuple[State, State] = {}, {}  # the copies of weights and optimiser, used again by each save
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="save", initializer=_step_back)
        self._writing: tuple[Future[Path], int, bool] | None = None  # with its step, and whether that is the best
        self._failures: list[str] = []  # of the latest saves in a row
        self._launch = [launcher.launch()]  # of every rank, when they have met
        self._warnings: dict[str, str | None] = {}  # of what a save can do without; None once it was said

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.shutdown()  # waits: a save that is under way is not given up
        self._lock.release(force=True)

    def start(self, lock: bool) -> dict[str, Any]:
        """The trainer's state to start from, the same on every rank, with `folder`, the checkpoint that it and the
        weights come from, or None. Raises as `find` does, and ValueError when rank 0's is not the newest checkpoint."""
        # Without a shared disk the run lies on rank 0's, and torchrun may have given that rank to another node.
        newest = distributed.gather(max(step_folders(self.path), default=-1), self._job)
        self._launch = distributed.gather(launcher.launch(), self._job)
        if self.config.resume != "never" and max(newest) > newest[0]:
            there = f"that of step {newest[0]}" if newest[0] >= 0 else "none"
            holder = self._job.name(newest.index(max(newest)))
            raise ValueError(f"{holder} finds the checkpoint of step {max(newest)} in {self.path}, but "
                             f"{self._job.name(0)}, which has to read it, finds {there}: copy the folder to rank 0's "
                             "node, or share it")

        return distributed.on_rank0(lambda: self.state_in(self.find(lock)), self._job)

    def state_in(self, folder: Path | None) -> dict[str, Any]:
        """What a checkpoint's trainer.json says, and `folder`; without one, the state of a new run."""
        found = {"options": self._begun()} if folder is None else read_trainer(folder) | {
            "folder": str(folder), "is_new": False}
        return fresh_state() | found

    def find(self, lock: bool) -> Path | None:
        """The checkpoint that `resume` means, None for a new run; makes nothing. With `lock`, a folder that holds a
        run is locked before anything is read in it. Raises ValueError or OSError."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out_dir={self.path} is a file")
        if lock and self.checkpoints.is_dir():
            self._take_lock()
        if self.config.resume == "never" and not self._is_of_this_launch():
            if self.steps() and not self.config.overwrite:
                raise ValueError(f"{self.path} holds a run, and resume=never: choose another --out_dir, or delete that "
                                 "run with --overwrite=True")
            return None
        folder = self.newest_valid()
        if folder is None and self.config.resume == "must":
            hint, theirs = "", self.path / "ckpt.pt"
            if theirs.is_file():
                weights.read_nanogpt(theirs)  # raises ValueError for what is none
                hint = f" of ours (start from nanoGPT's with --init_from={theirs} and another --out_dir)"
            raise ValueError(f"nothing to resume: {self.path} holds no checkpoint{hint}")
        return folder

    def open(self, options: dict[str, Any], is_new: bool) -> bool:
        """Make the folder this run's: lock it, delete what a killed save left (`overwrite`: the whole old run), and
        write train_config.json. Returns whether the run is new still, and no restart of one that had saved nothing.
        Raises OSError when another run writes here, or has done so since `find`."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        is_restart = self._is_of_this_launch()
        overwrite = is_new and self.config.overwrite and not is_restart
        if is_new and self.steps() and not overwrite:
            raise OSError(f"another run has begun in {self.path} meanwhile: choose another --out_dir")
        for leftover in [*self.checkpoints.iterdir()]:
            if overwrite or leftover.name.startswith(LEFTOVERS):
                _remove(leftover)
        self._make_room_for_links()
        files.write_json(self.path / "launch.json", {"ranks": self._launch})
        files.write_json(self.path / "train_config.json", options)
        return is_new and not is_restart

    def _make_room_for_links(self) -> None:
        """What a copy that followed the links has put in their places: a checkpoint whose step's folder is missing
        becomes that, one that is there twice goes, and what is no checkpoint moves aside."""
        folders = (path for name in LINKS if (path := self.checkpoints / name).is_dir() and not path.is_symlink())
        for path in folders:
            with contextlib.suppress(OSError):  # then the link cannot be made, which will be said
                if path in self.steps():
                    self._publish(path, self.checkpoints / _name(step_of(path)))
                elif step_of(path) is not None:
                    _remove(path)
                else:
                    os.rename(path, path.with_name(f"{path.name}.old"))

    def _is_of_this_launch(self) -> bool:
        """Whether the run that lies here was begun, or gone on with, by the torchrun or the Slurm job that has started
        us again: then it is to go on, also where `resume=never` spoke of what lay here before."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # there is none, or it is not ours
            before = files.read_json(self.path / "launch.json")
            return any(launcher.is_restart(now, then) for now in self._launch for then in before["ranks"])
        return False

    def _begun(self) -> dict[str, Any]:
        """The options of a run that was stopped here before its first checkpoint and is now started again, else {}."""
        if not self.steps() and (self.config.resume != "never" or self._is_of_this_launch()):
            with contextlib.suppress(OSError, ValueError):  # there is none, or it cannot be read
                return files.read_json(self.path / "train_config.json")
        return {}

    def _take_lock(self) -> None:
        files.take_lock(self._lock, f"{self.path} is in use by another run: wait for it, or choose another --out_dir")

    def steps(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return [*step_folders(self.path).values()]

    def newest_valid(self, is_wanted: Callable[[Path], bool] = lambda folder: True) -> Path | None:
        """The newest wanted checkpoint whose checksums hold, None when there is no checkpoint at all.

        Raises ValueError when there are checkpoints and all are damaged, rather than let a run start over them."""
        damage = []
        for folder in reversed(self.steps()):
            try:
                verify(folder)
            except (ValueError, OSError) as error:
                damage.append(str(error))
                continue
            if not is_wanted(folder):
                continue
            for line in damage:
                self._log(f"warning: {line}; going back to {folder.name}")
            return folder
        if damage:
            raise ValueError(f"{damage[0]}; no other checkpoint is left in {self.checkpoints}: restore one, or start "
                             "anew with --resume=never --overwrite=True")
        return None

    def save(self, model: LanguageModel, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer | None,
             trainer: dict[str, Any], is_best: bool) -> None:
        """Begin to save the checkpoint of trainer["step"], once the one before is written; `poll` says how it went.

        Every rank has to take part, since each may hold a part of the state; rank 0 writes."""
        distributed.on_rank0(self.poll, self._job)
        for live, host in zip((model.state_dict(), optim.optimizer_state(optimizer, model)), self._host):
            _copy_to_host(live, host, self._job)
        if self._job.rank == 0:
            writing = self._writer.submit(self._write, model.config, tokenizer, trainer, is_best)
            self._writing = writing, trainer["step"], is_best

    def poll(self, wait: bool = True) -> None:
        """When the save under way is over, say how it went; with `wait`, wait for that. A failure is a warning here:
        what was saved before is untouched by it."""
        if self._writing is None or not (wait or self._writing[0].done()):
            return
        (writing, step, is_best), self._writing = self._writing, None
        try:
            folder = writing.result()
        except (OSError, MemoryError, RuntimeError) as error:  # torch's, where it gets no memory, is a RuntimeError
            self._failures.append(str(error))
            self._log(f"warning: step {step} could not be saved: {error}; going on, what was saved before is intact")
        else:
            self._failures.clear()
            self._log(f"step {step}: saved {folder}{' (best so far)' if is_best else ''}")
        for about, warning in self._warnings.items():
            if warning:
                self._log(f"warning: {warning}")
                self._warnings[about] = None

    @property
    def is_saving(self) -> bool:
        """Whether a save has begun whose result `poll` has not reported yet."""
        return self._writing is not None

    @property
    def gave_up(self) -> bool:
        """Whether MAX_FAILED_SAVES saves in a row have failed, so that the run should stop."""
        return len(self._failures) >= MAX_FAILED_SAVES

    def finish(self) -> None:
        """Wait for the last save. Raises OSError when it failed."""
        self.poll()
        if self._failures:
            count = f" {len(self._failures)} times in a row" if len(self._failures) > 1 else ""
            raise OSError(f"saving failed{count}: {self._failures[-1]}; what was saved before is intact")

    def _write(self, config: GPTConfig, tokenizer: Tokenizer | None, trainer: dict[str, Any], is_best: bool) -> Path:
        """Publish a checkpoint of the copies. Raises OSError when the disk is full, MemoryError or RuntimeError when
        the memory is, with all that was there untouched."""
        final = self.checkpoints / _name(trainer["step"])
        best = final if is_best else best_checkpoint(self.path, before=trainer["step"])
        hidden = self.checkpoints / f".{final.name}"
        model, optimizer = self._host
        _remove(hidden)
        try:
            (hidden / "training").mkdir(parents=True)
            weights.save_pretrained(config, model, hidden, token_ids=tokenizer and tokenizer.token_ids)
            if tokenizer:
                weights.save_tokenizer(config, tokenizer, hidden)
            weights.save_tensors(optimizer, hidden / "training" / "optimizer.safetensors")
            files.write_json(hidden / "training" / "trainer.json",
                             trainer | {"best_step": step_of(best) if best else None})
            _write_sums(hidden)
            files.sync_tree(hidden)
        except BaseException:
            _remove(hidden)
            raise
        self._publish(hidden, final)
        files.sync(self.checkpoints)
        self._link("latest", final)
        if best:
            self._link("best", best)
        self._prune(final, best)
        return final

    def _publish(self, folder: Path, final: Path) -> None:
        if os.path.lexists(final):  # a damaged one that a resume went back over
            self._retire(final)
        os.rename(folder, final)

    def _link(self, name: str, folder: Path) -> None:
        """Point a link at a checkpoint, if the disk supports links."""
        fresh = self.checkpoints / f".{name}"
        try:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(folder.name)
            os.replace(fresh, self.checkpoints / name)
        except (OSError, NotImplementedError) as error:
            self._warnings.setdefault("links", (
                f"the links best and latest could not be made in {self.checkpoints} ({_reason(error)}); going on "
                "without them: flatGPT's scripts find the best and the newest checkpoint by themselves"))

    def retire_after(self, folder: Path) -> None:
        """Delete the checkpoints newer than this one, which the run has gone back to: a start takes the newest."""
        for newer in self.steps()[self.steps().index(folder) + 1:]:
            self._retire(newer)
        self._link("latest", folder)

    def _prune(self, final: Path, best: Path | None) -> None:
        """Delete all but the last `keep_last`, every `keep_every`-th step, the one just saved, and the best."""
        for folder in self.steps()[:-self.config.keep_last] if self.config.keep_last else []:
            is_nth = self.config.keep_every and step_of(folder) % self.config.keep_every == 0
            if is_nth or folder in (final, best):
                continue
            try:
                self._retire(folder)
            except OSError as error:
                self._warnings.setdefault("pruning", f"{folder} could not be deleted: {_reason(error)}; going on")

    def _retire(self, folder: Path) -> None:
        """Delete a published checkpoint: hidden first, so that a kill leaves no half of it under its name."""
        hidden = folder.with_name(f".old_{folder.name}")
        _remove(hidden)
        os.rename(folder, hidden)
        _remove(hidden)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _reason(error: Exception) -> str:
    """An error as text, without the file names that an OSError adds."""
    return getattr(error, "strerror", None) or str(error)


def _copy_to_host(live: Mapping[str, torch.Tensor], host: State, job: Job) -> None:
    """Make `host` whole copies of tensors that may be spread over the ranks; on rank 0 only."""
    if job.rank == 0 and {name: (t.shape, t.dtype) for name, t in live.items()} != {
            name: (t.shape, t.dtype) for name, t in host.items()}:  # the first save, or an optimiser with other state
        host.clear()  # frees the old memory before there is new
        host.update(_host_buffers(live))
    for name, tensor in live.items():
        tensor = parallel.full_tensor(tensor.detach())
        if job.rank == 0:
            host[name].copy_(tensor, non_blocking=tensor.is_cuda)
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)


def _host_buffers(live: Mapping[str, torch.Tensor]) -> State:
    """Host memory for copies of tensors, all in one piece: a GPU writes directly to pinned memory, and torch hands that
    out in powers of two, a piece each. It is not pinned where there is not enough of that."""
    starts = [0, *itertools.accumulate(-(-t.numel() * t.itemsize // ALIGNMENT) * ALIGNMENT for t in live.values())]
    pinned = any(t.is_cuda for t in live.values())
    try:
        buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:
        buffer = torch.empty(starts[-1], dtype=torch.uint8)
    return {name: buffer[start:start + t.numel() * t.itemsize].view(t.dtype).view(t.shape)
            for start, (name, t) in zip(starts, live.items())}


def _step_back() -> None:
    """Give this thread, where it can be told from its process, only the processor time that training leaves over."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _write_sums(folder: Path) -> None:
    lines = [f"{files.sha256_file(path)}  {path.relative_to(folder).as_posix()}\n"
             for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]
    with files.named_errors(folder / "SHA256SUMS"):
        (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):  # it is another user's
            for folder, _, _ in os.walk(path):
                os.chmod(folder, 0o700)  # of a copy of what was read-only
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
