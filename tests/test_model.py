"""model.py against naive oracles: attention, causality, loss and its gradients, generation."""

import gc
import math
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flatgpt.models.sampling import Sampler
from model import (
    GPT,
    ActivatedLinear,
    Block,
    ChunkLoss,
    Decoder,
    GPTConfig,
    LinearCrossEntropy,
    alibi_slopes,
    attend,
    rotate,
    rotation,
    sinusoids,
)

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


def test_attention_dropout_by_the_formula_drops_and_keeps_the_mean():
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    torch.manual_seed(0)
    mean = torch.stack([attend(q, k, v, None, 0.3, "math") for _ in range(20_000)]).mean(0)
    torch.testing.assert_close(mean, attend(q, k, v, None, 0.0, "math"), atol=0.05, rtol=0)


def test_flash3_gets_what_it_takes_and_sdpa_the_rest(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, causal):  # the real one's layout: (B, T, H, D)
        calls.append((q.shape, causal))
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    q = torch.randn(2, 3, 8, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(attend(q, q, q, None, 0.0, "flash3"), attend(q, q, q, None, 0.0, "sdpa"))
    assert calls == [((2, 8, 3, 16), True)]
    mask = torch.ones(8, 8, dtype=torch.bool)
    for args in ((q.float(), q.float(), q.float(), None, 0.0), (q, q, q, None, 0.1), (q, q, q, mask, 0.0),
                 (q[:, :, -1:], q, q, None, 0.0)):  # float32, dropout, a mask, a single query
        attend(*args, "flash3")
    assert len(calls) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_an_activation_that_is_made_again_has_the_gradients_of_one_that_is_kept(bias):
    torch.manual_seed(0)
    act, linear, h = torch.nn.GELU(), torch.nn.Linear(8, 3, bias=bias), torch.randn(2, 5, 8, requires_grad=True)
    weights = torch.randn(2, 5, 3)
    inputs = [h, *linear.parameters()]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept, again = linear(act(h)), ActivatedLinear.apply(h, linear.weight, linear.bias, act)
        assert torch.equal(kept, again)
        for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (kept, again))):
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a, b, atol=2e-2 if autocast else 1e-6, rtol=1e-2 if autocast else 1e-6)


def test_the_mlp_keeps_its_hidden_layer_once():
    kept = {}
    mlp, x = make_model(bias=True).h[0].mlp, torch.randn(2, 16, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        mlp(x)
    assert sum(t.numel() for t in kept.values() if t.shape == (2, 16, 32)) == 2 * 16 * 32


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


@pytest.mark.parametrize(("chunk_bytes", "softmax_elements"), [(1, 1), (20_000, 300), (20_000, 2**22), (2**27, 2**22)])
def test_loss_and_gradients_equal_cross_entropy_of_whole_logits(monkeypatch, chunk_bytes, softmax_elements):
    monkeypatch.setattr("model.LOGITS_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("model.SOFTMAX_ELEMENTS", softmax_elements)
    model = make_model()
    idx, targets = torch.randint(37, (3, 16)), torch.randint(-1, 37, (3, 16))
    _, loss = model(idx, targets)
    whole = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, whole)
    ours, theirs = (torch.autograd.grad(x * 3, list(model.parameters())) for x in (loss, whole))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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


def test_loss_under_bfloat16_autocast_is_float32_and_near():
    model = make_model()
    idx, targets = torch.randint(37, (3, 16)), torch.randint(37, (3, 16))
    exact = model(idx, targets)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(idx, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.wte.weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)


def test_padded_rows_take_no_part():
    model = make_model()
    padding = model.wte.weight[37:]
    idx, targets = torch.randint(37, (3, 16)), torch.randint(37, (3, 16))
    logits, loss = model(idx)[0], model(idx, targets)[1]
    loss.backward()
    assert len(padding) == 128 - 37
    assert torch.equal(model.wte.weight.grad[37:], torch.zeros_like(padding))
    with torch.no_grad():
        padding.fill_(100.0)
    assert torch.equal(model(idx)[0], logits)
    torch.testing.assert_close(model(idx, targets)[1], loss)


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
           {"pos": "rope", "rope_theta": 10.0, "rope_factor": 8.0, "rope_original_block_size": 12}]
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


