"""Code that saves memory or time and changes no result: the head with its loss, and the MLP's second half.

Owns two autograd functions, the activations, and the sizes of the chunks. It knows tensors and layers, but no model.

Letters: as in model.py; F is the width of what an activation reads.

Invariants:
- The logits of a training batch never exist as a whole (LinearCrossEntropy).
- Softmax and loss are float32, whatever number type the matrix products have.
- Columns of logits from vocab_size on are padding: they take no part in the softmax and their weights get no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

LOGITS_CHUNK_BYTES = 2**27  # of logits at a time; each chunk costs a pass over the gradient of the head
LOGITS_CHUNK_BYTES_CUDA = 2**30  # a GPU wants larger products: 8,192 rows of GPT-2's in 16 bits
SOFTMAX_ELEMENTS = 2**22  # of these at a time on a CPU: what its last-level cache holds in float32


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """(..., hidden) -> (..., hidden). swiglu takes (..., 2 hidden), the gates and what they let through (Shazeer 2020,
    arXiv:2002.05202). relu2 is from So et al. (2021, arXiv:2109.08668)."""
    return {"gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"), "relu": F.relu,
            "relu2": lambda h: F.relu(h).square(),
            "swiglu": swiglu}[name]


def swiglu(h: torch.Tensor) -> torch.Tensor:
    gates, values = h.chunk(2, dim=-1)  # once: a compiler would make the gradient of each chunk whole, and add them
    return F.silu(gates) * values


def activated_linear(h: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor], layer: nn.Linear) -> torch.Tensor:
    """layer(act(h)) that does not keep act(h) for the backward pass."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler chooses what it keeps
        return layer(act(h))
    return ActivatedLinear.apply(h, layer.weight, layer.bias, act)


class ActivatedLinear(torch.autograd.Function):
    """F.linear(act(h), weight, bias) that keeps only h for its backward pass and recomputes act(h) there. This saves a
    quarter of what a block would keep, and takes hardly any time."""

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


class ChunkLoss(nn.Module):
    """Summed cross-entropy of a chunk of logits, which it overwrites with their gradient. These are many passes over
    the largest tensor of a step, so train.py compiles this module, as it does the blocks."""

    def forward(self, logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, want_grad: bool) -> torch.Tensor:
        """logits (n, rows >= V), written over, targets (n, 1) with -1 for "ignore" -> float32 scalar."""
        z = logits.float()  # a copy, unless the logits are float32
        z[:, vocab_size:] = -math.inf
        valid, index = targets >= 0, targets.clamp(min=0)
        largest, of_target = z.amax(dim=1, keepdim=True), z.gather(1, index)
        total = z.sub_(largest).exp_().sum(dim=1, keepdim=True)
        if want_grad:  # the softmax, minus one at the target; zero where the target is ignored
            z.mul_(valid / total)
            if torch.compiler.is_compiling():  # this is fused; scatter_add_ would have z written to memory
                z -= (torch.arange(z.size(1), device=z.device) == targets).float()
            else:  # by itself the comparison takes as long as all the rest
                z.scatter_add_(1, index, -valid.float())
            logits.copy_(z)
        return ((largest + total.log() - of_target) * valid).sum()


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (n, m), float32, += a (n, k) @ b (k, m), which both have the number type of matrix products."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda and torch.__version__ >= (2, 11):  # earlier versions want `total` in the number type of a
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `x @ weight.T` against targets, in chunks of rows.

    The logits of a batch, (N, V) in float32, would be the largest tensor of a step. Here only a chunk of them exists at
    a time. The softmax of a chunk is all that its gradient needs, so the forward pass computes the gradients of x and
    weight as well, and the backward pass only scales them. The gradient of the weight is summed in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, dtype, want_grad, chunk_loss):
        """x (N, C), weight (rows >= V, C), targets (N,) with -1 for "ignore" -> float32 scalar. The matrix products
        have number type `dtype`; chunk_loss is a ChunkLoss, compiled or not."""
        x_all, w = x.to(dtype), weight.to(dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if want_grad else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if want_grad else None
        rows = chunk_rows(weight.size(0), w.element_size(), x.is_cuda)
        # Only a CPU takes a chunk in parts: MPS adds nothing to a part that does not begin a tensor (pytorch 163327).
        part = part_rows(weight.size(0)) if x.device.type == "cpu" else rows
        for x_c, t_c, start in zip(x_all.split(rows), targets.unsqueeze(1).split(rows), range(0, x.size(0), rows)):
            logits = x_c @ w.t()  # (n, rows of w)
            for z, t in zip(logits.split(part), t_c.split(part)):
                loss += chunk_loss(z, t, vocab_size, want_grad)
            if want_grad:  # chunk_loss has overwritten the logits with their gradient
                dx[start:start + rows] = logits @ w
                add_product(dw, logits.t(), x_c)
        ctx.grads = dx, dw
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.grads
        ctx.grads = None  # they are scaled in place below, so they serve one backward pass
        return dx.mul_(grad), dw.mul_(grad), None, None, None, None, None


def chunk_rows(width: int, itemsize: int, on_cuda: bool) -> int:
    """How many rows of logits, `width` numbers of `itemsize` bytes each, are made at a time."""
    return _power_of_two((LOGITS_CHUNK_BYTES_CUDA if on_cuda else LOGITS_CHUNK_BYTES) // (itemsize * width))


def part_rows(width: int) -> int:
    """How many of them a CPU takes the softmax of at a time."""
    return _power_of_two(SOFTMAX_ELEMENTS // width)


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n, and at least 1. block_size mostly is one, so all chunks then have the
    same shape."""
    return 2 ** (max(1, n).bit_length() - 1)
