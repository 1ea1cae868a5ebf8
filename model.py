"""The GPT: configuration, attention, MLP, block, model, in the order in which data flows.

The architecture is GPT-2's unless the configuration says otherwise: learned positions, pre-norm blocks, one fused
query-key-value projection, a head tied to the token table. Parameters carry GPT-2's own names (wte, wpe,
h.0.attn.c_attn, ..., ln_f), and matrices have the layout of nn.Linear, (out, in). With `pos=rope norm=rmsnorm
mlp=swiglu bias=False` it is a Llama; with `sliding_window` besides a Mistral, with `qkv_bias` a Qwen2, with `qk_norm`
a Qwen3.

This file owns the layers and how they are put together. What every model has, a GPT or a baseline, is in
flatgpt/models/language_model.py: `forward` with the loss, `generate`, `from_pretrained`, `num_params`. Beside it,
attention.py has the kernels of attention, positions.py the formulas of positions, fused.py the loss in chunks, and
generate.py the cache of keys and values.
nanoGPT's `configure_optimizers` is flatgpt.training.optim.build_optimizer, and what its `estimate_mfu` counts is
flatgpt.planning.flops.flops_per_token. Nothing here knows about files, devices or processes.

Letters: B sequences, T positions, S positions that can be seen (those in a cache and the T new ones), C channels
(n_embd), H heads, K heads of keys and values, D channels a head, V vocabulary, N = B * T rows.

Invariants:
- A position sees itself and those before it, never a later one, with a cache or without; in a batch that says which
  documents it holds, only those of its own document.
- Parameters have the names and shapes that checkpoints have. An option that is not used changes neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from flatgpt.models.attention import (
    AttentionBackend,
    AttentionContext,
    Documents,
    VarlenMask,
    attend,
    has_varlen_kernel,
)
from flatgpt.models.fused import activated_linear, activation
from flatgpt.models.generate import KVCache, LayerCache
from flatgpt.models.language_model import LanguageModel
from flatgpt.models.positions import alibi_bias, apply_rope, rope_cos_sin, sinusoids

VOCAB_MULTIPLE = 128  # matrix units like it
LARGEST = {"n_layer": 10**4, "n_head": 10**5, "head_dim": 10**5, "n_embd": 10**6, "mlp_hidden": 10**7,
           "block_size": 10**9, "sliding_window": 10**9, "vocab_size": 2**32, "window": 10**5}  # beyond is a mistake
MEANING = {  # options that can say the same in two ways -> what they come to
    "n_kv_head": "num_kv_heads", "head_dim": "head_size", "mlp_hidden": "hidden", "window_pattern": "window_letters",
    "rope_original_block_size": "rope_original"}


@dataclass
class GPTConfig:
    """Shape of the model"""

    model: Literal["gpt", "bigram", "mlp", "rnn", "lstm", "gru"] = "gpt"  # gpt, or one of the baselines
    block_size: int = 1024  # context length T, in tokens
    vocab_size: int = 50257  # vocabulary V, in tokens
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block; divides n_embd, unless head_dim is given
    n_kv_head: int = 0  # heads of keys and values, each for n_head / n_kv_head queries; 0 = n_head
    head_dim: int = 0  # channels D of a head; 0 = n_embd / n_head
    n_embd: int = 768  # channels C
    dropout: float = 0.0  # dropout probability; 0 for pretraining, 0.1 and up for small data or fine-tuning
    bias: bool = False  # biases in linear layers and norms (GPT-2 has them; without is a bit better and faster)
    qkv_bias: bool = False  # biases on queries, keys and values alone, as Qwen2 has them
    pos: Literal["learned", "sinusoidal", "learned_sinusoidal", "rope", "alibi", "none"] = "learned"  # positions
    rope_theta: float = 10000.0  # the slowest rotation of pos=rope turns once in about 2 pi theta positions
    rope_scaling: Literal["llama3", "linear", "yarn"] = "llama3"  # which rotations rope_factor slows; linear: all
    rope_factor: float = 1.0  # slows rotations by this factor, for a longer context (Llama 3.1: 8, 3.2: 32)
    rope_original_block_size: int = 0  # context before rope_factor, in tokens; 0 = block_size, or init_from's own
    sliding_window: int = 0  # positions that a query sees in S blocks, its own among them; 0 = all before it
    window_pattern: str = "S"  # a letter a block, repeated over them: S has the sliding window, L sees all
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] = "gelu"  # gelu: exact; gelu_tanh: OpenAI's GPT-2's
    mlp_hidden: int = 0  # width of the MLP; 0 = 4 C, with swiglu 8/3 C, which has as many parameters
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm subtracts no mean and has no bias
    norm_position: Literal["pre", "post"] = "pre"  # pre: norm the input of each layer; post: norm the sum after it
    norm_eps: float = 1e-5  # added to the variance in the norms
    qk_norm: bool = False  # norm queries and keys, head by head
    tie_embeddings: bool = True  # the token table is also the output head
    window: int = 8  # number of last tokens that model=mlp reads

    def validate(self) -> list[str]:
        """What is wrong with this shape, a sentence each."""
        return self._faults_by_themselves() or self._faults_together()

    def _faults_by_themselves(self) -> list[str]:
        choices = {key: get_args(kind) for key, kind in get_type_hints(type(self)).items() if get_args(kind)}
        faults = [f"{key}={getattr(self, key)!r} must be one of {', '.join(names)}" for key, names in choices.items()
                  if getattr(self, key) not in names]
        faults += [f"{key}={getattr(self, key)} must be positive"
                   for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "window", "rope_theta")
                   if getattr(self, key) <= 0]
        faults += [f"{key}={getattr(self, key)} must be 0 or more"
                   for key in ("n_kv_head", "head_dim", "mlp_hidden", "rope_original_block_size", "sliding_window")
                   if getattr(self, key) < 0]
        faults += [f"{key}={getattr(self, key):,} must be at most {most:,}" for key, most in LARGEST.items()
                   if getattr(self, key) > most]
        if not self.rope_factor >= 1:
            faults.append(f"rope_factor={self.rope_factor} must be 1 or more")
        if set(self.window_pattern) not in ({"S"}, {"S", "L"}):
            faults.append(f"window_pattern={self.window_pattern!r} must be letters S and L, such as SSSL, with an S")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout={self.dropout} must be at least 0 and below 1")
        return faults

    def _faults_together(self) -> list[str]:
        faults = []
        if self.rope_factor != 1 and self.pos != "rope":
            faults.append(f"rope_factor={self.rope_factor} needs pos=rope (here {self.pos})")
        if self.rope_scaling == "yarn" and self.rope_theta <= 1:
            faults.append(f"rope_scaling=yarn needs a rope_theta above 1, not {self.rope_theta}")
        if self.window_pattern != "S" and not self.sliding_window:
            faults.append(f"window_pattern={self.window_pattern} needs sliding_window, the positions that S blocks see")
        if self.qkv_bias and self.bias:
            faults.append("qkv_bias=True is for bias=False: with bias=True all linear layers have biases")
        if self.n_head % self.num_kv_heads:
            faults.append(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.model == "gpt" and not self.head_dim and self.n_embd % self.n_head:
            faults.append(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        elif self.model == "gpt" and self.pos == "rope" and self.head_size % 2:
            name = "head_dim" if self.head_dim else "n_embd / n_head"
            faults.append(f"pos=rope turns pairs of channels, and {name}={self.head_size} is odd")
        if self.pos in ("sinusoidal", "learned_sinusoidal") and self.n_embd % 2:
            faults.append(f"pos={self.pos} needs an even n_embd, not {self.n_embd}")
        return faults

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        """Channels D of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def window_letters(self) -> str:
        """A letter for each block, as in window_pattern."""
        return (self.window_pattern * self.n_layer)[:self.n_layer]

    @property
    def windows(self) -> list[int]:
        """How many positions a query sees in each block, at most; 0 for all."""
        return [self.sliding_window if letter == "S" else 0 for letter in self.window_letters]

    @property
    def hidden(self) -> int:
        """Width of the MLP; swiglu's, which has three matrices instead of two, is a multiple of 8."""
        return self.mlp_hidden or (round(self.n_embd / 3) * 8 if self.mlp == "swiglu" else 4 * self.n_embd)

    @property
    def rope_original(self) -> int:
        """The context that rope_factor lengthens."""
        return self.rope_original_block_size or self.block_size

    def fix_rope_original(self) -> None:
        """Keep the context that rope_factor lengthens, also where it is block_size, which may change later."""
        if self.rope_factor != 1 and self.rope_scaling != "linear":
            self.rope_original_block_size = self.rope_original

    def means(self, key: str, value: Any) -> bool:
        """Whether `value` for `key` would make the same model: 0 stands for a number that others give."""
        meaning = MEANING.get(key, key)
        return getattr(replace(self, **{key: value}), meaning) == getattr(self, meaning)

    @property
    def max_positions(self) -> int | None:
        """The most positions that the model can look back over: learned ones end at block_size, all others go on."""
        return self.block_size if self.model == "gpt" and self.pos.startswith("learned") else None


