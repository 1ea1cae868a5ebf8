"""A model in memory, and everything that the server computes with it: text, scores, attention, neighbors.

Owns how a model is loaded, how large a request may be, and which numbers are computed. Everything that takes
long is an iterator, a step at a time, so that the engine's thread can do other work between. It is the only module of
the server that imports torch.

Attention is what the model itself computes: the layer's queries and keys, given to `attention.attend` with the
identity in place of the values, so that what comes out is the weights.

Letters: as in model.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from flatgpt import run_folder
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.models import inference, weights
from flatgpt.models.attention import attend
from flatgpt.models.generate import Cache, cache_slots
from flatgpt.models.language_model import LanguageModel
from flatgpt.models.prepacked import prepack
from flatgpt.models.sampling import Candidates, Sampler, Stage, candidates, draw
from flatgpt.training import distributed
from flatgpt.training.device import DeviceConfig, pick_numerics
from flatgpt.training.distributed import Job

MAX_TOKENS = 2**14  # a prompt's and those written behind it
CACHE_BYTES = 2**29  # of keys and values that the rows of a batch may take; one row may take four times as much
MAX_BATCH = 64  # rows
LOGIT_CELLS = 2**24  # logits that are computed at a time: 64 MB in float32
MAX_SHOWN = 512  # tokens of a prompt that is looked into: attention is T^2 numbers


@cache
def this_job(device: str) -> Job:
    """The Job of the thread that runs the models. Raises ValueError for a device that this machine does not have."""
    return distributed.init_job(DeviceConfig(device), alone=True).__enter__()


def load(model_id: str, device: str, dtype: str) -> Loaded:
    """The model that an id of the engine's list names. Raises ValueError or OSError in words for a user."""
    job, path = this_job(device), weights.resolve(model_id)
    with run_folder.reading(path):
        found = version(path)
        model = inference.load_model(str(path)).eval()
        tokenizer = inference.find_tokenizer(path, model.config.vocab_size)
    numerics, _ = pick_numerics(model, dtype, "sdpa", job.device, 1, inference.options_of(path), training=False)
    prepack(model.to(job.device, numerics.dtype))
    return Loaded(model_id, model, tokenizer, found)


class Step(NamedTuple):
    """A token of each row, and what it was drawn from."""

    tokens: torch.Tensor  # (B,)
    stages: list[Stage]

    def candidates(self, num_rows: int) -> Candidates:
        """The candidates of the first row."""
        return candidates(self.stages, self.tokens, num_rows)

    def scores(self, top: int) -> Scores:
        """What the model thought of the tokens before any filter: of each row at place 0."""
        return score_logits(self.stages[0].logits[:, None], self.tokens[:, None], top)


class Scores(NamedTuple):
    """How likely a model found the tokens (B, T) that came, in nats."""

    log_probs: torch.Tensor  # (B, T)
    top_ids: torch.Tensor  # (B, T, K): the likeliest tokens at each place, likeliest first
    top_log_probs: torch.Tensor

    def at(self, row: int, place: int) -> tuple[float, list[tuple[int, float]]]:
        """The log-probability of the token there, and the likeliest ones with theirs."""
        top = zip(self.top_ids[row, place].tolist(), self.top_log_probs[row, place].tolist())
        return self.log_probs[row, place].item(), list(top)


