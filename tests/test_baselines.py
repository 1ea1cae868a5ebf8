"""baselines.py against closed forms, loops written out and torch's cells; the scripts with each of its models."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from baselines import build
from model import GPTConfig, LanguageModel, activation

MODELS = ("bigram", "mlp", "rnn", "lstm", "gru")
RECURRENT = ("rnn", "lstm", "gru")


def make_model(kind: str, scale: float = 0.5, **options) -> LanguageModel:
    """With weights N(0, scale), so that a mistake shows; 0: as they are initialised."""
    torch.manual_seed(0)
    model = build(GPTConfig(**{"model": kind, "block_size": 8, "vocab_size": 37, "n_layer": 2, "n_embd": 12,
                               "mlp_hidden": 20, "window": 4, "bias": True} | options))
    with torch.no_grad():
        for p in model.parameters() if scale else ():
            p.normal_(std=scale) if p.dim() == 2 else p.add_(torch.randn_like(p) * scale)
    return model.eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", MODELS)
def test_first_loss_is_near_ln_vocab_size(kind):
    model = make_model(kind, scale=0.0, n_embd=64)
    assert model(tokens(8, 64), tokens(8, 64, seed=2))[1].item() == pytest.approx(math.log(37), abs=0.03)


@pytest.mark.parametrize("kind", MODELS)
def test_a_later_token_changes_no_earlier_logits(kind):
    model, idx = make_model(kind), tokens(1, 16)
    changed = idx.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 37
    before, after = model(idx)[0][0], model(changed)[0][0]
    assert before.shape == (16, 37)
    reach = {"bigram": 1, "mlp": 4}.get(kind, 7)
    differs = (before - after).abs().amax(dim=1) > 1e-6
    assert differs.tolist() == [9 <= t < 9 + reach for t in range(16)]


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "bias": False}])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_is_cross_entropy_and_padding_takes_no_part(kind, options):
    model, idx, targets = make_model(kind, **options), tokens(3, 9), tokens(3, 9, seed=2)
    targets[0, :5] = -1
    logits, loss = model(idx)[0], model(idx, targets)[1]
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1))
    summed = model(idx, targets, num_targets=1)[1]
    torch.testing.assert_close(summed, loss * 22)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.any(), name
        if name in ("wte.weight", "lm_head.weight", "table.weight"):
            assert not p.grad[37:].any(), name
    whole = sum(p.numel() for p in build(model.config).parameters())
    tables = [p for name, p in model.named_parameters() if name in ("wte.weight", "lm_head.weight")]
    padding = sum((128 - 37) * p.size(1) for p in tables) if tables else 128**2 - 37**2
    assert model.num_params() == whole - padding


@pytest.mark.parametrize("mlp", ["gelu", "relu", "swiglu"])
def test_the_mlp_equals_a_loop_over_positions(mlp):
    model, idx = make_model("mlp", mlp=mlp), tokens(1, 11)
    for t in range(11):
        past = [model.wte.weight[idx[0, s]] if s >= 0 else torch.zeros(12) for s in range(t - 3, t + 1)]
        hidden = activation(mlp)(model.c_fc(torch.cat(past)))
        logits = model.wte.weight[:37] @ (model.c_proj.weight @ hidden + model.c_proj.bias)
        torch.testing.assert_close(model(idx)[0][0, t], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_models_equal_torchs_cells_step_by_step(kind, bias):
    model, idx = make_model(kind, bias=bias), tokens(3, 11)
    cells = []
    for layer in model.layers:
        cell = {"rnn": torch.nn.RNNCell, "lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}[kind](12, 12, bias=bias)
        cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.state_dict().items()})
        cells.append(cell)
    states = [None] * len(cells)
    for t in range(11):
        x = model.wte.weight[idx[:, t]]
        for i, cell in enumerate(cells):
            states[i] = cell(x, states[i])
            x = states[i][0] if kind == "lstm" else states[i]
        logits = model.ln_f(x) @ model.wte.weight[:37].T
        torch.testing.assert_close(model(idx)[0][:, t], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("prompt_tokens", [1, 3, 20])
def test_the_cache_changes_nothing_far_past_block_size_either(kind, prompt_tokens):
    model, idx = make_model(kind), tokens(2, prompt_tokens)
    cache = model.make_cache(2, prompt_tokens + 30)
    with torch.no_grad():
        for part in (idx, tokens(2, 9), tokens(2, 1)):
            state, before = cache.state, copy.deepcopy(cache.state)
            behind = model._hidden(part, cache)
            if state is not None:  # a mark holds it
                torch.testing.assert_close(state, before, atol=0, rtol=0)
        whole = model._hidden(torch.cat([idx, tokens(2, 9), tokens(2, 1)], dim=1))
    assert cache.length == prompt_tokens + 10
    torch.testing.assert_close(behind, whole[:, -1:], atol=1e-5, rtol=1e-5)
    draws = [model.generate(idx, 30, 5.0, use_cache=use_cache, generator=torch.Generator().manual_seed(3))
             for use_cache in (True, False)]
    assert torch.equal(*draws)
    assert draws[0].unique().numel() > 9


@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_is_read_once_and_continued_twice(kind):
    model, idx = make_model(kind), tokens(1, 5)
    cache = model.make_cache(1, 35)
    first, second = (list(model.stream(idx, 30, lambda logits, seen: logits.argmax(1, keepdim=True), cache=cache))
                     for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_comes_back(kind, tmp_path):
    model, idx = make_model(kind), tokens(2, 9)
    model.save_pretrained(str(tmp_path))
    loaded = LanguageModel.from_pretrained(str(tmp_path), dropout=0.25)
    assert type(loaded) is type(model)
    assert loaded.config == GPTConfig(**vars(model.config) | {"dropout": 0.25})
    assert torch.equal(loaded.eval()(idx)[0], model(idx)[0])


@pytest.mark.parametrize("kind", MODELS)
def test_16_bits_give_about_the_same_loss(kind):
    model, idx, targets = make_model(kind, 0.1), tokens(4, 16), tokens(4, 16, seed=2)
    exact = model(idx, targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)[1]
        loss.backward()
        assert model.generate(idx, 5).shape == (4, 21)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    model.to(torch.bfloat16)
    assert model(idx, targets)[1].item() == pytest.approx(exact.item(), rel=0.02)
    assert model.generate(idx, 5).shape == (4, 21)


@pytest.mark.parametrize("kind", ["mlp", *RECURRENT])
def test_dropout_drops_in_training_alone(kind):
    model, idx = make_model(kind, n_layer=1, dropout=0.5), tokens(2, 9)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model(idx)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])
