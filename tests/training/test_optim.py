"""optim.py against torch's own AdamW, and learning-rate tables worked by hand. (Muon's updates: test_muon.py.)"""

import math
import random
import re
import statistics

import numpy as np
import pytest
import torch

from flatgpt.models.baselines import build
from flatgpt.training.optim import (
    OptimConfig,
    SpikeDetector,
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    muon_params,
    optimizer_state,
    schedule_warnings,
    set_learning_rate,
    width_ratio,
)
from model import GPT, GPTConfig

OPTIMIZERS = pytest.mark.parametrize("name", ["adamw", "muon"])
MATRICES = {f"h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, bias=True))


@pytest.mark.parametrize(("schedule", "table"), [
    ("cosine", {9: 0.55, 6: 0.55 + 0.45 * math.cos(math.pi / 5), 14: 0.1, 1000: 0.1}),  # half-way: the mean of 1.0, 0.1
    ("linear", {5: 0.91, 9: 0.55, 13: 0.19, 14: 0.1, 1000: 0.1}),  # 0.09 a step
    ("wsd", {5: 1.0, 8: 1.0, 9: 0.85, 11: 0.55, 13: 0.25, 14: 0.1, 1000: 0.1}),  # from 14 - 3/7 x 14 = 8 on
    ("constant", {9: 1.0, 14: 1.0, 1000: 1.0})])
def test_learning_rate_follows_the_table(schedule, table):
    config = OptimConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=14, schedule=schedule,
                         decay_fraction=3 / 7)
    warmup = {0: 1.0 / 5, 1: 2.0 / 5, 3: 4.0 / 5, 4: 1.0}  # (step + 1) / (warmup_iters + 1), then the top
    for step, lr in (warmup | table).items():
        assert learning_rate(step, config) == pytest.approx(lr), step


def test_without_decay_the_learning_rate_stays():
    assert learning_rate(7, OptimConfig(learning_rate=0.3, decay_lr=False)) == 0.3


def test_wsd_that_decays_from_the_warm_up_on_is_linear():
    wsd, linear = (OptimConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=14, schedule=schedule,
                               decay_fraction=1.0) for schedule in ("wsd", "linear"))
    assert all(learning_rate(step, wsd) == learning_rate(step, linear) for step in range(16))


@OPTIMIZERS
def test_only_matrices_and_tables_decay(name):
    model = make_model()
    groups = build_optimizer(model, OptimConfig(optimizer=name, weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if name.endswith("bias") or "ln_" in name else 0.1), name


def test_muon_gets_the_blocks_matrices():
    model = make_model()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))
    steps(model, optimizer, 1)
    theirs = {name for name, p in model.named_parameters() if optimizer.state[p].keys() == {"momentum_buffer"}}
    assert theirs == MATRICES
    for name, p in model.named_parameters():
        assert name in theirs or optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_muon_leaves_tables_and_the_head_of_a_model_without_blocks():
    model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(5, 4), "fc": torch.nn.Linear(4, 6),
                                 "lm_head": torch.nn.Linear(6, 5, bias=False), "h": torch.nn.ModuleList()})
    assert muon_params(model) == {model["fc"].weight: [6]}
    model = build(GPTConfig(model="bigram", vocab_size=5))
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))  # with nothing for it
    steps(model, optimizer, 1)
    assert all("exp_avg" in optimizer.state[p] for p in model.parameters())


def test_both_learning_rates_follow_one_curve():
    config = OptimConfig(optimizer="muon", learning_rate=1e-3, muon_lr=0.05, min_lr=1e-4, warmup_iters=4,
                         lr_decay_iters=14)
    model = make_model()
    optimizer = build_optimizer(model, config)
    by_name = {name: group for group in optimizer.param_groups for name, p in model.named_parameters()
               if any(p is other for other in group["params"])}
    for step, height in ((0, 0.2), (4, 1.0), (9, 0.55), (14, 0.1)):
        set_learning_rate(optimizer, learning_rate(step, config))
        for name, group in by_name.items():
            assert group["lr"] == pytest.approx(height * (0.05 if name in MATRICES else 1e-3)), name


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    """Updates with random gradients, but for the padding rows, which never get any."""
    torch.manual_seed(3)
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if isinstance(model, GPT):
            model.wte.weight.grad[11:] = 0
        optimizer.step()


def test_updates_equal_torchs_plain_adamw():
    ours, theirs = make_model(), make_model()
    optimizer = build_optimizer(ours, OptimConfig(learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9))
    plain = torch.optim.AdamW([
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ], lr=1e-2, betas=(0.8, 0.9), foreach=False, fused=False)
    steps(ours, optimizer, 5)
    steps(theirs, plain, 5)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert not ours.wte.weight[11:].any()  # padding stays zero under weight decay


