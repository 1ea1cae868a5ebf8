"""Bigram, MLP and recurrent language models, which a GPT is to be measured against, and `build`, which makes any model.

Owns these models. They train, resume, save and write text as the GPT does, because LanguageModel (language_model.py)
does that for all. They differ in what they see: one token, `window` tokens, or all of them through a state of fixed
size. None has a limit of positions. Only flatGPT reads their files.

The best table of a bigram model is known without training: `count_pairs` and `fit_bigram`. In the text "abab", which
has a vocabulary of two letters, ab comes twice and ba once. With k = 1 added to each of the four counts, a is followed
by b with probability (2 + 1) / (2 + 2), and b by a with (1 + 1) / (1 + 2).

Letters: as in model.py, and F the width of the MLP's hidden layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from flatgpt.models.fused import activation
from flatgpt.models.generate import Cache
from flatgpt.models.language_model import LanguageModel
from model import GPT, FusedLinear, GPTConfig, make_norm

if TYPE_CHECKING:
    from flatgpt.data.shards import Split

CHUNK_TOKENS = 2**20  # that are counted at a time
CHUNK_CELLS = 2**22  # of a table that are smoothed at a time
MAX_CELLS = 2**31  # of a table of counts: 16 GiB of them, and half as much of logits


def build(config: GPTConfig) -> LanguageModel:
    """The model that `config.model` names, freshly initialised."""
    return {"gpt": GPT, "bigram": Bigram, "mlp": WindowMLP, "rnn": Recurrent, "lstm": Recurrent,
            "gru": Recurrent}[config.model](config)


def build_empty(config: GPTConfig) -> LanguageModel:
    """The same model on the meta device: names and shapes, no values."""
    with torch.device("meta"), _SkipNormal():
        return build(config)


class _SkipNormal(TorchFunctionMode):
    """Skips `normal_`, for which torch imports its compiler on the meta device: half as long again as importing torch
    itself, at each start of a script."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") == "normal_":  # a tensor's, or torch.nn.init's
            return [*args, *(kwargs or {}).values()][0]
        return func(*args, **(kwargs or {}))


class Bigram(LanguageModel):
    """A row of logits for each token: the next token depends on the last one alone. V^2 parameters."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.table = nn.Embedding(config.padded_vocab_size, config.padded_vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Zero, so that the first loss is ln V. The loss is convex: no start is better than another."""
        self.table.weight.zero_()

    @property
    def head(self) -> torch.Tensor:
        return self.table.weight

    def hidden_states(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """The tokens (B, T) themselves."""
        if cache is not None:
            cache.length += idx.size(1)
        return idx

    def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)[..., :self.config.vocab_size]

    def summed_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.compute_logits(x).flatten(0, 1).float()  # in one piece: there is no product to save
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")

    def num_params(self, non_embedding: bool = True) -> int:
        return self.config.vocab_size**2


