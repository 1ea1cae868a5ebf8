"""The optimiser: parameter groups, AdamW, the learning rate as a pure function of the step, and which steps are bad.

Owns everything between gradients and new weights except the gradients' reduction (parallel.py) and the order of a
step (train.py). State lives in torch's optimizer alone and is keyed by parameter name on disk, so that it does not
depend on the order of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from flatgpt.options import failed_rules
from flatgpt.training import muon
from flatgpt.training.distributed import Job


@dataclass
class OptimConfig:
    """Optimiser and learning rate"""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the blocks' matrices, and AdamW on the rest
    learning_rate: float = 6e-4  # the highest learning rate of AdamW
    embed_lr: float = 0.0  # the highest learning rate of tables, tied head among them; 0 = learning_rate
    muon_lr: float = 0.02  # the highest learning rate of Muon's matrices; warm-up and decay are AdamW's in proportion
    weight_decay: float = 1e-1  # times its learning rate (muon_lr on Muon's), on tensors of two or more dimensions only
    beta1: float = 0.9  # decay of AdamW's mean of gradients, a step
    beta2: float = 0.95  # decay of AdamW's mean of squared gradients, a step
    muon_momentum: float = 0.95  # decay of Muon's mean of gradients, a step (Nesterov)
    muon_beta2: float = 0.0  # decay of Muon's mean of squares of a row, a step (NorMuon); 0 = rows as they are
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    decay_lr: bool = True  # warm up, then follow the schedule; False = learning_rate throughout
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # decay after warm-up; wsd: stay, then linear
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 600000  # step at which min_lr is reached; usually max_iters
    decay_fraction: float = 0.2  # the last part of lr_decay_iters, in which wsd decays
    min_lr: float = 6e-5  # learning rate at the end of the decay; usually learning_rate / 10
    width_base: int = 0  # n_embd that the rates were chosen at: they and the initial weights follow from it; 0 = off
    spike_sigma: float = 0.0  # skip an update if its gradient norm is this many deviations above normal; 0 = never
    max_bad_steps: int = 10  # skipped updates in a row after which the run goes back to its last good checkpoint

    def validate(self) -> list[str]:
        faults = failed_rules(
            self, ("learning_rate", self.learning_rate > 0, "positive"), ("muon_lr", self.muon_lr > 0, "positive"),
            ("embed_lr", self.embed_lr >= 0, "0 or more"), ("min_lr", self.min_lr >= 0, "0 or more"),
            ("beta1", 0 <= self.beta1 < 1, "at least 0 and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1"),
            ("muon_momentum", 0 <= self.muon_momentum < 1, "at least 0 and below 1"),
            ("muon_beta2", 0 <= self.muon_beta2 < 1, "at least 0 and below 1"),
            ("decay_fraction", 0 < self.decay_fraction <= 1, "above 0 and at most 1"),
            ("grad_clip", self.grad_clip >= 0, "0 or more"), ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("width_base", self.width_base >= 0, "0 or more"), ("spike_sigma", self.spike_sigma >= 0, "0 or more"),
            ("max_bad_steps", self.max_bad_steps > 0, "positive"))
        if self.schedule != "cosine" and not self.decay_lr:
            faults.append(f"schedule={self.schedule} needs decay_lr=True; decay_lr=False is learning_rate throughout")
        return faults


def width_ratio(n_embd: int, config: OptimConfig) -> float:
    """How many times as wide a model is as the one that its learning rates were chosen for."""
    return n_embd / config.width_base if config.width_base else 1.0


def learning_rate(step: int, config: OptimConfig) -> float:
    """AdamW's, of the update after `step` updates: linear warm-up, then down to min_lr as `schedule` says. The cosine
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
        begin = max(begin, round(config.lr_decay_iters * (1 - config.decay_fraction)))
    if step < begin:
        return config.learning_rate
    progress = (step - begin) / (config.lr_decay_iters - begin)
    height = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr + height * (config.learning_rate - config.min_lr)


def decay_from(step: int, max_iters: int, config: OptimConfig, given: Collection[str]) -> None:
    """Have a branch that is told to decay (wsd) do so from its first step to its last, as far as the keys `given` do
    not say otherwise."""
    if config.schedule != "wsd" or "schedule" not in given:
        return
    if "lr_decay_iters" not in given:
        config.lr_decay_iters = max_iters
    if "decay_fraction" not in given and config.lr_decay_iters > step:
        config.decay_fraction = 1 - step / config.lr_decay_iters


