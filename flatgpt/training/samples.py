"""What a run's model writes while it is trained: when nothing is given, and behind one's own prompts.

Owns when texts are due and how they are drawn: the draws are the same each time, so that what changes is the model's
doing. Training does not notice, because the generator is a separate one. Every rank takes part, and gets the same
texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from flatgpt import files
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.models import inference
from flatgpt.models.sampling import Sampler
from flatgpt.training import distributed
from flatgpt.training.compiling import eager
from flatgpt.training.distributed import Job
from flatgpt.training.metrics import LogConfig
from flatgpt.training.parallel import reshard
from model import LanguageModel

NUM_SAMPLES = 2  # texts that a run writes at a time when nothing is given


class Prompt(NamedTuple):
    text: str
    ids: list[int]


class Samples:
    """The texts of a run, as its options ask for them."""

    def __init__(self, config: LogConfig, model: LanguageModel, tokenizer: Tokenizer | None, job: Job):
        """Raises OSError, and ValueError that names the line, for prompts that cannot be continued."""
        self._config, self._model, self._tokenizer, self._job = config, model, tokenizer, job
        self._prompts: list[Prompt] = distributed.on_rank0(lambda: read_prompts(
            config.sample_prompts, tokenizer, model.config.block_size), job) if config.sample_prompts else []

    def due(self, step: int, evaluated: bool, is_last: bool) -> list[Prompt | None]:
        """What to continue after `step` updates; None is nothing."""
        interval = self._config.sample_interval
        is_time = interval and step and (step % interval == 0 or is_last)
        return [None] * bool(is_time) + (self._prompts if evaluated else [])

    def write(self, due: list[Prompt | None]) -> tuple[list[str], list[str]]:
        """The texts, and for each the prompt that it begins with, or ""."""
        options = self._model, self._tokenizer, self._config.sample_tokens, self._job
        written = [(text, prompt.text if prompt else "") for prompt in due
                   for text in (continue_prompt(prompt, *options) if prompt else write_samples(*options))]
        return [text for text, _ in written], [prompt for _, prompt in written]


def read_prompts(path: str, tokenizer: Tokenizer | None, block_size: int) -> list[Prompt]:
    """The lines of a file, but for blank ones. Raises OSError or ValueError."""
    if tokenizer is None:
        raise ValueError(f"sample_prompts={path} needs a tokenizer, and the data has none: --tokenizer=gpt2 says that "
                         "it is GPT-2's")
    prompts = []
    for number, line in enumerate(files.read_text(Path(path)).split("\n"), 1):
        if not (line := line.removesuffix("\r")).strip():
            continue
        try:
            ids = inference.encode(tokenizer, line)[0].tolist()
        except ValueError as error:
            raise ValueError(f"{path}:{number} cannot be continued: {error}") from None
        if len(ids) > block_size:
            raise ValueError(f"{path}:{number} has {len(ids):,} tokens, but the model reads {block_size:,}: shorten it")
        prompts.append(Prompt(line, ids))
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return prompts


def write_samples(model: LanguageModel, tokenizer: Tokenizer, num_tokens: int, job: Job) -> list[str]:
    """What the model writes when nothing is given."""
    rows = _draw([tokenizer.encode_prompt("").tolist()] * NUM_SAMPLES, model, num_tokens, job)
    return [tokenizer.decode(row) for row in rows]


def continue_prompt(prompt: Prompt, model: LanguageModel, tokenizer: Tokenizer, num_tokens: int, job: Job) -> list[str]:
    """The prompt and what the model writes behind it, which no other prompt changes."""
    row, = _draw([prompt.ids], model, num_tokens, job)
    return [prompt.text + "".join(tokenizer.decode_stream(row, prompt.ids))]


def _draw(starts: list[list[int]], model: LanguageModel, num_tokens: int, job: Job) -> list[list[int]]:
    sampler = Sampler(temperature=0.8, top_k=200, generator=torch.Generator().manual_seed(0))

    def choose(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return sampler(logits.cpu(), seen.cpu()).to(job.device)  # CUDA's cumulative sum is not deterministic

    # No cache: on CUDA that is read by a recorded graph, which FSDP's parts of weights are no good for.
    with job.autocast(), eager(model):
        tokens = torch.stack([*model.stream(torch.tensor(starts, device=job.device), num_tokens, choose,
                                            use_cache=False)], dim=1)
    reshard(model)
    return tokens.tolist()
