"""What a model is given to read: text as its tokenizer encodes it, or windows of the data that it was trained on.

Owns how a model and its tokenizer, and a model and its data, find each other. It loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import files
import weights
from data import MixedOrder, Mixture, TrainOrder, open_mixture
from shards import DATA_DIR, folder_tokenizer
from tokenizer import GPT2_VOCAB_SIZE, GPT2Tokenizer, Tokenizer, load_tokenizer

NANOGPT_VOCAB_SIZE = 50304  # GPT-2's 50,257 tokens, rounded up


def read(prompt: str) -> str:
    """The prompt itself, or the content of the file that FILE:path names."""
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        return Path(prompt[5:]).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt[5:]} is no UTF-8 text: {error}") from None


def encode(tokenizer: Tokenizer, prompt: str) -> torch.Tensor:
    """Ids (1, T) of the prompt, of an empty one `start_id`. Raises ValueError for text that cannot be encoded."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("the prompt is no valid text: the terminal did not send it as UTF-8")
    ids = tokenizer.encode_prompt(prompt) if prompt else np.array([tokenizer.start_id])
    return torch.from_numpy(ids.astype(np.int64))[None, :]


def options_of(path: Path) -> Mapping[str, Any]:
    """The options of the run that made the model at path (see weights.resolve), {} where they are not known."""
    if path.is_file():
        return weights.read_nanogpt(path).get("config") or {}
    record = path.parent.parent / "train_config.json"  # path is out_dir/checkpoints/step_00000250
    return files.read_json(record) if record.is_file() else {}


def find_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of the model at path: beside it, nanoGPT's by the data set it was trained on, or GPT-2's.

    Raises ValueError when there is none for a vocabulary that is not GPT-2's."""
    looked_in = path
    if (path / "tokenizer.json").is_file():
        return load_tokenizer(path)
    if path.is_file():
        looked_in = DATA_DIR / str(options_of(path).get("dataset"))
        tokenizer = folder_tokenizer(looked_in, vocab_size) if looked_in.is_dir() else None
        if tokenizer and tokenizer.vocab_size <= vocab_size:
            return tokenizer
    if GPT2_VOCAB_SIZE <= vocab_size <= NANOGPT_VOCAB_SIZE:
        return GPT2Tokenizer()
    raise ValueError(f"no tokenizer for the model's {vocab_size} tokens: {looked_in} has no tokenizer.json"
                     + (" and no meta.pkl" if path.is_file() else ""))


def open_data(path: Path, dataset: str, vocab_size: int, tokenizer: Tokenizer) -> Mixture:
    """`dataset`, or if that is empty what the model at path was trained on. Raises ValueError when that is not known,
    or holds the ids of another tokenizer than the model's; and as data.open_mixture does."""
    if dataset:
        data = open_mixture(dataset)
    elif (run := options_of(path)).get("dataset"):
        data = open_mixture(str(run["dataset"]), run.get("vocab_size", 0), run.get("tokenizer", "auto"))
    else:
        raise ValueError(f"{path} does not say what data it was trained on: add --dataset=NAME")
    theirs = data.tokenizer
    if data.vocab_size > vocab_size or (theirs and theirs.hf.get_vocab() != tokenizer.hf.get_vocab()):
        raise ValueError(f"{' and '.join(data.datasets)}: made with another tokenizer than the model's, so that the "
                         "ids mean different things; name another --dataset")
    return data


def draw_windows(data: Mixture, split: str, num_seqs: int, num_tokens: int, seed: int) -> np.ndarray:
    """(num_seqs, num_tokens) int64, from places that are a function of all arguments: those that a run with this seed
    and windows so long would read first. Like a run's they begin anywhere in a document. Raises ValueError."""
    splits = data.splits(split)
    for name, held in splits.items():
        if (longest := int(held.lengths.max(initial=0))) <= num_tokens:
            raise ValueError(f"the {split} split of {name} has {longest} tokens in its longest shard, and a prompt "
                             f"with what follows takes {num_tokens}: lower --max_new_tokens or --prompt_tokens")
    orders = [TrainOrder(held, num_tokens, seed) for held in splits.values()]
    return MixedOrder(orders, data.shares).batch(0, num_seqs)[0]