@OPTIMIZERS
def test_the_loss_scaler_unscales_for_all_and_skips_what_overflowed(name):
    """train.py's calls of it for float16, with a scale of 4."""
    scaled, plain = make_model(), make_model()
    config = OptimConfig(optimizer=name)
    optimizer, plain_optimizer = build_optimizer(scaled, config), build_optimizer(plain, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    tokens = torch.arange(8).view(1, 8)
    for overflows in (False, True, False):
        scaler.scale(scaled(tokens, tokens)[1]).backward()
        if overflows:
            scaled.h[0].mlp.c_fc.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(4.0)
        optimizer.zero_grad()
        if not overflows:
            plain(tokens, tokens)[1].backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
        for a, b in zip(scaled.parameters(), plain.parameters()):
            assert torch.equal(a, b)


@OPTIMIZERS
def test_state_put_back_by_name_continues_exactly(name):
    model, config = make_model(), OptimConfig(optimizer=name)
    optimizer = build_optimizer(model, config)
    steps(model, optimizer, 3)
    state = {name: t.clone() for name, t in optimizer_state(optimizer, model).items()}
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = build_optimizer(twin, config)
    load_optimizer_state(twin_optimizer, twin, state, lambda value, p: value)
    steps(model, optimizer, 2)
    steps(twin, twin_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize(("name", "key", "of"), [
    ("adamw", "exp_avg", "ln_f.weight"), ("muon", "exp_avg", "ln_f.weight"),
    ("muon", "momentum_buffer", "h.0.mlp.c_fc.weight"), ("muon", "row_squares", "h.0.mlp.c_fc.weight")])
def test_missing_and_misshapen_state_is_named(name, key, of):
    model = make_model()
    optimizer = build_optimizer(model, OptimConfig(optimizer=name, muon_beta2=0.9))
    steps(model, optimizer, 1)
    state = dict(optimizer_state(optimizer, model))
    for bad in ({}, {f"{key}.{of}": torch.zeros(3)}):
        broken = {k: v for k, v in state.items() if k != f"{key}.{of}"} | bad
        with pytest.raises(ValueError, match=re.escape(f"{key} of {of} is missing")):
            load_optimizer_state(optimizer, model, broken, lambda value, p: value)


@pytest.mark.parametrize(("loss", "norm", "fault"), [
    (3.0, 1.0, ""), (math.nan, 1.0, "the loss is nan"), (math.inf, 1.0, "the loss is inf"),
    (3.0, math.nan, "the gradient norm is nan"), (3.0, math.inf, "the gradient norm is inf"), (3.0, 0.0, "")])
def test_what_is_not_finite_is_a_fault(loss, norm, fault):
    assert SpikeDetector().fault(loss, norm, spike_sigma=0.0) == fault


def test_a_spike_is_a_norm_far_above_the_usual_one():
    rng = random.Random(0)
    norms = [math.exp(rng.gauss(-1.0, 0.2)) for _ in range(500)]
    spike_detector = SpikeDetector()
    assert not any(spike_detector.fault(3.0, norm, spike_sigma=6.0) for norm in norms)
    logs = [math.log(norm) for norm in norms[-100:]]
    assert spike_detector.mean == pytest.approx(statistics.mean(logs), abs=0.1)
    assert math.sqrt(spike_detector.variance) == pytest.approx(statistics.stdev(logs), rel=0.3)
    before = (spike_detector.num_steps, spike_detector.mean, spike_detector.variance)
    assert "deviations above the usual" in spike_detector.fault(3.0, math.exp(-1.0 + 0.2 * 8), spike_sigma=6.0)
    # Nothing is learned from a bad step.
    assert (spike_detector.num_steps, spike_detector.mean, spike_detector.variance) == before
    assert spike_detector.fault(3.0, math.exp(-1.0 - 0.2 * 8), spike_sigma=6.0) == ""  # a small norm does no harm
    assert spike_detector.fault(3.0, math.exp(-1.0 + 0.2 * 8), spike_sigma=0.0) == ""  # 0 is off


def test_the_first_steps_only_teach_and_ripples_of_an_even_run_are_no_spikes():
    spike_detector = SpikeDetector()
    assert spike_detector.fault(3.0, 1.0, spike_sigma=3.0) == ""
    assert spike_detector.fault(3.0, 100.0, spike_sigma=3.0) == ""  # warm-up begins with large ones
    even = SpikeDetector()
    assert not any(even.fault(3.0, 1.0, spike_sigma=3.0) for _ in range(200))
    assert even.fault(3.0, 1.05, spike_sigma=3.0) == ""


@pytest.mark.parametrize(("options", "max_iters", "words"), [
    ({"learning_rate": 1e-5}, 20, "the learning rate will rise instead of decay: min_lr=6e-05 is above "
                                  "learning_rate=1e-05; lower it, say --min_lr=1e-06"),
    ({"learning_rate": 1e-5, "schedule": "linear"}, 20, "the learning rate will rise instead of decay"),
    ({"learning_rate": 1e-5, "schedule": "wsd"}, 20, "the learning rate will rise instead of decay"),
    ({"learning_rate": 1e-5, "schedule": "constant"}, 20, None), ({"learning_rate": 1e-5, "decay_lr": False}, 20, None),
    ({"warmup_iters": 20}, 20, "rises for 20 steps, but the run has only 20"),
    ({"warmup_iters": 20, "decay_lr": False}, 20, None),
    ({"warmup_iters": 10, "lr_decay_iters": 10}, 20, "at once after the warm-up: lr_decay_iters=10 is not above"),
    ({"warmup_iters": 10, "lr_decay_iters": 10, "schedule": "constant"}, 20, None),
    ({"lr_decay_iters": 15, "min_lr": 0.0}, 20, "the last 5 steps learn nothing"),
    ({"lr_decay_iters": 15}, 20, None), ({"lr_decay_iters": 20, "min_lr": 0.0}, 20, None), ({"min_lr": 1.0}, 0, None)])
def test_what_nobody_wants_of_the_learning_rate_is_a_warning(options, max_iters, words):
    config = OptimConfig(**{"warmup_iters": 0, "lr_decay_iters": max_iters} | options)
    lines = list(schedule_warnings(config, max_iters))
    assert len(lines) == (words is not None), lines
    assert all(words in line for line in lines)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("optimizer", "options"), [
    ("adamw", {"embed_lr": 0.3}), ("adamw", {"width_base": 4}), ("muon", {"embed_lr": 0.3, "width_base": 4})])
def test_a_step_has_the_rate_and_the_decay_of_each_parameter(optimizer, options, tied):
    """AdamW's first step in float64: it goes against the sign of the gradient, as far as the rate. Twice as wide as
    width_base, the blocks' matrices and what gives logits their size have half the rate, and shrink as much."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, bias=True, tie_embeddings=tied))
    config = OptimConfig(optimizer=optimizer, learning_rate=0.01, weight_decay=0.1, **options)
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    adam = build_optimizer(model, config)
    set_learning_rate(adam, 0.5 * config.learning_rate)
    steps(model, adam, 1)
    scaled = ("ln_f.weight", "ln_f.bias") if tied else ("lm_head.weight",)
    for name, p in model.named_parameters():
        if optimizer == "muon" and name in MATRICES:
            continue
        lr = 0.5 * options.get("embed_lr", 0.01) if name in ("wte.weight", "wpe.weight") else 0.5 * 0.01
        decay = lr * 0.1 if p.dim() >= 2 else 0.0
        if "width_base" in options and (name in MATRICES or name in scaled):
            lr /= 2
        grad = p.grad.double()
        wanted = start[name] * (1 - decay) - lr * grad / (grad.abs() + 1e-8)
        assert (p.detach().double() - wanted).abs().max() < 1e-7, name


WIDTHS = (64, 128, 256, 512, 1024)


def sizes_after_5_steps(width: int, width_base: int, name: str, shape: dict) -> np.ndarray:
    """Root mean squares of what each layer adds to the residual path, and of what the steps have added to logits."""
    torch.manual_seed(1)
    config = OptimConfig(optimizer=name, learning_rate=4e-3, width_base=width_base)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=width // 32, n_embd=width,
                          mlp_hidden=width, **shape))
    model.init_weights(width_ratio(width, config))
    optimizer = build_optimizer(model, config)
    idx = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(2))
    before = model(idx)[0].detach()
    for _ in range(5):
        model(idx, idx.roll(-1, 1))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    sizes = []
    for layer in (model.h[0].attn, model.h[0].mlp):
        layer.register_forward_hook(lambda layer, given, y: sizes.append(y.square().mean().sqrt().item()))
    change = (model(idx)[0] - before).square().mean().sqrt().item()
    return np.array([change, *sizes])


@pytest.mark.parametrize(("name", "shape"), [
    ("adamw", {}), ("adamw", {"tie_embeddings": False, "bias": True}),
    ("adamw", {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True}),
    ("muon", {"pos": "rope", "norm": "rmsnorm", "mlp": "relu2", "tie_embeddings": False})])
def test_with_width_base_activations_and_logits_have_one_size_at_every_width(name, shape):
    """The coordinate check of arXiv:2203.03466. Without width_base they grow, to twice as large and more at 512."""
    sizes = {width: sizes_after_5_steps(width, 128, name, shape) for width in WIDTHS}
    for width, found in sizes.items():
        assert np.all((found > sizes[128] / 1.4) & (found < sizes[128] * 1.4)), (width, found, sizes[128])
    assert np.all(sizes_after_5_steps(512, 0, name, shape) > 2 * sizes[128])
