"""Tokens one after the other: caches, the loop that streams tokens, and the decoding step that a GPU replays.

Owns what a model remembers of the tokens it has read, and the order in which a prompt and new tokens are read. It does
not choose a token (sampling.py), and does not compute a layer: models bring `hidden_states` and `compute_logits`.

A prompt "abc", continued by two tokens: the model reads "abc" into the cache, which gives the logits of the token d;
then it reads d alone, which gives those of e. e is never read.

Letters: as in model.py.

Invariants:
- A cache changes the time that a token takes, never which token it is. `stream` without a cache is the definition.
- The prompt, once read, can be continued again from the same cache, until a fresh window overwrites it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from flatgpt.models.language_model import LanguageModel
    from model import GPT, GPTConfig

SamplerFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits (B, V), all tokens so far -> tokens (B, 1)


class Cache:
    """What a model remembers of the `length` tokens that it has read. A recurrent model keeps its `state` here.

    A prompt is read once and can be continued any number of times: `mark` remembers its end, `rewind` goes back to it.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.length, self.state = 0, None
        self._prompt: tuple[torch.Tensor | None, int, Any] = (None, 0, None)

    def mark(self, logits: torch.Tensor) -> None:
        """The prompt ends here, and `logits` (B, V) are those of the token after it."""
        self._prompt = logits, self.length, self.state

    def rewind(self) -> torch.Tensor | None:
        """Go back to the end of the prompt, and return its logits; to the beginning, and None, if no prompt was read.
        """
        logits, self.length, self.state = self._prompt
        return logits


