"""Write text with a model.

    python sample.py --out_dir=out/shakespeare_char_cpu              the best checkpoint of a run
    python sample.py --init_from=gpt2 --prompt="The meaning of life" a hub id, a model folder, a checkpoint, a ckpt.pt
    python sample.py --init_from=gpt2-xl --prompt=FILE:prompt.txt    the prompt from a file
    python sample.py --out_dir=out/run --split=val --num_samples=5   prompts from the data, beside how they really go on
    python sample.py --out_dir=out/run --interactive=True            each line typed is continued; Ctrl-D ends it
    python sample.py --out_dir=out/run --show_probs=5                what each token was drawn from, as a table

Text appears as it is written. Keys and defaults are nanoGPT's where it has them (but device, dtype and compile, which
are `auto`); --start is another name of --prompt.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signals.begin(needs_reader=True)

import contextlib
import itertools
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Literal

from flatgpt import machine
from flatgpt.options import check_options, failed_rules, parse_options, run_script

if __name__ == "__main__":
    machine.warn_of_little_memory()

import numpy as np
import torch

from flatgpt import run_folder
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.models import inference
from flatgpt.models.generate import Cache
from flatgpt.models.language_model import LanguageModel
from flatgpt.models.prepacked import prepack
from flatgpt.models.sampling import Sampler, Stage, table
from flatgpt.training import distributed
from flatgpt.training.device import DeviceConfig, pick_numerics
from flatgpt.training.distributed import Job


@dataclass
class SampleConfig:
    init_from: Annotated[str, "path"] = "resume"  # gpt2, a hub id, a model or run folder, ckpt.pt; resume: out_dir
    out_dir: Annotated[str, "path"] = "out"  # run folder; its best checkpoint is used
    prompt: Annotated[str, "FILE:path"] = ""  # text to continue; FILE:path: from a file; empty: end-of-text or newline
    interactive: bool = False  # continue each line of the standard input; Ctrl-D or Ctrl-C ends it
    split: Literal["train", "val", "test"] | None = None  # continue prompts from this split of the data, and show both
    dataset: Annotated[str, "paths"] = ""  # with split: the data set or mixture; empty: what the run was trained on
    prompt_tokens: int = 0  # with split: tokens of each prompt; 0 = half of the model's block_size
    num_samples: int = 10  # samples to draw
    max_new_tokens: int = 500  # tokens in each
    temperature: float = 0.8  # below 1 more predictable, above 1 more random, 0 = always the likeliest token
    top_k: int = 200  # draw among this many likeliest tokens; 0 = all
    top_p: float = 1.0  # draw among the likeliest tokens that hold this much probability; 1 = all
    min_p: float = 0.0  # draw among the tokens at least this share as likely as the likeliest; 0 = all
    repetition_penalty: float = 1.0  # above 1: tokens that were there before, prompt included, become less likely
    show_probs: int = 0  # for each token show so many candidates, before and after each filter; 0 = none
    seed: int = 1337  # the same seed writes the same text
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile the step of a token; auto = on CUDA only
    where: DeviceConfig = field(default_factory=DeviceConfig)

    def validate(self) -> list[str]:
        """What is wrong with these options, a sentence each."""
        faults = failed_rules(
            self, ("num_samples", self.num_samples >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("show_probs", self.show_probs >= 0, "0 (none) or more"),
            ("prompt_tokens", self.prompt_tokens >= 0, "0 (half of block_size) or more"),
            ("seed", 0 <= self.seed < 2**63, "0 or more, below 2**63"))
        try:
            make_sampler(self)
        except ValueError as error:
            faults.append(str(error))
        return faults

    def conflicts(self, given: Collection[str]) -> list[str]:
        """Which of the given keys have no effect together with the others."""
        why, unwanted = "--dataset and --prompt_tokens are for --split=train, val or test", ("dataset", "prompt_tokens")
        if self.interactive:
            why, unwanted = "--interactive reads its prompts line by line, and continues each once", (
                "prompt", "split", "dataset", "prompt_tokens", "num_samples")
        elif self.split:
            why, unwanted = f"--split={self.split} takes its prompts from the data", ("prompt",)
        found = [f"--{key}" for key in unwanted if key in given]
        return [f"{why}: leave out {' '.join(found)}"] if found else []


def main(argv: list[str]) -> None:
    config, given = parse_options(SampleConfig, argv, usage=__doc__, aliases={"start": "prompt"})
    check_options(config, given)
    with distributed.init_job(config.where, alone=True) as job:
        sample(config, job)


def sample(config: SampleConfig, job: Job) -> None:
    """Print the samples and the tokens per second."""
    prompt = inference.read(config.prompt)
    path, name = inference.find_model(config.init_from, config.out_dir)
    with run_folder.reading(path):
        model = inference.load_model(str(path))
        tokenizer = inference.find_tokenizer(path, model.config.vocab_size)
    numerics, _ = pick_numerics(model, config.where.dtype, "sdpa", job.device, 1, inference.options_of(path),
                                training=False)
    job.set_dtype(numerics.dtype)
    model.to(job.device, job.dtype)  # a token costs the time it takes to read the weights
    model.compile_decoding = config.compile == "True" or (config.compile == "auto" and job.device.type == "cuda")
    if config.split:
        data = inference.open_data(path, config.dataset, model.config.vocab_size, tokenizer)
        prompt_tokens = config.prompt_tokens or max(1, model.config.block_size // 2)
        windows = inference.draw_windows(data, config.split, config.num_samples, prompt_tokens + config.max_new_tokens,
                                         config.seed)
    ids = inference.encode(tokenizer, prompt)
    print(f"{name}: {model.num_params(non_embedding=False):,} parameters on {job.device}, {job.dtype}", flush=True)
    if not model.compile_decoding:
        prepack(model)
    torch.manual_seed(config.seed)
    began = time.perf_counter()
    if config.interactive:
        converse(model, tokenizer, config)
    elif config.split:
        continue_windows(model, tokenizer, windows, config)
    else:
        cache = model.make_cache(batch_size=1, num_tokens=ids.size(1) + config.max_new_tokens)
        for _ in range(config.num_samples):
            write_sample(model, tokenizer, prompt, ids, cache, config)
    if not config.interactive:  # there most of the time is the user's
        seconds = time.perf_counter() - began
        print(f"{config.num_samples * config.max_new_tokens / seconds:.1f} tokens/s")


def make_sampler(config: SampleConfig) -> Sampler:
    return Sampler(config.temperature, max(config.top_k, 0) or None, config.top_p, config.min_p,
                   config.repetition_penalty)


def write_sample(model: LanguageModel, tokenizer: Tokenizer, prompt: str, ids: torch.Tensor, cache: Cache,
                 config: SampleConfig) -> None:
    """Print the prompt and, token by token, what the model writes behind it; with show_probs first a table of each."""
    sampler, numbers = make_sampler(config), itertools.count(1)

    def show(stages: list[Stage], token: torch.Tensor) -> None:
        print(f"token {next(numbers)}: {tokenizer.spell(int(token))}")
        print(table(stages, token, config.show_probs, tokenizer.spell), end="\n\n", flush=True)

    sampler.watch = show if config.show_probs else None
    tokens = model.stream(ids.to(model.head.device), config.max_new_tokens, sampler, cache=cache)
    texts = itertools.chain([prompt], tokenizer.decode_stream(map(int, tokens), ids[0].tolist()))
    for text in list(texts) if config.show_probs else texts:
        print(text, end="", flush=True)
    print("\n---------------", flush=True)


def continue_windows(model: LanguageModel, tokenizer: Tokenizer, windows: np.ndarray, config: SampleConfig) -> None:
    """Print the prompt that each row begins with, how the data goes on, and how the model does."""
    new = config.max_new_tokens
    cache = model.make_cache(batch_size=1, num_tokens=windows.shape[1])
    for number, row in enumerate(windows, 1):
        ids, truth = row[:len(row) - new], row[len(row) - new:]
        print(f"=== {number} of {len(windows)}, {config.split} split: prompt, {len(ids)} tokens ===")
        print(f"{tokenizer.decode(ids)}\n=== true continuation, {new} tokens ===")
        print(f"{''.join(tokenizer.decode_stream(truth, ids))}\n=== model's continuation, {new} tokens ===", flush=True)
        cache.clear()
        write_sample(model, tokenizer, "", torch.from_numpy(ids)[None, :], cache, config)


def converse(model: LanguageModel, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """Continue each line of the standard input, to its end or Ctrl-C. A line that cannot be encoded is only said."""
    is_terminal, room, cache = sys.stdin.isatty(), 0, Cache()
    sys.stdin.reconfigure(errors="surrogateescape")  # inference.encode has words for what is no text
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            prompt = input("> " if is_terminal else "")
            try:
                ids = inference.encode(tokenizer, prompt)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            cache.clear()
            if (num_tokens := ids.size(1) + config.max_new_tokens) > room:
                room = -(-num_tokens // 1024) * 1024  # so that a longer line rarely needs a new one, compiled anew
                cache = model.make_cache(batch_size=1, num_tokens=room)
            write_sample(model, tokenizer, prompt, ids, cache, config)
    if is_terminal:
        print()


if __name__ == "__main__":
    run_script(main)
