"""How a run continues from a checkpoint: it loads the numbers, weights and optimiser state, and checks that the command
still describes the same run.

Rank 0 reads; the other ranks get their part of each tensor from it. checkpoint.py finds the folder and writes the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flatgpt import run_folder
from flatgpt.models import weights
from flatgpt.models.inference import SHAPE
from flatgpt.options import check_options
from flatgpt.training import distributed, optim, parallel
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, SpikeDetector
from model import GPTConfig, LanguageModel

if TYPE_CHECKING:
    from flatgpt.training.checkpoint import RunFolder

# A run is resumed with the same values of these, or not at all. (World size and micro-batch may change.)
FIXED = (*SHAPE, "optimizer", "muon_beta2", "seed", "seqs_per_step", "documents", "data_fingerprint", "data_vocab_size")
OF_TRAINING = ("optimizer", "muon_beta2", "seed", "seqs_per_step", "documents")  # of these, no use to an evaluation
# What changed, in words, where the values of a key say nothing to a reader.
WORDS = {"data_fingerprint": "the tokens or the shares of the data sets changed",
         "muon_version": "Muon orthogonalises queries, keys and values, the two halves of swiglu and the gates of an "
                         "LSTM or GRU one by one, no longer as one matrix, and by other coefficients"}
OF_A_START = ("init_from", "resume", "eval_only", "branch_from")  # options that no run keeps
# Options of training that a branch does not take over: what only a start means, and what a machine may lack.
NOT_TAKEN_OVER = {*OF_A_START, "bigram_counts", "bigram_k", "max_minutes", "attention"}
MAX_ROLLBACKS = 3


@dataclass
class Progress:
    """The numbers that a run goes on from; trainer.json holds them."""

    step: int = 0  # updates, skipped ones included
    next_seq: int = 0  # number of the first sequence of the next step
    best_val_loss: float | None = None
    bad_steps: int = 0  # skipped updates in a row
    skipped: int = 0  # skipped updates of the whole run
    rollbacks: int = 0

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> Progress:
        return cls(**{f.name: trainer[f.name] for f in fields(cls)})


def fresh_state() -> dict[str, Any]:
    """The trainer's state of a run that begins. `folder` is the checkpoint that it goes on from, its own or, where it
    branches, one of the run `branched_from`."""
    return asdict(Progress()) | {"folder": None, "is_new": True, "branched_from": None, "options": {}, "scaler": None,
                                 "spike_detector": {}, "elapsed_s": 0.0, "train_s": 0.0}


def branch(config: Any, given: Mapping[str, str], trainer: dict[str, Any], log: Callable[[str], None],
           job: Job) -> dict[str, Any]:
    """The state that a branch goes on from: its own `trainer`, once it has saved, and before that its parent's. Of
    train.py's options, `config`, those that decide the training and are not among the keys `given` become what is
    recorded there; where a run lies, reports and computes is its own. Raises ValueError or OSError."""
    if trainer["folder"] is None:
        trainer = distributed.on_rank0(partial(_branch_state, config.init_from, config.run.branch_from), job)
    else:
        distributed.on_rank0(partial(_check_same_branch, config, trainer["options"].get("branch_from", "")), job)
    recorded, step = trainer["options"], trainer["step"]
    for group in (config, config.data, config.model, config.optim):
        own = {key for key, value in vars(group).items() if not is_dataclass(value)}
        for key in own & recorded.keys() - given.keys() - NOT_TAKEN_OVER:
            setattr(group, key, recorded[key])
    if trainer["branched_from"]:
        if step >= config.max_iters:
            raise ValueError(f"{trainer['folder']} has made {step:,} steps, and max_iters={config.max_iters}: raise "
                             "--max_iters, or branch from an earlier checkpoint")
        before = OptimConfig(**{key: recorded[key] for key in vars(config.optim).keys() & recorded.keys()})
        optim.decay_from(step, config.max_iters, config.optim, given)
        rates = [optim.learning_rate(at, of) for at, of in (
            (step, before), (step, config.optim), (config.max_iters - 1, config.optim))]
        log("learning rate: {:g} in the run that it branches from, {:g} here, {:g} in the last step".format(*rates))
    check_options(config, given)
    return trainer


def _branch_state(parent: str, which: str) -> dict[str, Any]:
    """The trainer's state of a run that begins where the checkpoint `which` of the run `parent` stands. Its best loss
    is its own to find, since the parent's best checkpoint is not in its folder."""
    folder = run_folder.verified_checkpoint(Path(parent), which)
    with run_folder.reading(folder):
        return fresh_state() | run_folder.read_trainer(folder) | {
            "folder": str(folder), "branched_from": weights.full_name(parent), "best_val_loss": None}