def schedule_warnings(config: OptimConfig, max_iters: int) -> Iterator[str]:
    """Warnings about learning-rate options that make no sense in a run of max_iters steps."""
    c = config
    if not c.decay_lr or not max_iters:
        return
    if max_iters <= c.warmup_iters:
        yield (f"the learning rate rises for {c.warmup_iters:,} steps, but the run has only {max_iters:,}: it will "
               "learn almost nothing; lower --warmup_iters")
    if c.schedule == "constant":
        return
    if c.min_lr > c.learning_rate:
        yield (f"the learning rate will rise instead of decay: min_lr={c.min_lr:g} is above "
               f"learning_rate={c.learning_rate:g}; lower it, say --min_lr={c.learning_rate / 10:g}")
    if c.lr_decay_iters <= c.warmup_iters < max_iters:
        yield (f"the learning rate falls to min_lr={c.min_lr:g} at once after the warm-up: lr_decay_iters="
               f"{c.lr_decay_iters:,} is not above warmup_iters={c.warmup_iters:,}; raise it, say "
               f"--lr_decay_iters={max_iters}")
    elif not c.min_lr and c.lr_decay_iters < max_iters:
        yield (f"the last {max_iters - c.lr_decay_iters:,} steps learn nothing: the learning rate is 0 from step "
               f"{c.lr_decay_iters:,} on; set --min_lr above 0, or --lr_decay_iters={max_iters}")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set AdamW's learning rate, and Muon's in proportion to it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


@dataclass
class SpikeDetector:
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
    """torch's, without its notes to torch.compile: each of them imports the compiler, which takes a second and 70 MB of
    every process, and nothing here compiles an optimiser. torch has no public switch for that."""

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)


def build_optimizer(model: nn.Module, config: OptimConfig, job: Job | None = None) -> torch.optim.Optimizer:
    """AdamW in one fused kernel a group; matrices and tables decay, norms and biases do not. With Muon, which decays
    all that it has, AdamW keeps what is not in `muon_params`. `job`: the ranks that share Muon's work; None: no others.

    With a width_base AdamW moves matrices that read all channels the less, the more there are, and lets them decay as
    fast (muP, arXiv:2203.03466); the size of Muon's updates follows from the shape of a matrix anyway."""
    muons = muon_params(model) if config.optimizer == "muon" else {}
    ratio = width_ratio(model.config.n_embd, config)
    gain = "ln_f." if model.lm_head is None else "lm_head."  # of the logits: see GPT.init_weights
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by learning rate and decay
    for name, p in model.named_parameters():
        if p not in muons:
            lr = config.embed_lr if p in tables and config.embed_lr else config.learning_rate
            decay = config.weight_decay if p.dim() >= 2 else 0.0
            is_scaled = (name.startswith("h.") and p.dim() >= 2) or name.startswith(gain)
            groups.setdefault((lr / ratio, decay * ratio) if is_scaled else (lr, decay), []).append(p)
    groups = [{"params": params, "lr": lr, "lr_ratio": lr / config.learning_rate, "weight_decay": decay}
              for (lr, decay), params in groups.items()]
    device = next(model.parameters()).device
    adamw = AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                  fused=device.type in ("cuda", "cpu"))
    if config.optimizer == "adamw":
        return adamw
    group = {"params": list(muons), "lr": config.muon_lr, "weight_decay": config.weight_decay,
             "momentum": config.muon_momentum, "beta2": config.muon_beta2,
             "lr_ratio": config.muon_lr / config.learning_rate}
    return muon.MuonAndAdamW(group, muons, adamw, job or Job(0, 1, device, torch.float32))


def muon_params(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """The matrices between embedding and head, which are 2-D and neither a table that is looked up nor named lm_head;
    of each the numbers of rows of those that it fuses: queries, keys and values, the gates of swiglu or of an LSTM."""
    found = {}
    for name, owner in model.named_modules():
        for p in owner.parameters(recurse=False):
            if p.dim() == 2 and not isinstance(owner, nn.Embedding) and name != "lm_head":
                width = owner.hidden_size if isinstance(owner, nn.RNNBase) else p.size(0)
                found[p] = getattr(owner, "widths", [width] * (p.size(0) // width))
    return found


def version(config: OptimConfig) -> dict[str, int]:
    """What a checkpoint records of how the updates are computed; a resumed run says when that has changed."""
    return {"muon_version": muon.VERSION} if config.optimizer == "muon" else {}


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimiser's tensors under names like `exp_avg.h.0.attn.c_attn.weight`; the live ones, not copies."""
    return {f"{key}.{name}": value for name, p in model.named_parameters()
            for key, value in optimizer.state[p].items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, torch.Tensor] | None,
                         place: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """The inverse of `optimizer_state`, from whole tensors; None on a rank to which another one sends them.

    `place(value, p)` lays a whole tensor out as parameter p is (parallel.from_rank0). Raises ValueError when a
    parameter's state is missing or misshapen.
    """
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        group = group_of[p]
        wanted = {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        if "momentum" in group:  # Muon's
            wanted = {"momentum_buffer": p.shape}
            if group["beta2"]:
                wanted["row_squares"] = torch.Size([p.size(0), 1])
        for key, shape in wanted.items():
            value = torch.zeros(shape) if state is None else state.get(f"{key}.{name}")
            if value is None or value.shape != shape:
                raise ValueError(f"the optimiser's {key} of {name} is missing or not of shape {tuple(shape)}")
            device = p.device if key != "step" or group["fused"] else torch.device("cpu")
            optimizer.state[p][key] = place(value.to(device, copy=True), p)
