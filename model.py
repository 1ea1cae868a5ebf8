"""The GPT in one file: configuration, blocks, loss, cached generation.

The architecture is GPT-2's unless the configuration says otherwise: learned positions, pre-norm blocks, one fused
query-key-value projection, a head tied to the token table. Parameters carry GPT-2's own names (wte, wpe,
h.0.attn.c_attn, ..., ln_f), with the matrices of nn.Linear, (out, in). With `pos=rope norm=rmsnorm mlp=swiglu
bias=False` it is a Llama.

Letters: B sequences, T positions, S positions that can be seen (those in a cache and the T new ones), C channels
(n_embd), H heads, K heads of keys and values, D channels a head, V vocabulary, N = B * T rows.

Invariants:
- The token table has `padded_vocab_size` rows (a multiple of 128, which matrix units like). Rows from vocab_size on are
  zero, get no gradient, take no part in the loss's softmax and never leave `forward` as logits.
- The logits of a training batch are never held whole: see LinearCrossEntropy.
- Nothing here knows about files, devices or processes; weights.py speaks other people's layouts. What another room does
  better (loading, sampling) is imported where it is called, so that this file can be read, and copied, alone.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

VOCAB_MULTIPLE = 128
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1, 4  # config.json's names; the same in every Llama 3 that Meta has published
LOGITS_CHUNK_BYTES = 2**27  # of logits at a time; each chunk costs a pass over the head's gradient
LOGITS_CHUNK_BYTES_CUDA = 2**29  # a GPU wants larger products
SOFTMAX_ELEMENTS = 2**22  # of these at a time on a CPU: what its last cache holds in float32

LARGEST = {"n_layer": 10**4, "n_head": 10**5, "n_embd": 10**6, "mlp_hidden": 10**7, "block_size": 10**9,
           "vocab_size": 2**32, "window": 10**5}  # beyond is a mistake, not a model

Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Attention = Literal["sdpa", "math", "flash3"]  # torch's fused kernels; the formula; FlashAttention-3 (Hopper)


@dataclass
class GPTConfig:
    """Shape of the model"""

    model: Literal["gpt", "bigram", "mlp", "rnn", "lstm", "gru"] = "gpt"  # gpt, or one of the baselines
    block_size: int = 1024  # context length T, in tokens
    vocab_size: int = 50257  # vocabulary V, in tokens
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block; divides n_embd
    n_kv_head: int = 0  # heads of keys and values, each for n_head / n_kv_head queries; 0 = n_head
    n_embd: int = 768  # channels C
    dropout: float = 0.0  # dropout probability; 0 for pretraining, 0.1 and up for small data or fine-tuning
    bias: bool = False  # biases in linear layers and norms (GPT-2 has them; without is a bit better and faster)
    pos: Literal["learned", "sinusoidal", "learned_sinusoidal", "rope", "alibi", "none"] = "learned"  # positions
    rope_theta: float = 10000.0  # the slowest rotation of pos=rope turns once in about 2 pi theta positions
    rope_factor: float = 1.0  # slow rotations are so many times slower, for a longer context (Llama 3.1: 8, 3.2: 32)
    rope_original_block_size: int = 0  # the context length before that, in tokens (Llama 3.1: 8192); tells what is slow
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] = "gelu"  # gelu: exact; gelu_tanh: OpenAI's GPT-2's
    mlp_hidden: int = 0  # width of the MLP; 0 = 4 C, with swiglu 8/3 C, which has as many parameters
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm takes off no mean and has no bias
    norm_position: Literal["pre", "post"] = "pre"  # norm what a layer reads, or the sum behind it
    norm_eps: float = 1e-5  # added to the variance in the norms
    qk_norm: bool = False  # norm queries and keys, head by head
    tie_embeddings: bool = True  # the token table is also the output head
    window: int = 8  # tokens that model=mlp looks at

    def validate(self) -> None:
        """Raises ValueError, naming every bad value."""
        choices = {key: get_args(kind) for key, kind in get_type_hints(type(self)).items() if get_args(kind)}
        faults = [f"{key}={getattr(self, key)!r} must be one of {', '.join(names)}" for key, names in choices.items()
                  if getattr(self, key) not in names]
        faults += [f"{key}={getattr(self, key)} must be positive"
                  for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "window", "rope_theta")
                  if getattr(self, key) <= 0]
        faults += [f"{key}={getattr(self, key)} must be 0 or more"
                   for key in ("n_kv_head", "mlp_hidden", "rope_original_block_size") if getattr(self, key) < 0]
        faults += [f"{key}={getattr(self, key):,} must be at most {most:,}" for key, most in LARGEST.items()
                   if getattr(self, key) > most]
        if not self.rope_factor >= 1:
            faults.append(f"rope_factor={self.rope_factor} must be 1 or more")
        if not faults and self.rope_factor != 1 and not (self.pos == "rope" and self.rope_original_block_size):
            faults.append(f"rope_factor={self.rope_factor} needs pos=rope (here {self.pos}) and the context length "
                          f"before scaling, rope_original_block_size (here {self.rope_original_block_size})")
        if not faults and self.model == "gpt" and self.n_embd % self.n_head:
            faults.append(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not faults and self.n_head % self.num_kv_heads:
            faults.append(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if not faults and self.model == "gpt" and self.pos == "rope" and self.n_embd // self.n_head % 2:
            faults.append(f"pos=rope turns pairs of channels, and n_embd / n_head={self.n_embd // self.n_head} is odd")
        if not faults and self.pos in ("sinusoidal", "learned_sinusoidal") and self.n_embd % 2:
            faults.append(f"pos={self.pos} needs an even n_embd, not {self.n_embd}")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout={self.dropout} must be at least 0 and below 1")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden(self) -> int:
        """Width of the MLP; swiglu's, which has three matrices instead of two, is a multiple of 8."""
        return self.mlp_hidden or (round(self.n_embd / 3) * 8 if self.mlp == "swiglu" else 4 * self.n_embd)

    @property
    def max_positions(self) -> int | None:
        """How far the model can look back: learned positions end at block_size, all others go on."""
        return self.block_size if self.model == "gpt" and self.pos.startswith("learned") else None