def count_pairs(shards: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """How often a token (row) was followed by another (column) within a shard: (V, V) int64, from integer arrays.

    Reads a chunk at a time. Raises ValueError for a vocabulary whose table is too large, and for an id outside it.
    """
    if vocab_size**2 > MAX_CELLS:
        raise ValueError(f"vocab_size={vocab_size}: a table of {vocab_size} x {vocab_size} counts takes "
                         f"{8 * vocab_size**2 / 1e9:,.0f} GB; make the data with a vocabulary of at most "
                         f"{math.isqrt(MAX_CELLS)} (prepare_data.py --tokenizer=char or bpe)")
    counts = np.zeros(vocab_size**2, dtype=np.int64)
    for number, shard in enumerate(shards):
        for start in range(0, len(shard), CHUNK_TOKENS):
            tokens = shard[start:start + CHUNK_TOKENS + 1].astype(np.int64)  # the last is the next chunk's first
            if tokens.max() >= vocab_size:
                raise ValueError(f"shard {number}: token id {tokens.max()} is outside the vocabulary of {vocab_size}")
            np.add.at(counts, tokens[:-1] * vocab_size + tokens[1:], 1)
    return counts.reshape(vocab_size, vocab_size)


@torch.no_grad()
def fit_bigram(model: Bigram, counts: np.ndarray, k: float) -> float:
    """Make the table the logarithms of (counts + k) / (their row's sum). k > 0 keeps every pair possible; a smaller k
    fits the counted pairs better. Returns the mean loss of these pairs, in nats."""
    loss, size = 0.0, len(counts)
    for start in range(0, size, max(1, CHUNK_CELLS // size)):
        rows = counts[start:start + max(1, CHUNK_CELLS // size)]
        log_probs = np.log(rows + k) - np.log(rows.sum(axis=1, keepdims=True) + k * size)
        loss -= (rows * log_probs).sum()
        model.table.weight[start:start + len(rows), :size] = torch.from_numpy(log_probs)
    return loss / max(1, counts.sum())


def counted_bigram(config: GPTConfig, splits: Mapping[str, Split], k: float) -> tuple[LanguageModel, str]:
    """The bigram whose table fits a data set's train split best, and what was counted, in words. Raises ValueError for
    a mixture, whose shares are of sequences drawn, not of what there is to count."""
    if len(splits) > 1:
        raise ValueError(f"bigram_counts=True counts one data set, not a mixture of {', '.join(splits)}: choose one of "
                         "them, or train on the mixture without --bigram_counts")
    split, = splits.values()
    counts, model = count_pairs(split.shards, config.vocab_size), build(config)
    loss = fit_bigram(model, counts, k)
    return model, (f"counted {counts.sum():,} pairs of tokens; with {k:g} added to each count the train loss is "
                   f"{loss:.4f}")


class VectorModel(LanguageModel):
    """Tokens become vectors of C channels; a subclass turns them into vectors that the head compares with its rows."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Tables N(0, 0.02) as in GPT-2: the first logits are small, and the loss is ln V. All else is as torch.nn
        makes it, which is what people compare with; docs/log.md has what another start would gain."""
        for table in dict.fromkeys((self.wte.weight, self.head)):
            table.normal_(std=0.02)
            table[self.config.vocab_size:] = 0.0


class WindowMLP(VectorModel):
    """The vectors of the last `window` tokens, zeros before the first, side by side; a hidden layer; C channels
    (Bengio et al. 2003, "A Neural Probabilistic Language Model", with one table for input and output)."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        gates = 2 if config.mlp == "swiglu" else 1
        self.c_fc = FusedLinear(config.window * config.n_embd, gates * [config.hidden], config.bias)
        self.act = activation(config.mlp)
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=config.bias)
        self.init_weights()

    def hidden_states(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """The cache's state is the last window - 1 tokens (B, <= window - 1)."""
        window, tokens, T = self.config.window, idx, idx.size(1)
        if cache is not None:
            tokens = idx if cache.state is None else torch.cat([cache.state, idx], dim=1)
            cache.state, cache.length = tokens[:, max(0, tokens.size(1) - window + 1):], cache.length + T
        num_zeros = window - 1 - (tokens.size(1) - T)
        x = F.pad(self.drop(self.wte(tokens)), (0, 0, num_zeros, 0))  # (B, window - 1 + T, C)
        x = torch.cat([x[:, i:i + T] for i in range(window)], dim=2)  # (B, T, window * C), oldest first
        return self.drop(self.c_proj(self.act(self.c_fc(x))))


class Recurrent(VectorModel):
    """Layers of torch's RNN (Elman 1990), LSTM (Hochreiter and Schmidhuber 1997) or GRU (Cho et al. 2014) over the
    tokens' vectors, and a norm. Dropout where Zaremba et al. (2014, arXiv:1409.2329) have it: on the way into a layer
    and out of the last, never from one position to the next."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        kind = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[config.model]
        # One by one: between layers, cuDNN's own dropout would draw from a state that no seed of ours sets.
        self.layers = nn.ModuleList([kind(config.n_embd, config.n_embd, bias=config.bias, batch_first=True)
                                     for _ in range(config.n_layer)])
        self.run = {"rnn": torch.rnn_tanh, "lstm": torch.lstm, "gru": torch.gru}[config.model]
        self.ln_f = make_norm(config, config.n_embd)
        self.init_weights()

    def hidden_states(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """The cache's state is, for each layer, its hidden state (1, B, C), and an LSTM's cell state."""
        states = [None] * len(self.layers)
        if cache is not None:
            states, cache.length = cache.state or states, cache.length + idx.size(1)
        x, after = self.drop(self.wte(idx)), []
        for layer, state in zip(self.layers, states):
            x, *state = self._run_layer(layer, x, state)
            x = self.drop(x)
            after.append(state)
        if cache is not None:
            cache.state = after
        return self.ln_f(x)

    def _run_layer(self, layer: nn.RNNBase, x: torch.Tensor, state: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """(B, T, C) and the state before it -> (B, T, C) and the state after it, in the number type of the weights: a
        state that goes through thousands of positions needs more digits than bfloat16 has."""
        if state is None:
            state = [x.new_zeros(1, x.size(0), x.size(2))] * (2 if self.config.model == "lstm" else 1)
        # torch's function, not the module: the module keeps a list of its weights, which FSDP would have to renew.
        with torch.autocast(x.device.type, enabled=False):
            return self.run(x, state if len(state) > 1 else state[0], list(layer.parameters()), self.config.bias,
                            1, 0.0, torch.is_grad_enabled(), False, True)
