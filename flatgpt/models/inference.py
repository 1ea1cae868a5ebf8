"""A model from a file, folder or hub id, and what it is given to read: text as its tokenizer encodes it, or windows of
the data that it was trained on.

Owns how a model is found and verified, how it fits the options and the data of a run that starts from it, and how a
model and its tokenizer, and a model and its data, find each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flatgpt import files, run_folder
from flatgpt.data.loader import Mixture, open_mixture
from flatgpt.data.order import MixedOrder, TrainOrder
from flatgpt.data.shards import DATA_DIR, UNKNOWN_VOCAB_SIZE, folder_tokenizer
from flatgpt.data.tokenizer import GPT2_VOCAB_SIZE, GPT2Tokenizer, Tokenizer, load_tokenizer, no_tokenizer
from flatgpt.models import weights
from flatgpt.models.families import State
from flatgpt.options import check_options
from model import MEANING, GPTConfig, LanguageModel

NANOGPT_VOCAB_SIZE = 50304  # GPT-2's 50,257 tokens, rounded up
SHAPE = tuple(field.name for field in fields(GPTConfig) if field.name not in ("vocab_size", "dropout"))
STRETCH = ("rope_scaling", "rope_factor", "rope_original_block_size")  # may be chosen for a model from elsewhere


def find_model(init_from: str, out_dir: str) -> tuple[Path, str]:
    """Where the model lies that these options name (see weights.resolve), and what to call it: of a run, with the
    checkpoint. Raises FileNotFoundError, also for a run folder that is not there: it is not looked for on the hub."""
    if init_from == "resume" and not Path(out_dir).is_dir():
        raise FileNotFoundError(f"there is no run folder {out_dir}: --out_dir takes one that train.py has made, "
                                "--init_from any other model")
    source = out_dir if init_from == "resume" else init_from
    path = weights.resolve(source)
    return path, f"{source} ({path.name})" if path.parent.name == "checkpoints" else source


def load_model(source: str) -> LanguageModel:
    """LanguageModel.from_pretrained, after the checksums of a folder that has them were verified."""
    return LanguageModel.from_pretrained(str(_verified(source)))


def _verified(source: str) -> Path:
    path = weights.resolve(source)
    if (path / "SHA256SUMS").is_file():
        run_folder.verify(path)
    return path


def open_for_training(init_from: str, shape: GPTConfig, given: Mapping[str, str],
                      data: Mixture) -> tuple[LanguageModel, State]:
    """A model from elsewhere, as weights.open_pretrained gives it, fitted to a run's data and to those options of its
    shape that are among the keys `given`. Raises ValueError for what it contradicts."""
    model, state = weights.open_pretrained(str(_verified(init_from)), dropout=shape.dropout)
    faults = shape_faults(model.config, shape, given)
    names = ",".join(data.datasets)
    if model.config.vocab_size < data.vocab_size:
        faults.append(f"its vocabulary is {model.config.vocab_size}, and {names} has {data.vocab_size}")
    elif data.tokenizer and not same_vocabulary(
            known_tokenizer(weights.resolve(init_from), model.config.vocab_size), data):
        faults.append(f"its tokenizer gives other ids than that of {names}: prepare the data with "
                      f"--tokenizer={weights.full_name(init_from)}")
    if faults:
        raise ValueError(f"init_from={init_from} does not fit: {'; '.join(faults)}")
    _stretch(model.config, shape, given)
    if "block_size" in given:
        model.crop_block_size(shape.block_size)
    return model, state


def shape_faults(found: GPTConfig, shape: GPTConfig, given: Mapping[str, str]) -> list[str]:
    """Which options of a shape, of the keys `given`, contradict a model from elsewhere, a sentence each."""
    return [f"{key}={getattr(shape, key)} was asked for, and it has {getattr(found, MEANING.get(key, key))}"
            for key in SHAPE if key not in ("block_size", *STRETCH) and key in given
            and not found.means(key, getattr(shape, key))]


def _stretch(config: GPTConfig, shape: GPTConfig, given: Mapping[str, str]) -> None:
    """Slow a model's rotations down as the options say, for a longer context than it was trained on. That was its
    block_size, unless it says or the options say otherwise. Raises ValueError, for a model without rotations too."""
    for key in STRETCH:
        if key in given:
            setattr(config, key, getattr(shape, key))
    check_options(config)
    config.fix_rope_original()


def adopt_shape(shape: GPTConfig, given: Mapping[str, str], found: Mapping[str, Any]) -> None:
    """Make the options that nobody set say what a model from elsewhere is: the batch and a resume go by them."""
    for key in SHAPE:
        if key not in given:
            setattr(shape, key, found[key])


def read(prompt: str) -> str:
    """The prompt itself, or the content of the file that FILE:path names."""
    return files.read_text(Path(prompt[5:])) if prompt.startswith("FILE:") else prompt


def encode(tokenizer: Tokenizer, prompt: str) -> torch.Tensor:
    """Ids (1, T) of the prompt, at least one: see Tokenizer.encode_prompt. Raises ValueError for text that cannot be
    encoded."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("the prompt is not valid text: the terminal did not send it as UTF-8")
    return torch.from_numpy(tokenizer.encode_prompt(prompt).astype(np.int64))[None, :]


