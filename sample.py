"""Write text with a model.

    python sample.py --out_dir=out/shakespeare_char_cpu              the best checkpoint of a run
    python sample.py --init_from=gpt2 --prompt="The meaning of life" a hub id, a model folder, a checkpoint, a ckpt.pt
    python sample.py --init_from=gpt2-xl --prompt=FILE:prompt.txt    the prompt from a file

Text appears as it is written. Keys and defaults are nanoGPT's (but device, dtype and compile, which are `auto`);
--start is another name of --prompt.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import settings

if __name__ == "__main__":
    settings.help_early(__file__, "SampleConfig")  # before torch is imported, which takes seconds

import numpy as np
import torch

import checkpoint
import distributed
import weights
from device import DeviceConfig
from distributed import Job
from model import Cache, LanguageModel
from sampling import Sampler
from shards import DATA_DIR, folder_tokenizer
from tokenizer import GPT2_VOCAB_SIZE, GPT2Tokenizer, Tokenizer, load_tokenizer

NANOGPT_VOCAB_SIZE = 50304  # GPT-2's 50,257 tokens, rounded up


@dataclass
class SampleConfig:
    init_from: str = "resume"  # gpt2 ... gpt2-xl, a hub id, a model or run folder, ckpt.pt; resume: the run in out_dir
    out_dir: str = "out"  # run folder; its best checkpoint writes
    prompt: str = ""  # what to continue; FILE:path reads it from a file; empty: end-of-text, or else a newline
    num_samples: int = 10  # samples to draw
    max_new_tokens: int = 500  # tokens in each
    temperature: float = 0.8  # below 1 more predictable, above 1 more random, 0 = always the likeliest token
    top_k: int = 200  # draw among this many likeliest tokens; 0 = all
    top_p: float = 1.0  # draw among the likeliest tokens that hold this much probability; 1 = all
    seed: int = 1337  # the same seed writes the same text
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile the step of a token; auto = on CUDA only
    where: DeviceConfig = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> None:
    config, _ = settings.parse(SampleConfig, argv, usage=__doc__, aliases={"start": "prompt"})
    check_options(config)
    with distributed.job(config.where) as here:
        sample(config, here)


def sample(config: SampleConfig, here: Job) -> None:
    """Print the samples, and the speed they were written at."""
    source = config.out_dir if config.init_from == "resume" else config.init_from
    prompt = read_prompt(config.prompt)
    path = weights.resolve(source)
    model = checkpoint.load_model(str(path)).to(here.device, here.dtype)  # what costs time is reading the weights
    model.compile_decoding = config.compile == "True" or (config.compile == "auto" and here.device.type == "cuda")
    tokenizer = find_tokenizer(path, model)
    ids = encode_prompt(tokenizer, prompt)
    print(f"{source}: {model.num_params(non_embedding=False):,} parameters on {here.device}, {here.dtype}", flush=True)
    torch.manual_seed(config.seed)
    began = time.perf_counter()
    cache = model.make_cache(batch_size=1, num_tokens=ids.size(1) + config.max_new_tokens)
    for _ in range(config.num_samples):
        write_sample(model, tokenizer, prompt, ids, cache, config)
    seconds = time.perf_counter() - began
    print(f"{config.num_samples * config.max_new_tokens / seconds:.1f} tokens/s")


def check_options(config: SampleConfig) -> None:
    """Raises ValueError that lists all faults."""
    faults = [f"{key}={getattr(config, key)} must be {what}" for key, ok, what in (
        ("num_samples", config.num_samples >= 1, "at least 1"),
        ("max_new_tokens", config.max_new_tokens >= 0, "0 or more"),
        ("temperature", config.temperature >= 0, "0 or more"),
        ("top_k", config.top_k >= 0, "0 (all tokens) or more"),
        ("top_p", 0 < config.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= config.seed < 2**63, "0 or more, below 2**63"),
    ) if not ok]
    if faults:
        raise ValueError("; ".join(faults))


def read_prompt(prompt: str) -> str:
    """The prompt itself, or the content of the file that FILE:path names."""
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        return Path(prompt[5:]).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt[5:]} is no UTF-8 text: {error}") from None


def find_tokenizer(path: Path, model: LanguageModel) -> Tokenizer:
    """The tokenizer of the model at path: beside it, nanoGPT's by the data set it was trained on, or GPT-2's.

    Raises ValueError when there is none for a vocabulary that is not GPT-2's."""
    vocab_size, looked_in = model.config.vocab_size, path
    if (path / "tokenizer.json").is_file():
        return load_tokenizer(path)
    if path.is_file():
        looked_in = DATA_DIR / str((weights.read_nanogpt(path).get("config") or {}).get("dataset"))
        tokenizer = folder_tokenizer(looked_in, vocab_size) if looked_in.is_dir() else None
        if tokenizer and tokenizer.vocab_size <= vocab_size:
            return tokenizer
    if GPT2_VOCAB_SIZE <= vocab_size <= NANOGPT_VOCAB_SIZE:
        return GPT2Tokenizer()
    raise ValueError(f"no tokenizer for the model's {vocab_size} tokens: {looked_in} has no tokenizer.json"
                     + (" and no meta.pkl" if path.is_file() else ""))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> torch.Tensor:
    """Ids (1, T) of the prompt, of an empty one `start_id`. Raises ValueError for text that cannot be encoded."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("the prompt is no valid text: the terminal did not send it as UTF-8")
    ids = tokenizer.encode_prompt(prompt) if prompt else np.array([tokenizer.start_id])
    return torch.from_numpy(ids.astype(np.int64))[None, :]


def write_sample(model: LanguageModel, tokenizer: Tokenizer, prompt: str, ids: torch.Tensor, cache: Cache,
                 config: SampleConfig) -> None:
    """Print the prompt and, token by token, what the model writes behind it."""
    sampler = Sampler(config.temperature, config.top_k or None, config.top_p if config.top_p < 1 else None)
    tokens = model.stream(ids.to(model.wte.weight.device), config.max_new_tokens, sampler, cache=cache)
    print(prompt, end="", flush=True)
    for text in tokenizer.decode_stream(int(token) for token in tokens):
        print(text, end="", flush=True)
    print("\n---------------", flush=True)


if __name__ == "__main__":
    settings.run(main)