class LayerNorm(nn.LayerNorm):
    """Computes in the number type of its input, whatever type the weights have: FSDP gathers 16-bit ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv:1910.07467), in the number type of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=config.norm_eps)
    return LayerNorm(width, eps=config.norm_eps, bias=config.bias)


class FusedLinear(nn.Linear):
    """Linear layers that read the same input, as one product: its output is theirs, `widths` channels each, side by
    side. (To Muon they are matrices of their own.)"""

    def __init__(self, in_features: int, widths: list[int], bias: bool):
        super().__init__(in_features, sum(widths), bias)
        self.widths = widths


class CausalSelfAttention(nn.Module):
    """Every position reads from itself and from those before it: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.num_kv_heads, config.dropout
        self.head_dim = config.head_size
        q_width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.c_attn = FusedLinear(config.n_embd, [q_width, kv_width, kv_width], config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(q_width, config.n_embd, bias=config.bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.resid_dropout = nn.Dropout(config.dropout)
        self.backend: AttentionBackend = "sdpa"

    def forward(self, x: torch.Tensor, context: AttentionContext, cache: LayerCache | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C); with a `cache`, the T positions follow those that it holds."""
        q, k, v = self.queries_keys_values(x, context)
        if cache is not None:  # keep the T new ones, and read all S
            k, v = cache.update(k, v)
        y = attend(q, k, v, context.mask, self.dropout if self.training else 0.0, self.backend)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H D)
        return self.resid_dropout(self.c_proj(y))

    def queries_keys_values(self, x: torch.Tensor, context: AttentionContext) -> list[torch.Tensor]:
        """x (B, T, C) -> queries (B, H, T, D), keys and values (B, K, T, D), normed and rotated."""
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2 K, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.cos_sin is not None:
            q, k = apply_rope(q, *context.cos_sin), apply_rope(k, *context.cos_sin)
        # CUDA's autocast norms in float32. The transposition is last, so that the compiler reads and writes in order.
        return [t.to(v.dtype).transpose(1, 2) for t in (q, k, v)]


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C), each position by itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        gates = 2 if config.mlp == "swiglu" else 1
        self.c_fc = FusedLinear(config.n_embd, gates * [config.hidden], config.bias)
        self.act = activation(config.mlp)
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(activated_linear(self.c_fc(x), self.act, self.c_proj))  # c_proj(act(c_fc(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). This is the unit that train.py compiles."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.is_pre_norm = config.norm_position == "pre"

    def forward(self, x: torch.Tensor, context: AttentionContext, cache: LayerCache | None = None) -> torch.Tensor:
        if self.is_pre_norm:
            x = x + self.attn(self.ln_1(x), context, cache)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, context, cache))
        return self.ln_2(x + self.mlp(x))


class GPT(LanguageModel):
    """`GPT(GPTConfig())` is a GPT-2 of 124M parameters, freshly initialised.

    `forward`, `generate`, `from_pretrained`, `save_pretrained` and `num_params` are LanguageModel's."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        config.fix_rope_original()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # tokens
        self.wpe = None  # positions
        if config.pos.startswith("learned"):
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = make_norm(config, config.n_embd) if config.norm_position == "pre" else nn.Identity()
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, width_ratio: float = 1.0) -> None:
        """As in GPT-2: N(0, 0.02), into the residual path N(0, 0.02 / sqrt(2 n_layer)), biases 0, norms 1.

        In a model `width_ratio` times as wide as one that this suits, activations and logits keep their size if the
        blocks' matrices shrink with the root of that, and the head with all of it (muP, arXiv:2203.03466). A head that
        is the token table cannot shrink: the gain of the norm before it does so in its place."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
            if name.startswith("h."):
                std /= math.sqrt(width_ratio)
            p.normal_(std=std / width_ratio if name == "lm_head.weight" else std)
        if self.lm_head is None and width_ratio != 1:
            self.ln_f.weight /= width_ratio
        if self.config.pos == "learned_sinusoidal":
            self.wpe.weight.copy_(sinusoids(torch.arange(self.config.block_size, device=self.wpe.weight.device),
                                            self.config.n_embd))
        for table in dict.fromkeys((self.wte.weight, self.head)):
            table[self.config.vocab_size:] = 0.0

    def hidden_states(self, idx: torch.Tensor, cache: KVCache | None = None,
                      documents: Documents | None = None) -> torch.Tensor:
        """Tokens (B, T), which follow those in the cache -> what the head reads (B, T, C). Raises ValueError for more
        positions than were learned, or than the cache has room for."""
        start = cache.length if cache is not None else 0
        end, limit = start + idx.size(1), self.config.max_positions
        if limit and end > limit:
            raise ValueError(f"{end} positions, but the model has learned only block_size={limit}; models with "
                             "--pos=rope, alibi, sinusoidal or none have no such limit")
        positions = torch.arange(start, end, device=idx.device)
        if cache is None:
            if documents is None and self.config.sliding_window and self.has_varlen_kernel():
                documents = Documents(positions.expand_as(idx), len(idx))  # each row: that kernel takes windows too
            return self.forward_blocks(idx, positions, documents=documents)
        cache.check_room(idx.size(1))
        cache.length = end
        return self.forward_blocks(idx, positions, cache.layers(positions, end), start > 0 and idx.size(1) > 1)

    def has_varlen_kernel(self) -> bool:
        """Whether a kernel for sequences of different lengths can be used in all blocks."""
        drops = self.training and self.config.dropout > 0
        return self.config.pos != "alibi" and not drops and has_varlen_kernel(
            self.h[0].attn.backend, self.head.device, self.compute_dtype(), self.config.head_size)

    def attention_context(self, positions: torch.Tensor, key_positions: torch.Tensor, window: int = 0,
                          need_mask: bool = False, documents: Documents | None = None) -> AttentionContext:
        """For queries at `positions` (T,), keys at `key_positions` (S,), and a sliding window (0: none), with which a
        negative position means no key. `need_mask` where `attend` cannot know by itself which keys a query sees."""
        c, T, cos_sin = self.config, positions.size(0), None
        if c.pos == "rope":
            cos_sin = rope_cos_sin(positions if documents is None else documents.positions, c.head_size, c.rope_theta,
                                   c.rope_factor, c.rope_original_block_size, c.rope_scaling)
        if documents is not None and self.has_varlen_kernel():
            return AttentionContext(cos_sin, VarlenMask(documents.cu_seqlens(), T, window))
        if not (need_mask or documents is not None or c.pos == "alibi" or 0 < window < T):
            return AttentionContext(cos_sin)
        distance = positions[:, None] - key_positions  # (T, S)
        mask = (distance >= 0)[None, None]
        if window:
            mask = mask & (distance < window) & (key_positions >= 0)
        if documents is not None:
            mask = mask & documents.share()[:, None]  # (B, 1, T, T)
        if c.pos == "alibi" or documents is not None:  # as numbers, or SDPA would make and keep them in each block
            bias = alibi_bias(c.n_head, distance) if c.pos == "alibi" else torch.zeros(1, device=distance.device)
            mask = bias.masked_fill(~mask, -math.inf).to(self.compute_dtype())
        return AttentionContext(cos_sin, mask)

    def forward_blocks(self, idx: torch.Tensor, positions: torch.Tensor, layer_caches: list[LayerCache] | None = None,
                       need_mask: bool = False, block_forward: Callable = Block.__call__,
                       documents: Documents | None = None) -> torch.Tensor:
        """Tokens (B, T) at `positions` (T,) -> what the head reads (B, T, C). See attention_context for `need_mask`."""
        windows, caches = self.config.windows, layer_caches or [None] * len(self.h)
        contexts = {window: self.attention_context(positions, cache.key_positions if cache else positions, window,
                                                   need_mask, documents)
                    for window, cache in dict(zip(windows, caches)).items()}
        x = self.wte(idx)  # (B, T, C)
        if documents is not None:
            positions = documents.positions
        if self.wpe is not None:
            x = x + self.wpe(positions)
        elif self.config.pos == "sinusoidal":
            x = x + sinusoids(positions, self.config.n_embd).to(x.dtype)
        x = self.drop(x)
        for block, window, cache in zip(self.h, windows, caches):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, contexts[window], use_reentrant=False)
            else:
                x = block_forward(block, x, contexts[window], cache)
        return self.ln_f(x)

    def crop_block_size(self, block_size: int) -> None:
        limit = self.config.max_positions
        if block_size < 1 or (limit and block_size > limit):
            raise ValueError(f"block_size={block_size}: the model has only {self.config.block_size} positions")
        super().crop_block_size(block_size)
        if self.wpe is not None:
            self.wpe = nn.Embedding.from_pretrained(self.wpe.weight[:block_size].detach().clone(), freeze=False)

    def make_cache(self, batch_size: int, num_tokens: int) -> KVCache:
        """It lies on the model's device, in the number type that keys and values will have."""
        limit = self.config.max_positions
        return KVCache(self.config, batch_size, min(num_tokens, limit) if limit else num_tokens, self.head.device,
                       self.compute_dtype())