class LayerCache(NamedTuple):
    """One layer's part of a KVCache, for T new positions."""

    k: torch.Tensor  # (B, K, capacity, D)
    v: torch.Tensor
    slots: torch.Tensor  # (T,): where the new ones belong
    num_read: int  # slots that are read: with T = 1 after it was written, else before
    key_positions: torch.Tensor  # (S,): of what `update` returns

    def update(self, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Keep the new keys and values (B, K, T, D), and return all that their queries may see (B, K, S, D). Several
        new ones are read beside what was kept: the last may overwrite what the first still sees."""
        (T, capacity), pairs = (k.size(2), self.k.size(2)), ((self.k, k), (self.v, v))
        seen = [torch.cat([kept[:, :, :self.num_read], new], dim=2) for kept, new in pairs if T > 1]
        for kept, new in pairs:
            kept.index_copy_(2, self.slots[-capacity:], new[:, :, -capacity:])
        return seen or [kept[:, :, :self.num_read] for kept, _ in pairs]


class KVCache(Cache):
    """Keys and values (B, K, capacity, D) of each layer. Position p lies in slot p modulo the layer's capacity: a layer
    with a sliding window keeps no more positions than it sees."""

    def __init__(self, config: GPTConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.capacity = capacity  # positions, of a layer that sees all
        shapes = [(batch_size, config.num_kv_heads, slots, config.head_size) for slots in cache_slots(config, capacity)]
        # Zeros, because NaN would get through a mask.
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for shape in shapes] for _ in range(2))
        self.decoder: Decoder | None = None

    def mark(self, logits: torch.Tensor) -> None:
        """Also copies what new positions may overwrite, in layers with a sliding window."""
        self.state = [kept.clone() if kept.size(2) < self.capacity else None for kept in (*self.k, *self.v)]
        super().mark(logits)

    def rewind(self) -> torch.Tensor | None:
        logits = super().rewind()
        for kept, copy in zip((*self.k, *self.v), self.state or []):
            if copy is not None:
                kept.copy_(copy)
        return logits

    def layers(self, positions: torch.Tensor, num_keys: int) -> list[LayerCache]:
        """Each layer's part, for new ones at `positions` (T,), the last of `num_keys`."""
        parts = {capacity: _slots(positions, num_keys, capacity) for capacity in {kept.size(2) for kept in self.k}}
        return [LayerCache(k, v, *parts[k.size(2)]) for k, v in zip(self.k, self.v)]

    def check_room(self, num_tokens: int) -> None:
        """Raises ValueError if so many more tokens do not fit."""
        if self.length + num_tokens > self.capacity:
            raise ValueError(f"the cache is full: it has room for {self.capacity} positions")


def cache_slots(config: GPTConfig, num_tokens: int) -> list[int]:
    """For how many of `num_tokens` positions each layer keeps keys and values."""
    return [min(window or num_tokens, num_tokens) for window in config.windows]


def _slots(positions: torch.Tensor, num_keys: int, capacity: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """LayerCache's `slots`, `num_read` and `key_positions` for new ones at `positions` (T,), the last of `num_keys`."""
    T = positions.size(0)
    num_read = min(num_keys if T == 1 else num_keys - T, capacity)
    if num_keys <= capacity:  # nothing was or is overwritten
        return positions, num_read, torch.arange(num_keys, device=positions.device)
    newest = positions if T == 1 else positions[:1] - 1  # that is kept when the slots are read
    kept = newest - (newest - torch.arange(num_read, device=positions.device)) % capacity  # negative where none is
    return positions % capacity, num_read, kept if T == 1 else torch.cat([kept, positions])


@torch.no_grad()
def stream(model: LanguageModel, idx: torch.Tensor, max_new_tokens: int, sampler: SamplerFn, use_cache: bool = True,
           cache: Cache | None = None) -> Iterator[torch.Tensor]:
    """Yield the next tokens (B,) of each row of idx (B, T). `sampler`, a sampling.Sampler, gets logits (B, V) and all
    tokens so far, and returns the next (B, 1).

    A model whose positions end reads a window, at first the last block_size tokens of the prompt. When the window is
    full, its last block_size // 2 tokens are read again as a fresh window, which bounds the cost of a token. Other
    models just go on. `use_cache=False` recomputes every position for every token, and gives the same tokens. A `cache`
    that an earlier call with the same prompt has used saves reading the prompt again. Raises ValueError for T = 0.
    """
    if idx.size(1) == 0:
        raise ValueError("the prompt is empty: generation needs at least one token to start from")
    limit, seen, is_kept = model.config.max_positions, idx, use_cache and cache is not None
    start = max(0, idx.size(1) - limit) if limit else 0  # of the window
    if not use_cache:
        cache = None
    elif cache is None:
        cache = model.make_cache(idx.size(0), idx.size(1) + max_new_tokens)
    training = model.training
    model.eval()
    try:
        logits, unread = cache.rewind() if cache else None, seen[:, start:]
        for step in range(max_new_tokens):
            if step or logits is None:
                logits = model.next_token_logits(unread, cache)
                if is_kept and step == 0:
                    cache.mark(logits)
            token = sampler(logits, seen)  # (B, 1)
            yield token.squeeze(1)
            seen = torch.cat([seen, token], dim=1)
            unread = token if cache else seen[:, start:]
            if limit and seen.size(1) - start > limit:
                start = seen.size(1) - max(1, limit // 2)
                unread = seen[:, start:]
                if cache:
                    cache.clear()  # the fresh window overwrites the prompt
    finally:
        model.train(training)


def next_token_logits(model: LanguageModel, idx: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """Logits (B, V) of the token after idx (B, T), which follows the tokens in the cache. Single tokens of a GPT go
    through its Decoder on CUDA, or if their step is to be compiled."""
    if isinstance(cache, KVCache) and idx.size(1) == 1 and (model.compile_decoding or idx.is_cuda):
        if cache.decoder is None:
            cache.decoder = Decoder(model, cache)
        return cache.decoder.step(idx)
    return model.compute_logits(model.hidden_states(idx, cache)[:, -1])


class Decoder:
    """The step that reads one token a row and gives the logits of the next, with shapes and addresses that never
    change. So it is compiled once and, on CUDA, recorded as a graph that a single launch replays.

    Attention goes over all positions of the cache, and a mask leaves out those that are not filled."""

    def __init__(self, model: GPT, cache: KVCache):
        cache.check_room(1)
        # The cache holds its decoder: in a circle both would keep their GPU memory until Python looks for circles.
        self.model, self.cache = model, weakref.proxy(cache)
        device = cache.k[0].device
        self.token = torch.zeros(cache.k[0].size(0), 1, dtype=torch.long, device=device)
        self.position = torch.full((1,), cache.length, dtype=torch.long, device=device)
        self.block_forward = eager = type(model.h[0]).forward
        if model.compile_decoding:
            self.block_forward = torch.compile(eager)
            try:
                self._logits()
            except Exception as error:  # the compiler can fail in any way
                warnings.warn(f"torch.compile failed, going on without it: {error}", stacklevel=2)
                self.block_forward = eager
        self.graph = None
        # Autocast keeps copies of the weights until its block ends, and a recording would keep them for good.
        if device.type == "cuda" and not torch.is_autocast_enabled("cuda"):
            # If a recording breaks off, torch leaves its stream the current one, and older versions draw no random
            # numbers from then on. Both are put back.
            generator = torch.cuda.default_generators[device.index]
            random_state = generator.clone_state()
            try:
                with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):
                    self._record()
            except RuntimeError as error:  # an operation that cannot be recorded, or no memory for the recording
                warnings.warn(f"recording a CUDA graph failed, going on without it: {error}", stacklevel=2)
                self.graph = None
                generator.graphsafe_set_state(random_state)

    def _logits(self) -> torch.Tensor:
        layer_caches = self.cache.layers(self.position, self.cache.capacity)
        x = self.model.forward_blocks(self.token, self.position, layer_caches, True, self.block_forward)
        return self.model.compute_logits(x[:, -1])

    def _record(self) -> None:
        """Run the step a few times on a side stream, then record it, as torch's notes on CUDA graphs say. These runs
        write into the cache at the position of the token that is read next, and its own step overwrites that."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._logits()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._logits()

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 1), which follow those in the cache -> logits (B, V) of the next."""
        self.cache.check_room(1)
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        if self.graph is None:
            return self._logits()
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites it
