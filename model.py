"""The GPT in one file: configuration, blocks, loss, cached generation.

The architecture is GPT-2's: learned positions, pre-norm blocks, one fused query-key-value projection, a head tied to
the token table. Parameters carry GPT-2's own names (wte, wpe, h.0.attn.c_attn, ..., ln_f), with the matrices of
nn.Linear, (out, in).

Letters: B sequences, T positions, C channels (n_embd), H heads, D channels a head, V vocabulary, N = B * T rows.

Invariants:
- The token table has `padded_vocab_size` rows (a multiple of 128, which matrix units like). Rows from vocab_size on are
  zero, get no gradient, take no part in the loss's softmax and never leave `forward` as logits.
- The logits of a training batch are never held whole: see LinearCrossEntropy.
- Nothing here knows about files, devices or processes; weights.py speaks other people's layouts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

VOCAB_MULTIPLE = 128
LOGITS_CHUNK_BYTES = 2**27  # of logits at a time; each chunk costs a pass over the head's gradient
LOGITS_CHUNK_BYTES_CUDA = 2**29  # a GPU wants larger products
SOFTMAX_ELEMENTS = 2**22  # of these at a time on a CPU: what its last cache holds in float32

Attention = Literal["sdpa", "math", "flash3"]  # torch's fused kernels; the formula; FlashAttention-3 (Hopper)


@dataclass
class GPTConfig:
    """Shape of the model"""

    block_size: int = 1024  # context length T, in tokens
    vocab_size: int = 50257  # vocabulary V, in tokens
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block; divides n_embd
    n_embd: int = 768  # channels C
    dropout: float = 0.0  # dropout probability; 0 for pretraining, 0.1 and up for small data or fine-tuning
    bias: bool = False  # biases in linear layers and norms (GPT-2 has them; without is a bit better and faster)
    mlp: Literal["gelu", "gelu_tanh"] = "gelu"  # activation: exact GELU (nanoGPT's) or its tanh form (OpenAI's GPT-2)
    norm_eps: float = 1e-5  # added to the variance in the norms

    def validate(self) -> None:
        """Raises ValueError, naming every bad value."""
        faults = [f"{key}={getattr(self, key)} must be positive"
                  for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd") if getattr(self, key) < 1]
        if not faults and self.n_embd % self.n_head:
            faults.append(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout={self.dropout} must be at least 0 and below 1")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Past(NamedTuple):
    """One layer's part of a KVCache, for T new positions."""

    k: torch.Tensor  # (B, H, S, D): the keys of S positions, those of the T new ones to be written
    v: torch.Tensor
    at: torch.Tensor  # (T,): where they are to be written
    mask: torch.Tensor | None  # (T, S), true where a query sees a key; None: see `attend`


class KVCache:
    """Keys and values of the positions read so far, (n_layer, B, H, block_size, D) each; `length` are filled.

    A prompt is read into it once, and continued any number of times: `prompt_logits` (B, V) are those behind it."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # no NaN where a mask says that nobody looks
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.prompt_logits: torch.Tensor | None = None
        self.decoder: Decoder | None = None  # of the model that reads with this cache, if it has one

    def layers(self, at: torch.Tensor, end: int, mask: torch.Tensor | None) -> list[Past]:
        """The first `end` positions, for new ones at `at`."""
        return [Past(k[:, :, :end], v[:, :, :end], at, mask) for k, v in zip(self.k, self.v)]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float,
           how: Attention) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, for queries (B, H, T, D), keys and values (B, H, S, D) -> (B, H, T, D).

    A query sees the keys for which `mask` (T, S) is true. Without a mask the T queries are the last T of the S
    positions and see all up to their own, for which T has to be S or 1."""
    is_causal = mask is None and q.size(2) > 1
    if how == "flash3" and is_causal and not dropout and q.dtype != torch.float32:
        from flash_attn_interface import flash_attn_func

        y = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)  # it wants (B, T, H, D)
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)
    if how != "math":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    scores = (q / math.sqrt(q.size(3))) @ k.transpose(2, 3)  # (B, H, T, S)
    if is_causal:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


