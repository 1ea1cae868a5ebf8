"""Attention: softmax(q k^T / sqrt(D)) v, by the kernel that fits, and what says which keys a query sees.

Owns the choice of a kernel. It does not know a model or its configuration: GPT.attention_context in model.py says what
a query sees, and positions.py has the formulas of positions.

Letters: as in model.py.

Invariant: all kernels compute the same. On a CPU, and with backend="math", a mask says which keys a query sees: that is
the definition, to which the tests hold the others.
"""

from __future__ import annotations

import inspect
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

AttentionBackend = Literal["sdpa", "math", "flash3"]  # torch's fused kernels; the formula; FlashAttention-3 (Hopper)


class Documents(NamedTuple):
    """Which documents a batch holds. Attention and positions stay within them."""

    positions: torch.Tensor  # (B, T) of each token in its document. A document begins with 0, and so does each row
    limit: int  # there are at most so many in the batch. A kernel is compiled for this number

    def cu_seqlens(self) -> torch.Tensor:
        """(limit + 1,) int32: the row of B * T at which each document begins, and B * T. The last ones may be empty."""
        number = (self.positions == 0).flatten().cumsum(0)  # of each token's document, from 1 on
        return torch.searchsorted(number, torch.arange(1, self.limit + 2, device=number.device), out_int32=True)

    def share(self) -> torch.Tensor:
        """(B, T, T): whether two tokens of a row are in the same document."""
        number = (self.positions == 0).cumsum(1)
        return number[:, :, None] == number[:, None, :]


class VarlenMask(NamedTuple):
    """What B * T queries see, in the words of kernels for sequences of different lengths: those of the same sequence
    up to their own, of them the last `window`, or with 0 all."""

    cu_seqlens: torch.Tensor  # (N + 1,) int32: see Documents.cu_seqlens
    max_seqlen: int
    window: int


class AttentionContext(NamedTuple):
    """Where T queries stand and what they see. It is the same in all layers with the same window."""

    # The rotation of pos=rope: (T, D) each, or (B, T, D) where positions are those in documents.
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None
    mask: torch.Tensor | VarlenMask | None = None  # see `attend`


def has_varlen_kernel(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attend` takes a VarlenMask: FlashAttention's kernels do, in 16 bits on a GPU."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if backend == "sdpa":
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:  # torch 2.9
            return False
        return (head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)
                and {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys())
    return backend == "flash3"


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | VarlenMask | None, dropout: float,
           backend: AttentionBackend) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, for queries (B, H, T, D), keys and values (B, K, S, D) -> (B, H, T, D). Each head of
    keys and values serves H/K neighbouring heads of queries.

    A query sees the keys for which `mask` (1 or B, 1, T, S) is true, or numbers (1 or B, 1 or H, T, S) are added to its
    scores; a VarlenMask is for S = T without dropout, see has_varlen_kernel. Without a mask the T queries are the last
    of the S positions, each sees all keys up to its own, and T is S or 1."""
    (B, H, T, _), K = q.shape, k.size(1)
    if isinstance(mask, VarlenMask):
        return _varlen_attention(q, k, v, mask, backend)
    is_causal = mask is None and T > 1
    if backend == "flash3" and is_causal and not dropout and q.dtype != torch.float32:
        from flash_attn_interface import flash_attn_func

        y = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)  # its layout is (B, T, H, D)
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)
    if is_causal and backend != "math":
        has_grouped_kernel = q.device.type == "cpu" or (q.is_cuda and q.dtype == torch.bfloat16)
        if not has_grouped_kernel:  # enable_gqa would take a kernel that makes all scores
            k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True,
                                              enable_gqa=has_grouped_kernel and K < H)
    if is_causal:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device).tril()
    if K < H:  # the queries of all heads that share their keys: (B, K, H/K T, D)
        q = q.reshape(B, K, -1, q.size(3))
        if mask is not None:
            mask = mask.repeat(1, 1, H // K, 1) if mask.size(1) == 1 else mask.reshape(len(mask), K, q.size(2), -1)
    return _masked_attention(q, k, v, mask, dropout, backend).reshape(B, H, T, -1)


def _masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float,
                      backend: AttentionBackend) -> torch.Tensor:
    """As `attend`, for H = K, and a query sees all keys where there is no mask."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if backend != "math":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = (q / math.sqrt(q.size(3))) @ k.transpose(2, 3)  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


def _varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: VarlenMask,
                      backend: AttentionBackend) -> torch.Tensor:
    """As `attend`, by a kernel that takes the tokens of all documents one behind the other."""
    (B, H, T, _), K = q.shape, k.size(1)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # (B T, H or K, D)
    lengths = (mask.cu_seqlens, mask.cu_seqlens, mask.max_seqlen, mask.max_seqlen)
    window = (mask.window - 1, 0)  # how many keys before its own a query sees, -1 for all, and how many behind it
    if backend == "flash3":
        from flash_attn_interface import flash_attn_varlen_func

        y = flash_attn_varlen_func(*rows, *lengths, causal=True, window_size=window)
        y = y[0] if isinstance(y, tuple) else y
    else:
        from torch.nn.attention.varlen import varlen_attn

        y = varlen_attn(*rows, *lengths, window_size=window, enable_gqa=K < H)
    return y.view(B, T, H, -1).transpose(1, 2)