class Cache:
    """What a model remembers of the `length` tokens that it has read; `state` is what a recurrent one carries.

    A prompt is read once and continued any number of times: `mark` remembers its end, `rewind` goes back there."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.length, self.state = 0, None
        self._prompt: tuple[torch.Tensor | None, int, Any] = (None, 0, None)

    def mark(self, logits: torch.Tensor) -> None:
        """The prompt ends here, and `logits` (B, V) are those of the token behind it."""
        self._prompt = logits, self.length, self.state

    def rewind(self) -> torch.Tensor | None:
        """Back to the end of the prompt, and its logits; to the beginning, and None, when none was read."""
        logits, self.length, self.state = self._prompt
        return logits


class Past(NamedTuple):
    """One layer's part of a KVCache, for T new positions."""

    k: torch.Tensor  # (B, K, S, D): the keys of S positions, those of the T new ones to be written
    v: torch.Tensor
    at: torch.Tensor  # (T,): where they are to be written


class KVCache(Cache):
    """Keys and values of the positions read so far, (n_layer, B, K, capacity, D) each; `length` are filled."""

    def __init__(self, config: GPTConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.num_kv_heads, capacity, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # no NaN where a mask says that nobody looks
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.decoder: Decoder | None = None  # of the model that reads with this cache, if it has one

    def layers(self, at: torch.Tensor, end: int) -> list[Past]:
        """The first `end` positions, for new ones at `at`."""
        return [Past(k[:, :, :end], v[:, :, :end], at) for k, v in zip(self.k, self.v)]


class Look(NamedTuple):
    """Where T queries stand and what they see, the same in every layer."""

    rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # cosines and sines (T, D) of pos=rope
    mask: torch.Tensor | None = None  # true where a query sees a key (T, S); or is added to the scores (1, H, T, S)


def rotation(at: torch.Tensor, head_dim: int, theta: float, factor: float = 1.0,
             original: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (T, D) of RoPE's angles at positions (T,): channels i and i + D/2 turn as a pair by
    position * theta^(-2i/D) (Su et al. 2021, arXiv:2104.09864; paired as in Llama's published weights).

    With a `factor`, pairs that turn less than once in `original` positions are so many times slower, those that turn
    more than 4 times keep their speed, and between them it changes smoothly (Llama 3.1's: apply_scaling in Meta's
    llama-models, rope_type=llama3 in transformers)."""
    speed = theta ** (-torch.arange(0, head_dim, 2, device=at.device) / head_dim)
    if factor != 1:
        turns = original * speed / (2 * math.pi)
        kept = ((turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / factor)
    angle = (at[:, None] * speed).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D), each pair of channels turned by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


def alibi_slopes(n_head: int, device: torch.device | None = None) -> torch.Tensor:
    """(H,): a head's penalty for each position of distance, 2^(-8/H), 2^(-16/H), ...; between powers of two the further
    heads take every other one of twice as many (Press et al. 2021, arXiv:2108.12409)."""
    power = 2 ** int(math.log2(n_head))
    head = torch.arange(n_head, device=device)
    return torch.exp2(torch.where(head < power, -8 * (head + 1) / power, -4 * (2 * (head - power) + 1) / power))


def sinusoids(at: torch.Tensor, width: int) -> torch.Tensor:
    """(T, C): sines and cosines of positions (T,), wavelengths from 2 pi to 2 pi * 10,000 (Vaswani et al. 2017,
    arXiv:1706.03762), as large as the token table is at the start: the paper has both of size 1, GPT-2 0.02."""
    speed = 10000 ** (-torch.arange(0, width, 2, device=at.device) / width)
    angle = at[:, None] * speed
    return 0.02 * math.sqrt(2) * torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float,
           how: Attention) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, for queries (B, H, T, D), keys and values (B, H, S, D) -> (B, H, T, D).

    A query sees the keys for which `mask` (T, S) is true, or a mask of numbers (1, H, T, S) is added to its scores.
    Without one the T queries are the last T of the S positions and see all up to their own, and T has to be S or 1."""
    is_causal = mask is None and q.size(2) > 1
    if how == "flash3" and is_causal and not dropout and q.dtype != torch.float32:
        from flash_attn_interface import flash_attn_func

        y = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)  # it wants (B, T, H, D)
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if how != "math":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    scores = (q / math.sqrt(q.size(3))) @ k.transpose(2, 3)  # (B, H, T, S)
    if is_causal:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


class LayerNorm(nn.LayerNorm):
    """In the number type of its input, whatever the weights come in: FSDP hands out 16-bit ones."""

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


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and at those before it: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.num_kv_heads, config.dropout
        self.head_dim = config.n_embd // config.n_head
        # q, k and v in one product
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.resid_dropout = nn.Dropout(config.dropout)
        self.how: Attention = "sdpa"

    def forward(self, x: torch.Tensor, look: Look, past: Past | None = None) -> torch.Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 K, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if look.rotation is not None:
            q, k = rotate(q, *look.rotation), rotate(k, *look.rotation)
        q, k = q.to(v.dtype), k.to(v.dtype)  # CUDA's autocast norms in float32
        if past is not None:
            k, v = past.k.index_copy_(2, past.at, k), past.v.index_copy_(2, past.at, v)
        if self.n_kv_head < self.n_head:  # (B, K, S, D) -> (B, H, S, D)
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
        y = attend(q, k, v, look.mask, self.dropout if self.training else 0.0, self.how)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """(..., hidden) -> (..., hidden); swiglu takes (..., 2 hidden): gates, and what they let through (Shazeer 2020,
    arXiv:2002.05202). relu2 is So et al.'s (2021, arXiv:2109.08668)."""
    return {"gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"), "relu": F.relu,
            "relu2": lambda h: F.relu(h).square(),
            "swiglu": lambda h: F.silu(h.chunk(2, dim=-1)[0]) * h.chunk(2, dim=-1)[1]}[name]


class ActivatedLinear(torch.autograd.Function):
    """F.linear(act(h), weight, bias) that keeps h alone for its backward pass and makes act(h) again there: a quarter
    of what a block would keep, for hardly any time."""

    @staticmethod
    def forward(ctx, h, weight, bias, act):
        """h (B, T, F), weight (C, hidden), bias (C,) or None, act (B, T, F) -> (B, T, hidden): (B, T, C)"""
        ctx.save_for_backward(h, weight)
        ctx.act, ctx.has_bias = act, bias is not None
        return F.linear(act(h), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        h, weight = ctx.saved_tensors
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            a = ctx.act(h)
        dy = dy.to(a.dtype)
        rows = dy.flatten(0, -2)
        dw = rows.t() @ a.detach().flatten(0, -2)
        dh, = torch.autograd.grad(a, h, dy @ weight.to(a.dtype))
        return dh, dw.to(weight.dtype), rows.sum(0).to(weight.dtype) if ctx.has_bias else None, None


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C), each position by itself"""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, (1 + (config.mlp == "swiglu")) * config.hidden, bias=config.bias)
        self.act = activation(config.mlp)
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.c_fc(x)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler knows to make act(h) again
            return self.dropout(self.c_proj(self.act(h)))
        return self.dropout(ActivatedLinear.apply(h, self.c_proj.weight, self.c_proj.bias, self.act))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). This is the unit that train.py compiles."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.is_pre_norm = config.norm_position == "pre"

    def forward(self, x: torch.Tensor, look: Look, past: Past | None = None) -> torch.Tensor:
        if self.is_pre_norm:
            x = x + self.attn(self.ln_1(x), look, past)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, look, past))
        return self.ln_2(x + self.mlp(x))


class ChunkLoss(nn.Module):
    """Summed cross-entropy of a chunk of logits, which it turns into their gradient: many passes over the largest
    tensor of a step, which is why train.py compiles this as it does the blocks."""

    def forward(self, logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, want_grad: bool) -> torch.Tensor:
        """logits (n, rows >= V), written over, targets (n, 1) with -1 for "ignore" -> float32 scalar."""
        z = logits.float()  # float32 logits themselves, or else a copy
        z[:, vocab_size:] = -math.inf
        valid, targets = targets >= 0, targets.clamp(min=0)
        largest, of_target = z.amax(dim=1, keepdim=True), z.gather(1, targets)
        total = z.sub_(largest).exp_().sum(dim=1, keepdim=True)
        if want_grad:  # the softmax, minus one at the target; zero where the target is ignored
            logits.copy_(z.mul_(valid / total).scatter_add_(1, targets, -valid.float()))
        return ((largest + total.log() - of_target) * valid).sum()


def _power_of_two(n: int) -> int:
    """The largest that is not above n, and 1. As block_size is one mostly, all chunks have one shape."""
    return 2 ** (max(1, n).bit_length() - 1)


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `x @ weight.T` against targets, in chunks of rows.

    The logits of a batch, (N, V) in float32, would be the largest tensor of the whole step. Here a chunk of them
    exists at a time, and since the softmax of a chunk is all that its gradient needs, the gradients of x and weight
    are made on the spot: the backward pass only scales them. Softmax and loss are float32 whatever the matrix products
    run in; the gradient of the weight is summed in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, dtype, want_grad, chunk_loss):
        """x (N, C), weight (rows >= V, C), targets (N,) with -1 for "ignore" -> float32 scalar."""
        x_all, w = x.to(dtype), weight.to(dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if want_grad else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if want_grad else None
        width, chunk_bytes = weight.size(0), LOGITS_CHUNK_BYTES_CUDA if x.is_cuda else LOGITS_CHUNK_BYTES
        rows = _power_of_two(chunk_bytes // (w.element_size() * width))
        # Only a CPU takes a chunk in parts: MPS adds nothing to a part that does not begin a tensor (pytorch 163327).
        part = _power_of_two(SOFTMAX_ELEMENTS // width) if x.device.type == "cpu" else rows
        for x_c, t_c, start in zip(x_all.split(rows), targets.unsqueeze(1).split(rows), range(0, x.size(0), rows)):
            logits = x_c @ w.t()  # (n, rows of w)
            for z, t in zip(logits.split(part), t_c.split(part)):
                loss += chunk_loss(z, t, vocab_size, want_grad)
            if want_grad:  # the logits have become their gradient
                dx[start:start + rows] = logits @ w
                if dtype == torch.float32:
                    dw.addmm_(logits.t(), x_c)
                else:
                    dw += logits.t() @ x_c
        ctx.grads = dx, dw
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.grads
        ctx.grads = None  # scaled in place below, so they are good for one backward pass
        return dx.mul_(grad), dw.mul_(grad), None, None, None, None, None


class LanguageModel(nn.Module):
    """What every model here has: the loss, generation, and a way to files and back. GPT is one, and so are those of
    baselines.py; they bring a `_hidden` of their own."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.activation_checkpointing = False  # keep only the blocks' inputs, and run them again in the backward pass
        self.compile_decoding = False  # compile the step that generates a token
        self.is_compiled = False  # its parts, in place: see distributed.compile_in_place
        self.chunk_loss = ChunkLoss()
        self.h = nn.ModuleList()  # what is gathered, compiled and run again block by block
        self.lm_head: nn.Linear | None = None  # None: the token table is the head

    def _hidden(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Tokens (B, T), which stand behind those in the cache, -> what the head reads (B, T, C)."""
        raise NotImplementedError

    @property
    def head(self) -> torch.Tensor:
        """(padded V, C)"""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.head)[..., :self.config.vocab_size]

    def _loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy, float32, of what the head reads (B, T, C) against targets (B, T)."""
        return LinearCrossEntropy.apply(x.flatten(0, 1), self.head, targets.flatten(), self.config.vocab_size,
                                        self._product_dtype(), torch.is_grad_enabled(), self.chunk_loss)

    def _product_dtype(self) -> torch.dtype:
        """The number type of matrix products: autocast's, or else the weights'."""
        device = self.head.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.head.dtype

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                num_targets: torch.Tensor | int | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits (B, T, V) of tokens idx (B, T), or, with targets (B, T), the loss: (logits, None) or (None, loss).

        Targets of -1 are ignored. The loss, float32, is the summed cross-entropy divided by `num_targets`: by default
        the number of targets in this batch (a mean); a training step split over micro-batches and ranks passes the
        number in the whole of it. Raises ValueError when T is more than the model has positions.
        """
        x = self._hidden(idx)
        if targets is None:
            return self._logits(x), None
        if num_targets is None:
            num_targets = (targets >= 0).sum().clamp(min=1)
        return None, self._loss(x, targets) / num_targets

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters, padding rows aside; `non_embedding` leaves out the positions (a tied token table is the head)."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        tables = [p for name, p in self.named_parameters() if name in ("wte.weight", "lm_head.weight")]
        total = sum(p.numel() for p in self.parameters()) - sum(padding * p.size(1) for p in tables)
        return total - (self.wpe.weight.numel() if non_embedding and getattr(self, "wpe", None) else 0)

    def set_attention(self, how: Attention) -> None:
        for block in self.h:
            block.attn.how = how

    def compiled_parts(self) -> list[nn.Module]:
        """What is worth compiling, part by part: the blocks are alike, so that one of them is compiled for all."""
        return [*self.h, self.chunk_loss]

    def crop_block_size(self, block_size: int) -> None:
        """Change the context in place, e.g. to fine-tune a model of 1,024 positions on windows of 256. Only a model
        whose positions go on can be given more. Raises ValueError."""
        self.config.block_size = block_size

    # Generation

    def make_cache(self, batch_size: int, num_tokens: int) -> Cache:
        """An empty cache for so many tokens a row, prompt included."""
        return Cache()

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 use_cache: bool = True, **options: Any) -> torch.Tensor:
        """Continue each row of idx (B, T >= 1) by `max_new_tokens` tokens: (B, T + max_new_tokens). See `stream`;
        sampling.Sampler has more `options`."""
        from flatgpt.models.sampling import Sampler

        tokens = self.stream(idx, max_new_tokens, Sampler(temperature, top_k, **options), use_cache)
        return torch.cat([idx, *(token.unsqueeze(1) for token in tokens)], dim=1)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, choose: Choose, use_cache: bool = True,
               cache: Cache | None = None) -> Iterator[torch.Tensor]:
        """Yield the next tokens of each row of idx (B, T), (B,) at a time. `choose` gets logits (B, V) and all tokens
        so far, and gives the next (B, 1): a sampling.Sampler.

        Models whose positions end read a window, the last block_size tokens of the prompt at first. When it is full,
        its last block_size // 2 tokens are read again as a fresh window, which keeps the cost of a token bounded; the
        others just go on. `use_cache=False` recomputes every position for every token, and gives the same tokens. A
        `cache` that an earlier call with the same prompt has used spares reading the prompt again.
        """
        if idx.size(1) == 0:
            raise ValueError("the prompt is empty: generation needs at least one token to start from")
        limit, seen = self.config.max_positions, idx
        start = max(0, idx.size(1) - limit) if limit else 0  # of the window
        if not use_cache:
            cache = None
        elif cache is None:
            cache = self.make_cache(idx.size(0), idx.size(1) + max_new_tokens)
        training = self.training
        self.eval()
        try:
            logits, unread = cache.rewind() if cache else None, seen[:, start:]
            for step in range(max_new_tokens):
                if step or logits is None:
                    logits = self._next_logits(unread, cache)
                if cache and step == 0:
                    cache.mark(logits)
                token = choose(logits, seen)  # (B, 1)
                yield token.squeeze(1)
                seen = torch.cat([seen, token], dim=1)
                unread = token if cache else seen[:, start:]
                if limit and seen.size(1) - start > limit:
                    start = seen.size(1) - max(1, limit // 2)
                    unread = seen[:, start:]
                    if cache:
                        cache.clear()  # the prompt is written over
        finally:
            self.train(training)

    def _next_logits(self, idx: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Of the token behind idx (B, T), which stand behind those in the cache: (B, V)."""
        return self._logits(self._hidden(idx, cache)[:, -1])

    # Files

    @staticmethod
    def from_pretrained(source: str, **overrides: Any) -> LanguageModel:
        """Load a model: a hub id (`gpt2` ... `gpt2-xl`, `owner/name`) or Hugging Face folder of a GPT-2 or Llama, a
        checkpoint or run folder of ours, or nanoGPT's ckpt.pt. `overrides` replace fields of the configuration that do
        not change the weights' shapes (dropout). Raises ValueError or OSError in words for a user."""
        from flatgpt.models.baselines import build_empty
        from flatgpt.models.weights import load_pretrained

        config, state = load_pretrained(source)
        for key, value in overrides.items():
            setattr(config, key, value)
        model = build_empty(config)
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder: str, eot_id: int | None = None) -> None:
        """Write a Hugging Face model folder: config.json, generation_config.json, model.safetensors."""
        from flatgpt.models.weights import save_pretrained

        save_pretrained(self.config, self.state_dict(), folder, eot_id)


class GPT(LanguageModel):
    """`GPT(GPTConfig())` is a GPT-2 of 124M parameters, freshly initialised."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
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
    def init_weights(self) -> None:
        """GPT-2's: N(0, 0.02), into the residual path N(0, 0.02 / sqrt(2 n_layer)), biases 0, norms 1."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("c_proj.weight"):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                p.normal_(std=0.02)
        if self.config.pos == "learned_sinusoidal":
            self.wpe.weight.copy_(sinusoids(torch.arange(self.config.block_size, device=self.wpe.weight.device),
                                            self.config.n_embd))
        for table in {self.wte.weight, self.head}:
            table[self.config.vocab_size:] = 0.0

    def _hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        start = cache.length if cache is not None else 0
        end, limit = start + idx.size(1), self.config.max_positions
        if limit and end > limit:
            raise ValueError(f"{end} positions, but the model has learned only block_size={limit}: other positions "
                             "(--pos=rope, alibi, sinusoidal or none) go on")
        if cache is not None and end > cache.capacity:
            raise ValueError(f"the cache is full: it has room for {cache.capacity} positions")
        at = torch.arange(start, end, device=idx.device)
        if cache is None:
            return self._run_blocks(idx, at, self._look(at, end), [None] * len(self.h))
        cache.length = end
        return self._run_blocks(idx, at, self._look(at, end, bool(start) and len(at) > 1), cache.layers(at, end))

    def _look(self, at: torch.Tensor, num_keys: int, masked: bool = False) -> Look:
        """Of queries at positions (T,) on the keys at 0, 1, ...; `masked` where `attend` needs to be told which."""
        c, turned, mask = self.config, None, None
        if masked or c.pos == "alibi":
            distance = at[:, None] - torch.arange(num_keys, device=at.device)  # (T, S)
            mask = distance >= 0
        if c.pos == "alibi":
            penalty = alibi_slopes(c.n_head, at.device)[:, None, None] * distance
            mask = (-penalty).masked_fill(~mask, -math.inf)[None].to(self._product_dtype())
        if c.pos == "rope":
            turned = rotation(at, c.n_embd // c.n_head, c.rope_theta, c.rope_factor, c.rope_original_block_size)
        return Look(turned, mask)

    def _run_blocks(self, idx: torch.Tensor, at: torch.Tensor, look: Look, pasts: list[Past] | list[None],
                    run: Callable = Block.__call__) -> torch.Tensor:
        """Tokens (B, T) at positions `at` (T,) -> (B, T, C)."""
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(at)
        elif self.config.pos == "sinusoidal":
            x = x + sinusoids(at, self.config.n_embd).to(x.dtype)
        x = self.drop(x)
        for block, past in zip(self.h, pasts):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, look, use_reentrant=False)
            else:
                x = run(block, x, look, past)
        return self.ln_f(x)

    def crop_block_size(self, block_size: int) -> None:
        limit = self.config.max_positions
        if block_size < 1 or (limit and block_size > limit):
            raise ValueError(f"block_size={block_size}: the model has {self.config.block_size} positions, no more")
        self.config.block_size = block_size
        if self.wpe is not None:
            self.wpe = nn.Embedding.from_pretrained(self.wpe.weight[:block_size].detach().clone(), freeze=False)

    def make_cache(self, batch_size: int, num_tokens: int) -> KVCache:
        """On the model's device, in the type that its keys and values will have."""
        limit = self.config.max_positions
        return KVCache(self.config, batch_size, min(num_tokens, limit) if limit else num_tokens, self.head.device,
                       self._product_dtype())

    def _next_logits(self, idx: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        if cache is None or idx.size(1) > 1 or not (self.compile_decoding or idx.is_cuda):
            return super()._next_logits(idx, cache)
        if cache.decoder is None:
            cache.decoder = Decoder(self, cache)
        return cache.decoder.step(idx)


class Decoder:
    """The step that reads one token a row and gives the logits of the next, with shapes and addresses that never
    change: so it can be compiled once and, on CUDA, recorded as a graph that a single launch replays.

    Attention goes over all positions of the cache, and a mask leaves out those that are not filled."""

    def __init__(self, model: GPT, cache: KVCache):
        # The cache holds its decoder: in a circle both would keep their GPU memory until Python looks for such.
        self.model, self.cache = model, weakref.proxy(cache)
        self._check_room()
        device = cache.k.device
        self.token = torch.zeros(cache.k.size(1), 1, dtype=torch.long, device=device)
        self.at = torch.full((1,), cache.length, dtype=torch.long, device=device)
        self.run = Block.forward
        if model.compile_decoding:
            compiled = torch.compile(Block.forward)
            try:
                self.run = compiled
                self._logits()
            except Exception as error:  # whatever the compiler trips over
                warnings.warn(f"torch.compile failed, going on without it: {error}", stacklevel=2)
                self.run = Block.forward
        self.graph = None
        # Not under autocast: it keeps copies of the weights for as long as its block, and a recording for good.
        if device.type == "cuda" and not torch.is_autocast_enabled("cuda"):
            # When a recording breaks off torch leaves its stream the current one, and older versions draw no random
            # numbers from then on: both are put back.
            generator = torch.cuda.default_generators[device.index]
            random_state = generator.clone_state()
            try:
                with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):
                    self._record()
            except RuntimeError as error:  # an operation that cannot be recorded, or no memory for the recording
                warnings.warn(f"recording a CUDA graph failed, going on without it: {error}", stacklevel=2)
                self.graph = None
                generator.graphsafe_set_state(random_state)

    def _check_room(self) -> None:
        if self.cache.length == self.cache.capacity:
            raise ValueError(f"the cache is full: it has room for {self.cache.capacity} positions")

    def _logits(self) -> torch.Tensor:
        look = self.model._look(self.at, self.cache.capacity, masked=True)
        pasts = self.cache.layers(self.at, self.cache.capacity)
        return self.model._logits(self.model._run_blocks(self.token, self.at, look, pasts, self.run)[:, -1])

    def _record(self) -> None:
        """See torch's notes on CUDA graphs: a few runs on a side stream, then the recording. What they write into the
        cache, at the position of the token that is about to be read, that token's step writes over."""
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
        """Tokens (B, 1), which stand behind those in the cache, -> logits (B, V) of the next."""
        self._check_room()
        self.token.copy_(token)
        self.at.fill_(self.cache.length)
        self.cache.length += 1
        if self.graph is None:
            return self._logits()
        self.graph.replay()
        return self.logits.clone()  # the next replay writes over it
