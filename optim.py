"""The optimiser: parameter groups, AdamW, and the learning rate as a pure function of the step.

Owns everything between gradients and new weights except the gradients' reduction (distributed.py) and the order of a
step (train.py). State lives in torch's optimizer alone and is keyed by parameter name on disk, so that it does not
depend on the order of groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn


@dataclass
class OptimConfig:
    """AdamW and learning rate"""

    learning_rate: float = 6e-4  # the highest learning rate
    weight_decay: float = 1e-1  # on tensors of two or more dimensions only
    beta1: float = 0.9  # decay of AdamW's mean of gradients, a step
    beta2: float = 0.95  # decay of AdamW's mean of squared gradients, a step
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    decay_lr: bool = True  # warm up and decay; False = learning_rate throughout
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 600000  # step at which min_lr is reached; usually max_iters
    min_lr: float = 6e-5  # learning rate at the end of the decay; usually learning_rate / 10


def learning_rate(step: int, config: OptimConfig) -> float:
    """Of the update after `step` updates: linear warm-up, then a cosine down to min_lr (nanoGPT's curve)."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    progress = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel a group; matrices and tables decay, norms and biases do not."""
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    fused = params[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimiser's tensors under names like `exp_avg.h.0.attn.c_attn.weight`; the live ones, not copies."""
    return {f"{key}.{name}": value for name, p in model.named_parameters()
            for key, value in optimizer.state[p].items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module,
                         state: Mapping[str, torch.Tensor] | None) -> None:
    """The inverse of `optimizer_state`; None makes room for a state that another rank will send.

    Raises ValueError when a parameter's state is missing or misshapen.
    """
    for name, p in model.named_parameters():
        wanted = {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        for key, shape in wanted.items():
            value = torch.zeros(shape) if state is None else state.get(f"{key}.{name}")
            if value is None or value.shape != shape:
                raise ValueError(f"the optimiser's {key} of {name} is missing or not of shape {tuple(shape)}")
            device = p.device if key != "step" or optimizer.defaults["fused"] else torch.device("cpu")
            optimizer.state[p][key] = value.to(device, copy=True)