def options_of(path: Path) -> Mapping[str, Any]:
    """The options of the run that made the model at path (see weights.resolve), {} where they are not known."""
    if path.is_file():
        return weights.read_nanogpt(path).get("config") or {}
    record = path / "training" / "trainer.json"  # a checkpoint's
    options = files.read_json(record).get("options") if record.is_file() else {}
    return options if isinstance(options, dict) else {}


def known_tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that lies beside the model at path, nanoGPT's by the data set it was trained on; else None."""
    if path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            return load_tokenizer(path)
    if path.is_file():
        looked_in = DATA_DIR / str(options_of(path).get("dataset"))
        tokenizer = folder_tokenizer(looked_in, vocab_size) if looked_in.is_dir() else None
        if tokenizer and tokenizer.vocab_size <= vocab_size:
            return tokenizer
    return None


def tokenizer_to_save(source: str, vocab_size: int, data: Mixture) -> Tokenizer | None:
    """The tokenizer for a checkpoint of a model that was trained on data: that which lies beside the model where it
    comes from, since the data's need not know its special tokens and chat template; else the data's."""
    path = None if source == "scratch" else weights.resolve(source)
    known = known_tokenizer(path, vocab_size) if path and path.is_dir() else None
    return known if known and same_vocabulary(known, data) else data.tokenizer


def find_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The model's known tokenizer, or GPT-2's where the vocabulary has its size. Raises ValueError, and OSError where
    GPT-2's is not to be had."""
    if tokenizer := known_tokenizer(path, vocab_size):
        return tokenizer
    data = DATA_DIR / str(options_of(path).get("dataset"))
    if GPT2_VOCAB_SIZE <= vocab_size <= NANOGPT_VOCAB_SIZE and not (data / "meta.pkl").is_file():
        return GPT2Tokenizer()
    why = no_tokenizer(path) if path.is_dir() else (
        f"{data} has no tokenizer.json and no meta.pkl that numbers characters")
    raise ValueError(f"no tokenizer for the model's {vocab_size} tokens, so they cannot be read as text: {why}")


def same_vocabulary(tokenizer: Tokenizer | None, data: Mixture) -> bool:
    """Whether the data's tokens mean the same to a model with this tokenizer; what is not known is taken for the same.
    The model's may have more, one for padding say."""
    return (tokenizer is None or data.tokenizer is None
            or data.tokenizer.hf.get_vocab().items() <= tokenizer.hf.get_vocab().items())


def open_data(path: Path, dataset: str, vocab_size: int, tokenizer: Tokenizer | None) -> Mixture:
    """`dataset`, or if that is empty what the model at path was trained on. Raises ValueError when that is not known,
    or holds the ids of another tokenizer than the model's; and as open_mixture does."""
    if dataset:
        data = open_mixture(dataset)
        if data.vocab_size == UNKNOWN_VOCAB_SIZE:
            data = open_mixture(dataset, vocab_size)
    elif (run := options_of(path)).get("dataset"):
        data = open_mixture(str(run["dataset"]), run.get("vocab_size", 0), run.get("tokenizer", "auto"))
    else:
        raise ValueError(f"{path} does not say what data it was trained on: add --dataset=NAME")
    if data.vocab_size > vocab_size or not same_vocabulary(tokenizer, data):
        raise ValueError(f"{' and '.join(data.datasets)}: made with another tokenizer than the model's, so that the "
                         "ids mean different things; name another --dataset")
    return data


def draw_windows(data: Mixture, split: str, num_seqs: int, num_tokens: int, seed: int) -> np.ndarray:
    """(num_seqs, num_tokens) int64, from places that are a function of all arguments: those that a run with this seed
    and windows so long would read first. Like a run's they begin anywhere in a document. Raises ValueError."""
    splits = data.splits(split)
    for name, held in splits.items():
        if (longest := int(held.lengths.max(initial=0))) <= num_tokens:
            raise ValueError(f"the {split} split of {name} has {longest} tokens in its longest shard, but a prompt "
                             f"with its continuation takes {num_tokens}: lower --max_new_tokens or --prompt_tokens")
    orders = [TrainOrder(held, num_tokens, seed) for held in splits.values()]
    return MixedOrder(orders, data.shares).batch(0, num_seqs).inputs
