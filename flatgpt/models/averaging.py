"""The average of several checkpoints, as the weights of one model.

Owns which checkpoints go into an average, whether they fit each other, and the sum. A tensor of the average is the sum
of the checkpoints' own, each times its weight, over the sum of the weights. It is summed in float64, in the order of
the checkpoints, and rounded once to their number type. With equal weights that is numpy's mean(axis=0,
dtype=float64), rounded.

One tensor after the other is read, so that it takes the memory of one model and of one tensor in float64.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from flatgpt.models import inference
from flatgpt.models.weights import load_huggingface, save_tensors
from flatgpt.run_folder import find_checkpoint, step_folders


def choose(run: Path, which: str) -> list[Path]:
    """Checkpoints of a run: its last five, oldest first, for "5"; those of "step_1000,step_2000" or "1000,2000", in
    that order. Raises ValueError, which lists the checkpoints that exist."""
    if re.fullmatch("[0-9]+", which):
        there = step_folders(run)
        if not 0 < int(which) <= len(there):
            has = f"{len(there)} checkpoints" + (f" (steps {', '.join(map(str, there))})" if there else "")
            raise ValueError(f"average={which} is a number of a run's last checkpoints, and {run} has {has}")
        return [*there.values()][-int(which):]
    names = [name.strip() for name in which.split(",")]
    return [find_checkpoint(run, f"step_{name}" if re.fullmatch("[0-9]+", name) else name) for name in names]


def read_weights(text: str, count: int) -> list[float]:
    """The weights of `count` checkpoints from "1,2,3"; "" means equal ones. Raises ValueError."""
    if not text:
        return [1.0] * count
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        raise ValueError(f"average_weights={text} should be numbers with commas between them") from None
    if len(weights) != count:
        raise ValueError(f"average_weights={text} has {len(weights)} weights, and the average {count} checkpoints: "
                         "give one for each, in their order")
    if not math.isfinite(sum(weights)) or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"average_weights={text}: weights are 0 or more, finite, and not all 0")
    return weights


def check_fit(folders: list[Path]) -> None:
    """Raises ValueError unless these are two or more different checkpoints of one shape and one vocabulary."""
    if len(folders) < 2:
        raise ValueError(f"an average takes two checkpoints or more, and this is {folders[0]} alone")
    places = [folder.resolve() for folder in folders]
    if twice := [str(folder) for folder, place in zip(folders, places) if places.count(place) > 1]:
        raise ValueError(f"the same checkpoint is named twice: {' and '.join(twice)}; to count it twice, give it a "
                         "weight of 2 (--average_weights)")
    first, *others = folders
    config, _ = load_huggingface(first)
    tokenizer = inference.known_tokenizer(first, config.vocab_size)
    for folder in others:
        values = asdict(load_huggingface(folder)[0])
        faults = [f"{key} is {values[key]} and {value}" for key, value in asdict(config).items()
                  if key != "dropout" and values[key] != value]
        other = inference.known_tokenizer(folder, values["vocab_size"])
        if tokenizer and other and tokenizer.hf.get_vocab() != other.hf.get_vocab():
            faults.append("their tokenizers give other ids")
        if faults:
            raise ValueError(f"{folder} and {first} cannot be averaged: {'; '.join(faults)}")


def write_average(folders: list[Path], weights: list[float], path: Path) -> None:
    """Write the average of checkpoints that fit each other as one safetensors file. Raises ValueError where it would
    have values that are no finite numbers, or OSError."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(folder / "model.safetensors", "pt")) for folder in folders]
        average = {name: mean((file.get_tensor(name) for file in opened), weights) for name in list(opened[0].keys())}
    if broken := [name for name, tensor in average.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]} of the average has values that are no finite numbers: one of "
                         f"{', '.join(map(str, folders))} is of a run that diverged")
    save_tensors(average, path)


def mean(tensors: Iterable[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """The weighted mean of tensors of one shape, in the number type of the first."""
    total, dtype = None, None
    for tensor, weight in zip(tensors, weights):
        term = tensor.double() * weight  # not within the sum: one rounding of both would not be numpy's
        total, dtype = (term, tensor.dtype) if total is None else (total.add_(term), dtype)
    return (total / sum(weights)).to(dtype)
