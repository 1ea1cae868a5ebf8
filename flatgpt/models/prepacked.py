"""Linear layers for a model that only generates, with their matrices in the order in which oneDNN reads them.

A product of one row, or of a few, takes as long as it takes to read the matrix. From a checkpoint's order oneDNN
reorders a part of the matrix at each product, and MKL's kernels for few rows are slow on some processors. Reordered
once, matrices are read up to two or three times as fast (BENCHMARKS.md).

Letters: as in model.py; F is the number of channels that a layer gives.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from flatgpt.models.language_model import LanguageModel


class PrepackedLinear(nn.Module):
    """nn.Linear without gradients: (..., C) -> (..., F). Its two operations are those that torch's compiler uses for
    frozen weights. They have no public names, and what does, torch.utils.mkldnn, is slow in bfloat16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        """weight (F, C), bias (F,). Raises RuntimeError for a number type that the processor has no kernels for."""
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)  # for one row; it serves any number
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@torch.no_grad()
def prepack(model: LanguageModel) -> None:
    """Replace a model's linear layers in place by prepacked ones, on a CPU that has kernels for them. From then on the
    model only computes logits, under torch.no_grad: it cannot be trained, saved, moved or compiled. A table of tokens
    that is also the head stays, and its prepacked copy becomes the head."""
    if (model.head.device.type != "cpu" or not torch.backends.mkldnn.is_available()
            or model.config.model == "bigram"):  # which has no products
        return
    try:
        model.lm_head = PrepackedLinear(model.head, None)
    except RuntimeError:  # no kernels for this number type
        return
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, PrepackedLinear(layer.weight, layer.bias))