@pytest.mark.parametrize("n_head", [8, 6])
@pytest.mark.parametrize("how", ["sdpa", "math"])
def test_alibi_is_the_papers_formula_and_blooms_slopes(n_head, how):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    T = 10
    theirs = build_alibi_tensor(torch.ones(1, T), n_head, torch.float32).view(n_head, T)  # slope * position of the key
    torch.testing.assert_close(alibi_slopes(n_head), theirs[:, 1])
    model = make_model(pos="alibi", n_head=n_head, n_embd=8 * n_head)
    q, k, v = (torch.randn(2, n_head, T, 8) for _ in range(3))
    scores = q @ k.transpose(2, 3) / math.sqrt(8) + theirs[:, None, :]  # their softmax does not see what a row adds
    wanted = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1) @ v
    look = model._look(torch.arange(T), T)
    torch.testing.assert_close(attend(q, k, v, look.mask, 0.0, how), wanted, atol=1e-5, rtol=1e-5)


def test_rotated_products_depend_on_the_distance_alone_and_equal_complex_ones():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, *rotation(torch.tensor([position]), 8, theta=100.0))

    products = [(turned(q, i) * turned(k, j)).sum() for i, j in ((5, 2), (13, 10), (3, 0))]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), atol=1e-4, rtol=1e-4)
    as_complex = [torch.complex(*x.flatten().chunk(2)) for x in (q, k)]
    angle = 3 * 100.0 ** (-torch.arange(4) * 2 / 8)  # of distance 3
    wanted = (as_complex[0] * torch.polar(torch.ones(4), angle) * as_complex[1].conj()).real.sum()
    torch.testing.assert_close(products[0], wanted, atol=1e-4, rtol=1e-4)


def test_slow_rotations_are_scaled_as_llama_3_scales_them():
    bands = set()
    for i in range(32):  # of Llama 3.1's heads of 64 channels, whose pairs are i and i + 32
        plain = 500_000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            band, wanted = "kept", plain
        elif wavelength > 8192 / 1:
            band, wanted = "slowed", plain / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            band, wanted = "between", (1 - smooth) * plain / 8 + smooth * plain
        bands.add(band)
        cos, sin = rotation(torch.tensor([1000]), 64, 500_000.0, 8.0, 8192)
        angle = torch.tensor([1000 * wanted] * 2)
        torch.testing.assert_close(cos[0, [i, i + 32]], angle.cos(), atol=2e-4, rtol=0)  # 1,000 times a float's error
        torch.testing.assert_close(sin[0, [i, i + 32]], angle.sin(), atol=2e-4, rtol=0)
    assert bands == {"kept", "between", "slowed"}
    by_one = rotation(torch.arange(50), 64, 500_000.0, 1.0, 8192)
    assert all(torch.equal(*pair) for pair in zip(rotation(torch.arange(50), 64, 500_000.0), by_one))