def _check_same_branch(config: Any, came_from: str) -> None:
    """Raise ValueError where a run that branches from the checkpoint `came_from` is to branch from another one. What
    best and latest name changes, and so may the place of a run: they are no others."""
    if not came_from:  # an earlier version did not record it
        return
    parent, step = Path(came_from).parents[1], re.fullmatch("step_([0-9]+)", config.run.branch_from)
    if (step and int(step[1]) != run_folder.step_of(Path(came_from))) or (
            parent.is_dir() and parent.resolve() != Path(config.init_from).resolve()):
        raise ValueError(f"{config.run.out_dir} branches from {came_from}: for another branch, choose another "
                         "--out_dir")


def check_same_run(trainer: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any],
                   log: Callable[[str], None]) -> None:
    """Say what of the options, the batch and the data, which `now` has flat, changed since the checkpoint. `defaults`
    are the options' own, which count where an option is newer than the run. Raises ValueError that lists what must not
    change."""
    before = {"muon_version": 1, **defaults, **trainer["options"], **trainer}
    shape = GPTConfig(**{key: before[key] for key in SHAPE})
    left_out = (*OF_A_START, "out_dir") if trainer["branched_from"] else OF_A_START
    changed = {key: WORDS.get(key, f"{key} was {before[key]}, is {value}") for key, value in now.items()
               if key in before and before[key] not in (value, "auto")  # which leaves the choice to us
               and key not in left_out and not (key in SHAPE and shape.means(key, value))}
    of_training = OF_TRAINING if now["eval_only"] else ()
    is_branch = trainer["branched_from"] is not None
    if fixed := [text for key, text in changed.items() if key in FIXED and key not in of_training]:
        raise ValueError(f"{trainer['folder']} was trained with other settings: {'; '.join(fixed)}. Go on with those"
                         + ("" if is_branch else ", or choose another --out_dir"))
    if now["eval_only"] and "documents" in changed:
        log(f"it is not measured as it was trained: {changed['documents']}")
    if not now["eval_only"] and trainer["step"] < now["max_iters"]:
        action = f"branching from {trainer['folder']} into" if is_branch else "resuming"
        log(f"{action} {now['out_dir']} at step {trainer['step']:,}"
            + (f"; changed: {'; '.join(changed.values())}" if changed else ""))


def load_training_state(trainer: Mapping[str, Any], model: LanguageModel, optimizer: torch.optim.Optimizer,
                        scaler: torch.amp.GradScaler, spike_detector: SpikeDetector, job: Job) -> None:
    """Load everything but the weights from a checkpoint: rank 0 reads it, the other ranks get it from rank 0."""
    state = distributed.kept_on_rank0(partial(read_optimizer, trainer["folder"]), job)
    if distributed.on_rank0(lambda: bool(state), job):
        optim.load_optimizer_state(optimizer, model, state, partial(parallel.from_rank0, job=job))
    else:  # no update was made before that checkpoint
        optimizer.state.clear()
    if trainer["scaler"]:
        scaler.load_state_dict(trainer["scaler"])
    vars(spike_detector).update(trainer["spike_detector"])


def read_optimizer(folder: str | Path) -> dict[str, torch.Tensor]:
    """The optimiser's tensors of a checkpoint, on the host. Raises ValueError for a broken file."""
    path = Path(folder) / "training" / "optimizer.safetensors"
    try:
        with run_folder.reading(Path(folder)):  # another run's, where this one branches from it
            return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken: {error}") from None


def roll_back(run: RunFolder, now: Progress, fault: str, model: LanguageModel, optimizer: torch.optim.Optimizer,
              scaler: torch.amp.GradScaler, spike_detector: SpikeDetector, job: Job) -> Progress:
    """Go back to the last good checkpoint, and continue with the data after the bad steps. Raises as `_last_good`."""
    trainer = distributed.on_rank0(partial(_last_good, run, now, fault), job)
    state = distributed.kept_on_rank0(lambda: weights.open_pretrained(trainer["folder"])[1], job)
    parallel.fill(model, state, job)
    load_training_state(trainer, model, optimizer, scaler, spike_detector, job)
    return replace(Progress.of(trainer), next_seq=now.next_seq, skipped=now.skipped, rollbacks=now.rollbacks + 1)


def _last_good(run: RunFolder, now: Progress, fault: str) -> dict[str, Any]:
    """The state of the last checkpoint that was not saved amid bad steps; newer ones are deleted. Raises ValueError, a
    report of how the run diverged, when there is none, or when going back has not helped."""
    run.poll()
    folder = run.newest_valid(lambda folder: not run.state_in(folder)["bad_steps"])
    if folder is None or now.rollbacks == MAX_ROLLBACKS:
        helped = f"going back {now.rollbacks} times did not help" if folder else "there is no checkpoint to go back to"
        raise ValueError(
            f"the run diverges: {now.bad_steps} bad steps in a row up to step {now.step} (the last one: {fault}), "
            f"{now.skipped} in all, and {helped}. What was saved is intact"
            + (f", {folder} is the newest of it" if folder else "")
            + ". Lower --learning_rate, lengthen --warmup_iters, try --dtype=bfloat16 or float32, or look at the data")
    run.retire_after(folder)
    return run.state_in(folder)
