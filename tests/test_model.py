"""model.py against naive oracles: attention, causality, gradients, options and their configuration."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flatgpt.models.attention import attend
from model import GPT, GPTConfig

SHAPE = {"block_size": 16, "vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 8}


def make_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE | changes))
    with torch.no_grad():  # far from initialisation, so that a mistake shows
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(torch.randn_like(p) * 0.3)
    return model


def naive_logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """GPT-2's forward pass from its paper's formulas, one head at a time, without SDPA."""
    c, T = model.config, idx.size(1)
    D = c.n_embd // c.n_head
    x = model.wte.weight[idx] + model.wpe.weight[:T]
    for block in model.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(c.n_embd, dim=2)
        heads = []
        for h in range(c.n_head):
            part = slice(h * D, (h + 1) * D)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(D)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[..., part])
        x = x + block.attn.c_proj(torch.cat(heads, -1))
        u = block.mlp.c_fc(block.ln_2(x))
        tanh = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        exact = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
        x = x + block.mlp.c_proj(tanh if c.mlp == "gelu_tanh" else exact)
    return model.ln_f(x) @ model.wte.weight[:c.vocab_size].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mlp", ["gelu", "gelu_tanh"])
def test_logits_equal_the_written_out_formulas(bias, mlp):
    model = make_model(bias=bias, mlp=mlp)
    idx = torch.randint(37, (3, 16))
    logits, loss = model(idx)
    assert logits.shape == (3, 16, 37)
    assert loss is None
    torch.testing.assert_close(logits, naive_logits(model, idx), atol=1e-4, rtol=1e-4)


def test_a_later_token_changes_no_earlier_logits():
    model = make_model()
    idx = torch.randint(37, (1, 16))
    changed = idx.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 37
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_by_the_formula_equals_torchs_kernels(dropout):
    model = make_model(dropout=dropout)
    model.train(dropout == 0)  # with dropout, in its absence
    idx = torch.randint(37, (3, 16))
    fused, fused_text = model(idx)[0], model.generate(idx[:, :4], 30, temperature=0)
    model.set_attention("math")
    torch.testing.assert_close(model(idx)[0], fused, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(idx[:, :4], 30, temperature=0), fused_text)


def test_all_blocks_share_one_compilation():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = make_model(n_layer=4)
    idx, targets = torch.randint(37, (2, 16)), torch.randint(37, (2, 16))
    eager = model(idx, targets)[1]
    for part in model.compiled_parts():
        part.compile(backend=count)
    torch.testing.assert_close(model(idx, targets)[1], eager)
    assert len(graphs) == 2  # a block, the loss
    torch._dynamo.reset()


def test_first_loss_is_near_ln_vocab_size():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    logits, loss = model(torch.randint(37, (8, 16)), torch.randint(37, (8, 16)))
    assert logits is None
    assert loss.item() == pytest.approx(math.log(37), abs=0.02)


def test_micro_batches_sum_to_the_gradient_of_the_whole_batch():
    model = make_model()
    idx, targets = torch.randint(37, (4, 16)), torch.randint(37, (4, 16))
    targets[0, 3:] = -1  # an uneven share of the targets
    whole = torch.autograd.grad(model(idx, targets)[1], list(model.parameters()))
    count = int((targets >= 0).sum())
    losses = [model(idx[i:i + 2], targets[i:i + 2], num_targets=count)[1] for i in (0, 2)]
    parts = torch.autograd.grad(losses[0] + losses[1], list(model.parameters()))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_fresh_weights_have_gpt2s_spread_and_zero_padding():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | {"n_embd": 64, "bias": True}))
    for name, p in model.named_parameters():
        wanted = 0.0 if p.dim() < 2 else 0.02 / math.sqrt(4) if name.endswith("c_proj.weight") else 0.02
        rows = p[:37] if name == "wte.weight" else p
        assert rows.std().item() == pytest.approx(wanted, rel=0.1, abs=1e-9), name
    assert not model.wte.weight[37:].any()


def test_config_of_gpt2_has_124m_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=True))
    assert model.num_params(non_embedding=False) == 124_439_808
    assert model.num_params() == 124_439_808 - 1024 * 768


def test_heads_need_not_be_as_wide_as_the_model():
    model = make_model(n_head=3, n_kv_head=1, head_dim=6)  # of 8 channels
    shapes = {name: tuple(p.shape) for name, p in model.h[0].attn.named_parameters()}
    assert shapes == {"c_attn.weight": (5 * 6, 8), "c_proj.weight": (8, 3 * 6)}
    biases = {name for name, _ in make_model(qkv_bias=True).h[0].named_parameters() if name.endswith("bias")}
    assert biases == {"attn.c_attn.bias"}


def test_bad_configurations_are_named_together():
    with pytest.raises(ValueError, match="n_layer=0 must be positive; dropout=1"):
        GPT(GPTConfig(n_layer=0, dropout=1.0))
    with pytest.raises(ValueError, match="n_embd=10 is not divisible by n_head=3"):
        GPT(GPTConfig(n_embd=10, n_head=3))


def test_crop_block_size_keeps_the_first_positions():
    model = make_model()
    idx = torch.randint(37, (2, 8))
    before = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before)
    assert model.wpe.weight.requires_grad
    with pytest.raises(ValueError, match="9 positions"):
        model(torch.randint(37, (2, 9)))
    with pytest.raises(ValueError, match="block_size=9"):
        model.crop_block_size(9)


# Other shapes than GPT-2's

OPTIONS = [{"pos": "sinusoidal"}, {"pos": "learned_sinusoidal"}, {"pos": "rope"}, {"pos": "alibi"}, {"pos": "none"},
           {"mlp": "relu"}, {"mlp": "relu2"}, {"mlp": "swiglu", "mlp_hidden": 12}, {"norm": "rmsnorm"},
           {"norm_position": "post"}, {"qk_norm": True, "bias": True}, {"n_kv_head": 1}, {"tie_embeddings": False},
           {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 2, "qk_norm": True, "n_head": 4},
           {"pos": "alibi", "norm_position": "post", "n_kv_head": 1, "mlp": "relu2"},
           {"pos": "rope", "rope_theta": 10.0, "rope_factor": 8.0, "rope_original_block_size": 12},
           {"pos": "rope", "rope_theta": 10.0, "rope_factor": 4.0, "rope_scaling": "linear"},
           {"pos": "rope", "rope_theta": 10.0, "rope_factor": 4.0, "rope_scaling": "yarn",
            "rope_original_block_size": 12}, {"head_dim": 6, "n_kv_head": 1, "pos": "rope"}, {"qkv_bias": True},
           {"sliding_window": 5}, {"sliding_window": 3, "window_pattern": "SL", "pos": "rope", "n_kv_head": 1},
           {"sliding_window": 4, "window_pattern": "LS", "pos": "alibi", "head_dim": 3}]
ids = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()))


@ids
def test_every_option_is_causal_and_has_a_true_gradient(options):
    model = make_model(**options)
    idx, targets = torch.randint(37, (2, 12)), torch.randint(37, (2, 12))
    changed = idx.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 37
    assert torch.equal(model(idx)[0][:, :7], model(changed)[0][:, :7])
    assert not torch.allclose(model(idx)[0][:, 7:], model(changed)[0][:, 7:])
    model = make_model(**options).double()
    weight = model.h[0].mlp.c_fc.weight
    model(idx, targets)[1].backward()
    with torch.no_grad():
        losses = []
        for step in (1e-3, -2e-3):
            weight[3, 2] += step
            losses.append(F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()))
    assert weight.grad[3, 2].item() == pytest.approx((losses[0] - losses[1]).item() / 2e-3, rel=1e-2, abs=1e-6)


@ids
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_cached_generation_equals_uncached_for_every_option(monkeypatch, options, fixed_shapes):
    monkeypatch.setattr("torch.compile", lambda function: function)
    model = make_model(**options)
    model.compile_decoding = fixed_shapes
    for prompt_tokens in (1, 6, 20):  # 40 more are past block_size, which is 16
        idx = torch.randint(37, (2, prompt_tokens))
        cached, uncached = (model.generate(idx, 40, 0.9, 20, use_cache, generator=torch.Generator().manual_seed(5))
                            for use_cache in (True, False))
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("pos", ["none", "alibi"])
def test_a_query_sees_as_many_positions_as_the_window_its_own_among_them(backend, pos):
    model, T, window = make_model(pos=pos), 9, 4
    q, k, v = torch.randn(2, 2, T, 4), torch.randn(2, 2, T, 4), torch.randn(2, 2, T, 4)
    context = model.attention_context(torch.arange(T), torch.arange(T), window)
    y = attend(q, k, v, context.mask, 0.0, backend)
    for t in range(T):
        near = slice(max(0, t - window + 1), t + 1)
        scores = q[:, :, t:t + 1] @ k[:, :, near].transpose(2, 3) / 2  # sqrt(D)
        if pos == "alibi":
            scores -= torch.tensor([2**-4, 2**-8]).view(1, 2, 1, 1) * (t - torch.arange(T)[near])
        torch.testing.assert_close(y[:, :, t:t + 1], scores.softmax(-1) @ v[:, :, near])


@pytest.mark.parametrize(("pattern", "reach"), [("S", [2, 2]), ("SL", [2, None]), ("LS", [None, 2]), ("SSL", [2, 2])])
def test_what_a_token_reaches_adds_up_over_the_blocks(pattern, reach):
    model = make_model(pos="rope", sliding_window=3, window_pattern=pattern)
    idx = torch.randint(37, (1, 16))
    changed = idx.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 37
    differs = (model(idx)[0] != model(changed)[0]).any(-1)[0].tolist()
    last = 16 if None in reach else 4 + sum(reach) + 1
    assert differs == [4 <= t < last for t in range(16)]


def test_norms_that_autocast_widens_leave_keys_in_the_values_type(monkeypatch):
    layer_norm = F.layer_norm  # CUDA's autocast has it in float32
    monkeypatch.setattr("torch.nn.functional.layer_norm", lambda x, *args: layer_norm(x.float(), *(
        arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)))
    model, idx = make_model(qk_norm=True), torch.randint(37, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(idx, 8).shape == (2, 13)


def test_swiglu_has_as_many_parameters_as_gelu():
    for width, wanted in ((768, 2048), (128, 344)):
        config = GPTConfig(n_embd=width, mlp="swiglu")
        assert config.hidden == wanted
        assert 3 * width * config.hidden == pytest.approx(8 * width * width, rel=0.01)


def test_positions_that_go_on_read_more_than_block_size_and_learned_ones_say_that_they_cannot():
    idx = torch.randint(37, (1, 32))  # block_size is 16
    for pos in ("sinusoidal", "rope", "alibi", "none"):
        model = make_model(pos=pos)
        assert model(idx)[0].shape == (1, 32, 37)
        model.crop_block_size(64)
        assert model.config.block_size == 64
    for pos in ("learned", "learned_sinusoidal"):
        with pytest.raises(ValueError, match=r"32 positions, but .* block_size=16; .*--pos=rope"):
            make_model(pos=pos)(idx)


@pytest.mark.parametrize(("scaling", "original"), [("llama3", 16), ("yarn", 16), ("linear", 0)])
def test_the_context_that_is_lengthened_is_block_size_unless_one_is_named(scaling, original):
    options = {"pos": "rope", "rope_theta": 10.0, "rope_factor": 4.0, "rope_scaling": scaling}
    model, idx = make_model(**options), torch.randint(37, (2, 16))
    assert model.config.rope_original_block_size == original
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], make_model(**options, rope_original_block_size=16)(idx)[0])
    assert not torch.equal(model(idx)[0], make_model(**options | {"rope_factor": 1.0})(idx)[0])


@pytest.mark.parametrize(("key", "same", "other"), [
    ("n_kv_head", (0, 4), (1, 2)), ("head_dim", (0, 8), (4, 16)), ("mlp_hidden", (0, 128), (64, 129)),
    ("window_pattern", ("SLL", "SLLS", "SLLSLL"), ("S", "SL", "SLLL")), ("n_head", (4,), (0, 2)),
    ("rope_original_block_size", (0, 16), (8, 64))])
def test_a_number_means_the_same_as_what_its_default_stands_for(key, same, other):
    config = GPTConfig(**SHAPE | {"n_head": 4, "n_embd": 32, "n_layer": 4, "sliding_window": 5, "pos": "rope",
                                  "window_pattern": "SLL"})
    for value in same:
        other_words = replace(config, **{key: value})
        assert all(config.means(key, value) and other_words.means(key, again) for again in same)
    assert not any(config.means(key, value) for value in other)


@pytest.mark.parametrize(("changes", "message"), [
    ({"n_kv_head": 3, "n_head": 4}, "n_head=4 is not divisible by n_kv_head=3"), ({"n_kv_head": -1}, "n_kv_head=-1"),
    ({"pos": "rotary"}, "pos='rotary' must be one of learned, sinusoidal"),
    ({"pos": "rope", "n_embd": 6}, "n_embd / n_head=3 is odd"), ({"rope_theta": 0.0}, "rope_theta=0.0"),
    ({"pos": "rope", "rope_factor": 0.5, "rope_original_block_size": 8}, "rope_factor=0.5 must be 1 or more"),
    ({"pos": "rope", "rope_factor": math.nan, "rope_original_block_size": 8}, "rope_factor=nan must be 1 or more"),
    ({"rope_factor": 8.0, "rope_original_block_size": 8}, r"rope_factor=8.0 needs pos=rope \(here learned\)"),
    ({"pos": "rope", "rope_scaling": "ntk"}, "rope_scaling='ntk' must be one of llama3, linear, yarn"),
    ({"rope_scaling": "yarn", "rope_theta": 1.0}, "rope_scaling=yarn needs a rope_theta above 1, not 1.0"),
    ({"pos": "rope", "head_dim": 5}, "head_dim=5 is odd"), ({"head_dim": -1}, "head_dim=-1 must be 0 or more"),
    ({"bias": True, "qkv_bias": True}, "qkv_bias=True is for bias=False"),
    ({"sliding_window": -1}, "sliding_window=-1 must be 0 or more"),
    ({"sliding_window": 4, "window_pattern": "SXL"}, "window_pattern='SXL' must be letters S and L"),
    ({"sliding_window": 4, "window_pattern": "L"}, "window_pattern='L' must be .* with an S"),
    ({"window_pattern": "SL"}, "window_pattern=SL needs sliding_window"),
    ({"rope_original_block_size": -8}, "rope_original_block_size=-8 must be 0 or more"),
    ({"pos": "sinusoidal", "n_embd": 9, "n_head": 3}, "needs an even n_embd"), ({"mlp_hidden": -4}, "mlp_hidden=-4")])
def test_bad_shapes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**SHAPE | changes))
