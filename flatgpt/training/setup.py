"""What a run builds before its first step: its data, and its model on the device, in the number type that it computes
with.

Rank 0 reads the weights or makes them, and decides what `auto` means; the other ranks get their part from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flatgpt import run_folder
from flatgpt.data.loader import DataConfig, Mixture, open_mixture
from flatgpt.data.shards import UNKNOWN_VOCAB_SIZE
from flatgpt.models import inference, weights
from flatgpt.models.baselines import build, build_empty, counted_bigram
from flatgpt.models.families import State
from flatgpt.training import distributed, parallel
from flatgpt.training.device import DeviceConfig, Numerics, pick_numerics
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, width_ratio
from model import GPTConfig, LanguageModel

MANY_SEQUENCES = 1024  # for a trial of a micro-batch that is to fill the memory; the trial has a limit of its own


def open_data(config: DataConfig, vocab_size: int, sample_interval: int, log: Callable[[str], None]) -> Mixture:
    """The data sets of a run. Raises ValueError if a run cannot train on them, or cannot show samples as text."""
    data = open_mixture(config.dataset, vocab_size, config.tokenizer)
    _ = data.splits("train"), data.splits("val"), data.eot_id(config.documents)
    if data.vocab_size == UNKNOWN_VOCAB_SIZE:
        raise ValueError(f"{config.dataset} holds 32-bit tokens and does not say how large the vocabulary is: add "
                         "--vocab_size=N")
    if sample_interval and data.tokenizer is None:
        raise ValueError(f"sample_interval={sample_interval} needs a tokenizer, and {config.dataset} has none: "
                         "--tokenizer=gpt2 says that it is GPT-2's")
    if data.tokenizer is None:
        log(f"no tokenizer is known for {config.dataset}: the run trains on token ids, and sample.py cannot show "
            "them as text")
    return data


def make_model(options: GPTConfig, optim: OptimConfig, init_from: str, given: Mapping[str, str], data: Mixture,
               folder: str | None, bigram_k: float | None,
               log: Callable[[str], None]) -> tuple[LanguageModel, State]:
    """The model on the meta device, and what its parameters are made of (see weights.open_pretrained): from the
    checkpoint `folder`, from elsewhere, fresh (see optim.width_ratio), or (with `bigram_k`) counted."""
    if folder:  # its checksums were verified when it was found
        with run_folder.reading(Path(folder)):  # another run's, where this one branches from it
            return weights.open_pretrained(folder, dropout=options.dropout)
    if init_from != "scratch":
        return inference.open_for_training(init_from, options, given, data)
    config = GPTConfig(**asdict(options) | {"vocab_size": data.vocab_size})
    if bigram_k is None:
        model = build(config)
        if (ratio := width_ratio(config.n_embd, optim)) != 1:
            model.init_weights(ratio)
        return build_empty(config), model.state_dict()
    model, counted = counted_bigram(config, data.splits("train"), bigram_k)
    log(counted)
    return build_empty(config), model.state_dict()


def build_model(make: Callable[[], tuple[LanguageModel, State]], where: DeviceConfig, attention: str, batch_size: int,
                recorded: Mapping[str, Any], log: Callable[[str], None], job: Job) -> tuple[LanguageModel, Numerics]:
    """The model that `make` gives rank 0, laid out over the ranks' devices, and what it computes in: what `auto` means
    in `where` and `attention` (see device.pick_numerics) for micro-batches of `batch_size`; 0: as large as fits."""
    made: list[tuple[LanguageModel, State]] = []

    def pick() -> tuple[GPTConfig, Numerics, str]:
        made.append(make())
        config = made[0][0].config
        rows = (batch_size or MANY_SEQUENCES) * config.block_size
        return config, *pick_numerics(made[0][0], where.dtype, attention, job.device, rows, recorded)

    config, numerics, trial = distributed.on_rank0(pick, job)
    if trial:
        log(trial)
    job.set_dtype(numerics.dtype)
    model, state = made[0] if made else (build_empty(config), None)
    parallel.materialize(model, state, job)
    model.set_attention(numerics.attention)
    return model, numerics