class LayerNorm(nn.LayerNorm):
    """In the number type of its input, whatever the weights come in: FSDP hands out 16-bit ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and at those before it: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.how: Attention = "sdpa"

    def forward(self, x: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, T, 3, H, D) -> 3 x (B, H, T, D)
        mask = None
        if past is not None:
            k, v, mask = past.k.index_copy_(2, past.at, k), past.v.index_copy_(2, past.at, v), past.mask
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0, self.how)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class ActivatedLinear(torch.autograd.Function):
    """F.linear(act(h), weight, bias) that keeps h alone for its backward pass and makes act(h) again there: a quarter
    of what a block would keep, for hardly any time."""

    @staticmethod
    def forward(ctx, h, weight, bias, act):
        """h (B, T, F), weight (C, F), bias (C,) or None, act elementwise -> (B, T, C)"""
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
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU(approximate="tanh" if config.mlp == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.c_fc(x)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler knows to make act(h) again
            return self.dropout(self.c_proj(self.act(h)))
        return self.dropout(ActivatedLinear.apply(h, self.c_proj.weight, self.c_proj.bias, self.act))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). This is the unit that train.py compiles."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


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
        part = rows if x.is_cuda else _power_of_two(SOFTMAX_ELEMENTS // width)
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


def sampling_probs(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
                   top_p: float | None = None) -> torch.Tensor:
    """The distribution that a next token is drawn from: logits (B, V) -> probabilities (B, V), rows sum to one.

    Applied in this order: divide by `temperature` (0: all mass on the likeliest token), keep the `top_k` likeliest
    tokens, then keep the fewest likeliest of those that together hold at least `top_p` of the probability
    (Holtzman et al. 2019, arXiv:1904.09751). Of equal logits at a border the lower token id is kept.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or left out")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or left out")
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    logits = logits.float()
    largest = logits.max(dim=1, keepdim=True).values  # taken off, so that a tiny temperature cannot overflow
    if top_p is None:
        probs = ((logits - largest) / temperature).exp()
        if top_k is not None and top_k < logits.size(1):
            kth = logits.topk(top_k, dim=1).values[:, -1:]  # before any rounding could make new ties
            above, equal = logits > kth, logits == kth
            wanted = top_k - above.sum(dim=1, keepdim=True)  # so many of the equal ones, counted from the lowest id
            probs = probs.masked_fill(~(above | (equal & (equal.cumsum(dim=1) <= wanted))), 0.0)
        return probs / probs.sum(dim=1, keepdim=True)
    ordered, token = logits.sort(dim=1, descending=True, stable=True)  # before any rounding could make new ties
    probs = ((ordered[:, :top_k] - largest) / temperature).softmax(dim=1)  # (B, k), likeliest first
    if top_p is not None:
        before = probs.cumsum(dim=1) - probs  # mass of the likelier tokens: below top_p, this one is still needed
        probs = probs.masked_fill(before >= top_p, 0.0)
        probs = probs / probs.sum(dim=1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, token[:, :top_k], probs)


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token a row, (B, 1), from probabilities (B, V), each with one random number (torch.multinomial needs V)."""
    wide = probs.dtype if probs.device.type == "mps" else torch.float64  # MPS has no float64
    below = probs.to(wide).cumsum(dim=1)
    at = torch.rand(probs.size(0), 1, dtype=wide, device=probs.device, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, at, right=True).clamp(max=probs.size(1) - 1)  # never one of probability 0


class GPT(nn.Module):
    """A GPT-2. `GPT(GPTConfig())` is the 124M model, freshly initialised."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.activation_checkpointing = False  # keep only the blocks' inputs, and run them again in the backward pass
        self.compile_decoding = False  # compile the step that generates a token
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # tokens; also the output head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # positions
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.chunk_loss = ChunkLoss()
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
        self.wte.weight[self.config.vocab_size:] = 0.0

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters, padding rows aside; `non_embedding` leaves out the positions (the token table is the head)."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        total = sum(p.numel() for p in self.parameters()) - padding
        return total - self.wpe.weight.numel() if non_embedding else total

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                num_targets: torch.Tensor | int | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits (B, T, V) of tokens idx (B, T), or, with targets (B, T), the loss: (logits, None) or (None, loss).

        Targets of -1 are ignored. The loss, float32, is the summed cross-entropy divided by `num_targets`: by default
        the number of targets in this batch (a mean); a training step split over micro-batches and ranks passes the
        number in the whole of it. Raises ValueError when T exceeds block_size.
        """
        x = self._hidden(idx)
        if targets is None:
            return self._logits(x), None
        if num_targets is None:
            num_targets = (targets >= 0).sum().clamp(min=1)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        loss = LinearCrossEntropy.apply(x.flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size,
                                        dtype, torch.is_grad_enabled(), self.chunk_loss)
        return None, loss / num_targets

    def _hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Tokens (B, T), which stand behind those in the cache, -> normed output of the last block (B, T, C)."""
        start = cache.length if cache is not None else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} positions, but the model has learned only block_size={self.config.block_size}")
        at = torch.arange(start, end, device=idx.device)
        if cache is None:
            return self._run_blocks(idx, at, [None] * len(self.h))
        mask = torch.arange(end, device=idx.device) <= at[:, None] if start and len(at) > 1 else None
        cache.length = end
        return self._run_blocks(idx, at, cache.layers(at, end, mask))

    def _run_blocks(self, idx: torch.Tensor, at: torch.Tensor, pasts: list[Past] | list[None],
                    run: Callable = Block.__call__) -> torch.Tensor:
        """Tokens (B, T) at positions `at` (T,) -> (B, T, C)."""
        x = self.drop(self.wte(idx) + self.wpe(at))
        for block, past in zip(self.h, pasts):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = run(block, x, past)
        return self.ln_f(x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.wte.weight)[..., :self.config.vocab_size]

    def set_attention(self, how: Attention) -> None:
        for block in self.h:
            block.attn.how = how

    def compiled_parts(self) -> list[nn.Module]:
        """What is worth compiling, part by part: the blocks are alike, so that one of them is compiled for all."""
        return [*self.h, self.chunk_loss]

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context in place, e.g. to fine-tune a model of 1,024 positions on windows of 256."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: the model has {self.config.block_size} positions, no more")
        self.config.block_size = block_size
        self.wpe = nn.Embedding.from_pretrained(self.wpe.weight[:block_size].detach().clone(), freeze=False)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, generator: torch.Generator | None = None,
                 use_cache: bool = True) -> torch.Tensor:
        """Continue each row of idx (B, T >= 1) by `max_new_tokens` tokens: (B, T + max_new_tokens). See `stream`."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, generator, use_cache)
        return torch.cat([idx, *(token.unsqueeze(1) for token in tokens)], dim=1)

    def make_cache(self, batch_size: int) -> KVCache:
        """An empty cache on the model's device, in the type that its keys and values will have."""
        device = self.wte.weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.wte.weight.dtype
        return KVCache(self.config, batch_size, device, dtype)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, generator: torch.Generator | None = None, use_cache: bool = True,
               cache: KVCache | None = None) -> Iterator[torch.Tensor]:
        """Yield the next tokens of each row, (B,) at a time; `sampling_probs` says what the options do.

        The window starts as the last block_size tokens of the prompt. When it is full, its last block_size // 2
        tokens are read again as a fresh window, which keeps the cost of a token bounded; `use_cache=False` recomputes
        every position for every token, and gives the same tokens. A `cache` that an earlier call with the same prompt
        has used spares reading the prompt again.
        """
        if idx.size(1) == 0:
            raise ValueError("the prompt is empty: generation needs at least one token to start from")
        limit = self.config.block_size
        if use_cache and cache is None:
            cache = self.make_cache(idx.size(0))
        training = self.training
        self.eval()
        try:
            window = unread = idx[:, -limit:]
            logits = None
            if use_cache:
                logits, cache.length = cache.prompt_logits, 0 if cache.prompt_logits is None else window.size(1)
            for step in range(max_new_tokens):
                if step or logits is None:
                    logits = self._next_logits(unread, cache)
                if use_cache and step == 0:
                    cache.prompt_logits = logits
                token = draw(sampling_probs(logits, temperature, top_k, top_p), generator)  # (B, 1)
                yield token.squeeze(1)
                window = torch.cat([window, token], dim=1)
                unread = token if use_cache else window
                if window.size(1) > limit:
                    window = unread = window[:, -max(1, limit // 2):]
                    if use_cache:
                        cache.length, cache.prompt_logits = 0, None  # the prompt is written over
        finally:
            self.train(training)

    def _next_logits(self, idx: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """Of the token behind idx (B, T), which stand behind those in the cache: (B, V)."""
        if cache is None or idx.size(1) > 1 or not (self.compile_decoding or idx.is_cuda):
            return self._logits(self._hidden(idx, cache)[:, -1])
        if cache.decoder is None:
            cache.decoder = Decoder(self, cache)
        return cache.decoder.step(idx)

    @classmethod
    def from_pretrained(cls, source: str, **overrides) -> GPT:
        """Load a GPT-2: a hub id (`gpt2` ... `gpt2-xl`, `owner/name`), a Hugging Face folder, a checkpoint or run
        folder, or nanoGPT's ckpt.pt. `overrides` replace fields of the configuration that do not change the weights'
        shapes (dropout). Raises ValueError or OSError in words for a user."""
        from weights import load_pretrained

        config, state = load_pretrained(source)
        for key, value in overrides.items():
            setattr(config, key, value)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder: str, eot_id: int | None = None) -> None:
        """Write a Hugging Face model folder: config.json, generation_config.json, model.safetensors."""
        from weights import save_pretrained

        save_pretrained(self.config, self.state_dict(), folder, eot_id)


class Decoder:
    """The step that reads one token a row and gives the logits of the next, with shapes and addresses that never
    change: so it can be compiled once and, on CUDA, recorded as a graph that a single launch replays.

    Attention goes over all positions of the cache, and a mask leaves out those that are not filled."""

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache = model, cache
        device = cache.k.device
        self.token = torch.zeros(cache.k.size(1), 1, dtype=torch.long, device=device)
        self.at = torch.full((1,), cache.length, dtype=torch.long, device=device)
        self.positions = torch.arange(cache.k.size(3), device=device)
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
        if device.type == "cuda" and not torch.is_autocast_enabled("cuda"):
            self._record()

    def _logits(self) -> torch.Tensor:
        pasts = self.cache.layers(self.at, len(self.positions), self.positions <= self.at[:, None])
        return self.model._logits(self.model._run_blocks(self.token, self.at, pasts, self.run)[:, -1])

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
        if self.cache.length == len(self.positions):
            raise ValueError(f"the cache is full: {self.cache.length} positions")
        self.token.copy_(token)
        self.at.fill_(self.cache.length)
        self.cache.length += 1
        if self.graph is None:
            return self._logits()
        self.graph.replay()
        return self.logits.clone()  # the next replay writes over it