def score_logits(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> Scores:
    """Of logits (B, T, V), what they say of tokens (B, T) and of the `top` likeliest. Raises ValueError for NaN."""
    refuse_nan(logits)
    log_probs = logits.float().log_softmax(dim=2)
    likeliest = log_probs.topk(min(top, log_probs.size(2)), dim=2)
    return Scores(log_probs.gather(2, tokens.unsqueeze(2)).squeeze(2).cpu(), likeliest.indices.cpu(),
                  likeliest.values.cpu())


def refuse_nan(logits: torch.Tensor) -> None:
    if logits.isnan().any():
        raise ValueError("this model computes NaN: its training diverged")


def version(path: Path) -> list[tuple[Path, int, int]]:
    """Differs when something else was put in the place of a model, or of its files. Raises FileNotFoundError."""
    found = [path, *sorted(path.glob("*.safetensors"))]
    return [(file, status.st_ino, status.st_mtime_ns) for file in found for status in [file.stat()]]


@dataclass(frozen=True)
class Loaded:
    id: str
    model: LanguageModel
    tokenizer: Tokenizer
    version: list[tuple[Path, int, int]]

    def is_outdated(self) -> bool:
        """Whether the id names another checkpoint by now: its run was begun anew, or has a better one. A deleted one
        goes on being used, and what came from the hub."""
        try:
            return Path(self.id).exists() and version(weights.resolve(self.id)) != self.version
        except (OSError, ValueError):
            return False

    def encode(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt, of which there is at least one. Raises ValueError."""
        if isinstance(prompt, str):
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise ValueError("the prompt is not valid text: it holds half of a surrogate pair")
            return inference.encode(self.tokenizer, prompt)[0].tolist()
        vocab_size = self.model.config.vocab_size
        if any(not 0 <= (bad := i) < vocab_size for i in prompt):
            raise ValueError(f"token id {bad} is outside the vocabulary: 0 to {vocab_size - 1}")
        if not prompt:
            raise ValueError("the prompt is empty: it takes at least one token id")
        return prompt

    def sampler(self, temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float) -> Sampler:
        """Of sample.py's options. Raises ValueError that lists all faults."""
        return Sampler(temperature, top_k or None, top_p, min_p, repetition_penalty)

    def batch_size(self, num_tokens: int) -> int:
        """How many rows of so many tokens, prompt and new ones, make a batch. Raises ValueError for a row too long."""
        if num_tokens > MAX_TOKENS:
            raise ValueError(f"the prompt and the new tokens take {num_tokens:,} tokens, and at most "
                             f"{MAX_TOKENS:,} are allowed: shorten the prompt, or ask for fewer tokens")
        c = self.model.config
        positions = min(num_tokens, c.max_positions or num_tokens)
        # KVCache.mark copies what a layer with a sliding window keeps.
        kept = sum(slots if slots == positions else 2 * slots for slots in cache_slots(c, positions))
        row_bytes = 2 * c.num_kv_heads * c.head_size * kept * self.model.head.itemsize
        if c.pos == "alibi":
            row_bytes += 4 * c.n_head * positions**2  # its mask
        if row_bytes > 4 * CACHE_BYTES:
            raise ValueError(f"the keys and values of {num_tokens:,} tokens take {row_bytes / 1e9:.1f} GB, and the "
                             f"server keeps at most {4 * CACHE_BYTES / 1e9:.1f}: shorten the prompt, or ask for fewer "
                             "tokens")
        return min(MAX_BATCH, max(1, CACHE_BYTES // row_bytes))

    def write(self, rows: list[list[int]], max_new_tokens: int, sampler: Sampler, seeds: Sequence[int],
              cache: Cache | None = None) -> Iterator[Step]:
        """Continue each row of ids; all are of one length. A row with seed s is drawn as sample.py draws its first
        sample with --seed=s, whatever rows are beside it."""
        device = self.model.head.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        stages: list[Stage] = []

        def choose(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            stages[:] = sampler.stages(logits, seen)
            refuse_nan(logits)
            probs = stages[-1].probs().split(1)
            return torch.cat([draw(row, generator) for row, generator in zip(probs, generators)])

        for tokens in self.model.stream(torch.tensor(rows, device=device), max_new_tokens, choose, cache=cache):
            yield Step(tokens, list(stages))

    @torch.no_grad()
    def score(self, rows: list[list[int]], top: int = 0, cache: Cache | None = None) -> Iterator[Scores]:
        """What the model thinks of the ids in rows of one length, T, behind the first: (B, T - 1). Yields what is known
        after each step of the work, last all of it. A cache can then be continued from, as if `write` had read the
        prompt. Raises ValueError for more tokens than the model has positions, and one, since nothing is read behind
        the last."""
        model, limit = self.model, self.model.config.max_positions or MAX_TOKENS
        ids = torch.tensor(rows, device=model.head.device)
        if ids.size(1) > limit + 1:
            raise ValueError(f"log-probabilities of {ids.size(1):,} tokens were asked for, and this model reads "
                             f"{limit:,} at a time: shorten the prompt (lm_eval: --model_args max_length={limit + 1})")
        if cache and ids.size(1) <= limit:
            x = model.hidden_states(ids, cache)  # (B, T, C)
            cache.mark(model.compute_logits(x[:, -1]))
        else:
            x = model.hidden_states(ids[:, :limit])
        length, parts = max(1, LOGIT_CELLS // (len(x) * model.config.vocab_size)), []
        for start in range(0, max(1, ids.size(1) - 1), length):
            targets = ids[:, 1:][:, start:start + length]
            parts.append(score_logits(model.compute_logits(x[:, start:start + targets.size(1)]), targets, top))
            yield Scores(*(torch.cat(tensors, dim=1) for tensors in zip(*parts)))

    # What Look inside shows

    def short(self, prompt: str) -> list[int]:
        """The ids of a prompt that can be looked into. Raises ValueError for others."""
        ids, limit = self.encode(prompt), min(MAX_SHOWN, self.model.config.max_positions or MAX_SHOWN)
        if len(ids) > limit:
            raise ValueError(f"the prompt has {len(ids):,} tokens, and this view shows at most {limit} of this model: "
                             "shorten it")
        return ids

    @torch.no_grad()
    def attention(self, ids: list[int], layer: int, head: int) -> torch.Tensor:
        """(T, T), float32: row t has the weights that position t gives to all. Raises ValueError for a layer or head
        that is not there."""
        c, blocks = self.model.config, self.model.h
        if not blocks:
            raise ValueError(f"this model ({c.model}) has no attention")
        faults = [f"{key}={value} must be 0 to {count - 1}" for key, value, count in (
            ("layer", layer, len(blocks)), ("head", head, c.n_head)) if not 0 <= value < count]
        if faults:
            raise ValueError("; ".join(faults))
        attn, inputs = blocks[layer].attn, []
        hook = attn.register_forward_pre_hook(lambda module, args: inputs.extend(args[:2]))
        try:
            self.model.hidden_states(torch.tensor([ids], device=self.model.head.device))
        finally:
            hook.remove()
        q, k, _ = attn.queries_keys_values(*inputs)
        identity = torch.eye(k.size(2), device=q.device).expand(*k.shape[:2], -1, -1)
        return attend(q.float(), k.float(), identity, inputs[1].mask, 0.0, "math")[0, head].cpu()

    @torch.no_grad()
    def neighbors(self, token: int, count: int) -> list[tuple[int, float]]:
        """The tokens nearest to one by the cosine of the angle between their embeddings, nearest first, with that.
        Raises ValueError for a token that is not there."""
        vocab_size, table = self.model.config.vocab_size, getattr(self.model, "wte", None)
        if table is None:
            raise ValueError(f"this model ({self.model.config.model}) has no embeddings")
        self.encode([token])
        embeddings = F.normalize(table.weight[:vocab_size].float(), dim=1)  # (V, C)
        cosines = embeddings @ embeddings[token]
        cosines[token] = -2.0  # itself comes last, and is left out
        nearest = cosines.topk(min(count, vocab_size - 1))
        return list(zip(nearest.indices.tolist(), nearest.values.tolist()))
