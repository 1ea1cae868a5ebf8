"""The optimiser: parameter groups, AdamW, the learning rate as a pure function of the step, and which steps are bad.

Owns everything between gradients and new weights except the gradients' reduction (distributed.py) and the order of a
step (train.py). State lives in torch's optimizer alone and is keyed by parameter name on disk, so that it does not
depend on the order of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

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
    decay_lr: bool = True  # warm up, then follow the schedule; False = learning_rate throughout
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # after the warm-up; wsd: stay, then linear
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 600000  # step at which min_lr is reached; usually max_iters
    decay_fraction: float = 0.2  # the last part of lr_decay_iters, in which wsd decays
    min_lr: float = 6e-5  # learning rate at the end of the decay; usually learning_rate / 10
    spike_sigma: float = 0.0  # skip an update whose gradient norm is so many deviations above the usual; 0 = never
    max_bad_steps: int = 10  # skipped updates in a row after which the run goes back to its last good checkpoint


def learning_rate(step: int, config: OptimConfig) -> float:
    """Of the update after `step` updates: linear warm-up, then down to min_lr as `schedule` says. The cosine
    is nanoGPT's; wsd (warm-up, stable, decay) is arXiv:2404.06395's with a linear decay."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return config.learning_rate
    if step >= config.lr_decay_iters:
        return config.min_lr
    begin = config.warmup_iters
    if config.schedule == "wsd":
        begin = max(begin, config.lr_decay_iters * (1 - config.decay_fraction))
    if step < begin:
        return config.learning_rate
    progress = (step - begin) / (config.lr_decay_iters - begin)
    height = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr + height * (config.learning_rate - config.min_lr)


@dataclass
class StepJudge:
    """Tells bad steps, whose update is skipped, from good ones, and learns from these what is usual.

    The usual is a running mean and variance of log(gradient norm), over about the last 100 good steps."""

    num_steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def fault(self, loss: float, norm: float, spike_sigma: float) -> str:
        """What is wrong with a step, "" if nothing: a loss or norm that is not finite, or, once 50 steps have been
        seen, a norm `spike_sigma` deviations above the usual (0: never)."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        above = math.log(max(norm, 1e-30)) - self.mean
        deviation = max(math.sqrt(self.variance), 0.05)  # in an even run a ripple is no spike
        if spike_sigma and self.num_steps >= 50 and above > spike_sigma * deviation:
            return f"the gradient norm {norm:.3g} is {above / deviation:.1f} deviations above the usual"
        self.num_steps += 1
        weight = max(1 / self.num_steps, 0.01)
        self.mean += weight * above
        self.variance = (1 - weight) * (self.variance + weight * above**2)
        return ""


class AdamW(torch.optim.AdamW):
    """torch's, without the wrappers that tell torch.compile to keep out of it: they import the compiler, a second of
    every start, and nothing here compiles an optimiser."""

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel a group; matrices and tables decay, norms and biases do not."""
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    fused = params[0].device.type in ("cuda", "cpu")
    return AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimiser's tensors under names like `exp_avg.h.0.attn.c_attn.weight`; the live ones, not copies."""
    return {f"{key}.{name}": value for name, p in model.named_parameters()
            for key, value in optimizer.state[p].items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, torch.Tensor] | None,
                         place: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """The inverse of `optimizer_state`, from whole tensors; None on a rank to which another one sends them.

    `place(value, p)` lays a whole tensor out as parameter p is (distributed.from_rank0). Raises ValueError when a
    parameter's state is missing or misshapen.
    """
    for name, p in model.named_parameters():
        wanted = {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        for key, shape in wanted.items():
            value = torch.zeros(shape) if state is None else state.get(f"{key}.{name}")
            if value is None or value.shape != shape:
                raise ValueError(f"the optimiser's {key} of {name} is missing or not of shape {tuple(shape)}")
            device = p.device if key != "step" or optimizer.defaults["fused"] else torch.device("cpu")
            optimizer.state[p][key] = place(value.to(device, copy=True), p)