def test_norms_that_autocast_widens_leave_keys_in_the_values_type(monkeypatch):
    layer_norm = F.layer_norm  # CUDA's autocast has it in float32
    monkeypatch.setattr("torch.nn.functional.layer_norm", lambda x, *args: layer_norm(x.float(), *(
        arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)))
    model, idx = make_model(qk_norm=True), torch.randint(37, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(idx, 8).shape == (2, 13)


def test_sinusoids_are_the_papers_and_as_large_as_a_token():
    table = sinusoids(torch.arange(50), 6)
    for position, channel in ((0, 0), (7, 2), (49, 4)):
        angle = position / 10000 ** (channel / 6)
        wanted = torch.tensor([math.sin(angle), math.cos(angle)]) * 0.02 * math.sqrt(2)
        torch.testing.assert_close(table[position, channel:channel + 2], wanted)
    assert sinusoids(torch.arange(1000), 64).square().mean().sqrt().item() == pytest.approx(0.02)
    model = GPT(GPTConfig(**SHAPE | {"pos": "learned_sinusoidal"}))
    assert torch.equal(model.wpe.weight, sinusoids(torch.arange(16), 8))
    assert model.wpe.weight.requires_grad


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
        with pytest.raises(ValueError, match=r"32 positions, but .* block_size=16: .*--pos=rope"):
            make_model(pos=pos)(idx)


@pytest.mark.parametrize(("changes", "message"), [
    ({"n_kv_head": 3, "n_head": 4}, "n_head=4 is not divisible by n_kv_head=3"), ({"n_kv_head": -1}, "n_kv_head=-1"),
    ({"pos": "rotary"}, "pos='rotary' must be one of learned, sinusoidal"),
    ({"pos": "rope", "n_embd": 6}, "n_embd / n_head=3 is odd"), ({"rope_theta": 0.0}, "rope_theta=0.0"),
    ({"pos": "rope", "rope_factor": 0.5, "rope_original_block_size": 8}, "rope_factor=0.5 must be 1 or more"),
    ({"pos": "rope", "rope_factor": math.nan, "rope_original_block_size": 8}, "rope_factor=nan must be 1 or more"),
    ({"pos": "rope", "rope_factor": 8.0}, r"rope_factor=8.0 needs .*rope_original_block_size \(here 0\)"),
    ({"rope_factor": 8.0, "rope_original_block_size": 8}, r"rope_factor=8.0 needs pos=rope \(here learned\)"),
    ({"rope_original_block_size": -8}, "rope_original_block_size=-8 must be 0 or more"),
    ({"pos": "sinusoidal", "n_embd": 9, "n_head": 3}, "needs an even n_embd"), ({"mlp_hidden": -4}, "mlp_hidden=-4")])
def test_bad_shapes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**SHAPE | changes))


# Generation


def naive_greedy(model: GPT, idx: torch.Tensor, count: int) -> torch.Tensor:
    """The definition: a window that starts as the prompt's last block_size tokens; when it is full, its last half."""
    limit, window = model.config.block_size, idx[:, -model.config.block_size:]
    for _ in range(count):
        token = model(window)[0][:, -1].argmax(1, keepdim=True)
        idx, window = torch.cat([idx, token], 1), torch.cat([window, token], 1)
        if window.size(1) > limit:
            window = window[:, -(limit // 2):]
    return idx


@pytest.mark.parametrize("prompt_tokens", [1, 5, 16, 40])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_the_definition_past_block_size_too(prompt_tokens, use_cache):
    model = make_model()
    idx = torch.randint(37, (3, prompt_tokens))
    out = model.generate(idx, 45, temperature=0, use_cache=use_cache)
    assert torch.equal(out, naive_greedy(model, idx, 45))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), prompt_tokens=st.integers(1, 20), top_k=st.sampled_from([None, 3, 40]),
       top_p=st.sampled_from([None, 0.7]))
def test_cached_and_uncached_sampling_draw_the_same_tokens(seed, prompt_tokens, top_k, top_p):
    model = make_model(seed % 3)
    idx = torch.randint(37, (2, prompt_tokens))
    with_cache, without = (model.generate(idx, 30, 0.9, top_k, use_cache, top_p=top_p,
                                          generator=torch.Generator().manual_seed(seed)) for use_cache in (True, False))
    assert torch.equal(with_cache, without)


def seeded() -> Sampler:
    return Sampler(generator=torch.Generator().manual_seed(1))


def test_a_prompt_is_read_once_however_often_it_is_continued(monkeypatch):
    model, read = make_model(), []
    hidden = model._hidden
    monkeypatch.setattr(model, "_hidden", lambda idx, cache=None: read.append(idx.size(1)) or hidden(idx, cache))
    idx = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    cache = model.make_cache(2, 5 + 48)
    for new_tokens, reads in ((6, [5, 1, 1, 1, 1, 1]), (6, [1, 1, 1, 1, 1])):  # then as much as was said before
        expected = torch.stack(list(model.stream(idx, new_tokens, seeded())), dim=1)
        read.clear()
        tokens = model.stream(idx, new_tokens, seeded(), cache=cache)
        assert torch.equal(torch.stack(list(tokens), dim=1), expected)
        assert read == reads
    far = 3 * model.config.block_size  # past the window the prompt's place is taken, and it has to be read again
    for _ in range(2):
        expected = torch.stack(list(model.stream(idx, far, seeded())), dim=1)
        tokens = model.stream(idx, far, seeded(), cache=cache)
        assert torch.equal(torch.stack(list(tokens), dim=1), expected)


def test_stream_yields_what_generate_returns_and_leaves_the_mode_alone():
    model = make_model(dropout=0.5).train()
    idx = torch.randint(37, (2, 4))
    streamed = torch.stack(list(model.stream(idx, 9, Sampler(temperature=0))), dim=1)
    assert torch.equal(torch.cat([idx, streamed], 1), model.generate(idx, 9, temperature=0))
    assert model.training


def test_a_prompt_read_in_parts_through_the_cache_gives_the_same_output():
    model = make_model().eval()
    idx = torch.randint(37, (2, 12))
    cache = model.make_cache(2, 12)
    with torch.no_grad():
        parts = [model._hidden(part, cache) for part in idx.split([5, 4, 3], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model._hidden(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt_tokens", [1, 12, 40])
def test_decoding_with_fixed_shapes_gives_the_same_tokens_past_block_size_too(monkeypatch, prompt_tokens):
    compiled = []
    monkeypatch.setattr("torch.compile", lambda function: compiled.append(function) or function)
    model = make_model()
    idx = torch.randint(37, (2, prompt_tokens))
    expected = model.generate(idx, 40, temperature=0)
    assert not compiled
    model.compile_decoding = True
    assert torch.equal(model.generate(idx, 40, temperature=0), expected)
    assert compiled == [Block.forward]


def test_decoding_goes_on_without_a_compiler(monkeypatch):
    def fail(*args):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch.compile", lambda function: fail)
    model, idx = make_model(), torch.randint(37, (1, 3))
    expected = model.generate(idx, 5, temperature=0)
    model.compile_decoding = True
    with pytest.warns(UserWarning, match="no compiler here"):
        assert torch.equal(model.generate(idx, 5, temperature=0), expected)


def test_a_cache_that_is_done_with_gives_its_memory_back_at_once(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function: function)
    model, idx = make_model(), torch.randint(37, (1, 3))
    model.compile_decoding = True
    gc.disable()
    try:
        cache = model.make_cache(1, 10)
        list(model.stream(idx, 5, Sampler(), cache=cache))
        assert cache.decoder is not None
        seen = weakref.ref(cache), weakref.ref(cache.decoder)
        del cache
        assert [thing() for thing in seen] == [None, None]
    finally:
        gc.enable()


def test_a_full_cache_takes_no_more():
    model = make_model().eval()
    cache = model.make_cache(1, 100)
    with torch.no_grad():
        model._hidden(torch.zeros(1, 15, dtype=torch.long), cache)
        decoder = Decoder(model, cache)
        decoder.step(torch.zeros(1, 1, dtype=torch.long))
        with pytest.raises(ValueError, match="the cache is full: it has room for 16 positions"):
            decoder.step(torch.zeros(1, 1, dtype=torch.long))


def test_generating_from_nothing_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        make_model().generate(torch.empty(1, 0, dtype=torch.long), 1)


def test_only_a_cpu_takes_a_chunk_of_logits_in_parts(monkeypatch):
    """On MPS scatter_add_ changes nothing in a part that does not begin a tensor; meta stands in for it."""
    monkeypatch.setattr("model.LOGITS_CHUNK_BYTES", 4 * 8 * 128)
    monkeypatch.setattr("model.SOFTMAX_ELEMENTS", 2 * 128)
    for device, rows in (("cpu", [2] * 8), ("meta", [8, 8])):
        parts = []

        def chunk_loss(logits, targets, vocab_size, want_grad, parts=parts):
            parts.append(logits)
            return logits.sum()

        x, w = torch.ones(16, 8, device=device), torch.ones(128, 8, device=device)
        LinearCrossEntropy.apply(x, w, torch.zeros(16, dtype=torch.long, device=device), 37, torch.float32, True,
                                 chunk_loss)
        assert [len(part) for part in parts] == rows
        assert device == "cpu" or {part.storage_offset() for part in parts} == {0}


def test_loss_without_gradients_keeps_none():
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(128, 8)
    loss = LinearCrossEntropy.apply(x, w, torch.arange(5), 37, torch.float32, False, ChunkLoss())
    torch.testing.assert_close(loss, F.cross_entropy(x @ w[:37].T, torch.arange(5), reduction="sum"))
