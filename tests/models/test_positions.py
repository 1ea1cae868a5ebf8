"""positions.py against the papers' formulas and transformers'."""

import math

import pytest
import torch
from test_model import SHAPE, make_model

from flatgpt.models.attention import attend
from flatgpt.models.positions import alibi_slopes, apply_rope, rope_cos_sin, sinusoids
from model import GPT, GPTConfig


@pytest.mark.parametrize("n_head", [8, 6])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_alibi_is_the_papers_formula_and_blooms_slopes(n_head, backend):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    T = 10
    theirs = build_alibi_tensor(torch.ones(1, T), n_head, torch.float32).view(n_head, T)  # slope * position of the key
    torch.testing.assert_close(alibi_slopes(n_head), theirs[:, 1])
    model = make_model(pos="alibi", n_head=n_head, n_embd=8 * n_head)
    q, k, v = (torch.randn(2, n_head, T, 8) for _ in range(3))
    scores = q @ k.transpose(2, 3) / math.sqrt(8) + theirs[:, None, :]  # their softmax does not see what a row adds
    wanted = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1) @ v
    context = model.attention_context(torch.arange(T), torch.arange(T))
    torch.testing.assert_close(attend(q, k, v, context.mask, 0.0, backend), wanted, atol=1e-5, rtol=1e-5)


def test_rotated_products_depend_on_the_distance_alone_and_equal_complex_ones():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return apply_rope(x, *rope_cos_sin(torch.tensor([position]), 8, theta=100.0))

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
        cos, sin = rope_cos_sin(torch.tensor([1000]), 64, 500_000.0, 8.0, 8192)
        angle = torch.tensor([1000 * wanted] * 2)
        torch.testing.assert_close(cos[0, [i, i + 32]], angle.cos(), atol=2e-4, rtol=0)  # 1,000 times a float's error
        torch.testing.assert_close(sin[0, [i, i + 32]], angle.sin(), atol=2e-4, rtol=0)
    assert bands == {"kept", "between", "slowed"}
    by_one = rope_cos_sin(torch.arange(50), 64, 500_000.0, 1.0, 8192)
    assert all(torch.equal(*pair) for pair in zip(rope_cos_sin(torch.arange(50), 64, 500_000.0), by_one))


def test_linear_scaling_is_the_same_as_positions_closer_together():
    scaled = rope_cos_sin(torch.arange(0, 400, 4), 16, 100.0, 4.0, scaling="linear")
    for ours, wanted in zip(scaled, rope_cos_sin(torch.arange(100), 16, 100.0)):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_yarn_slows_what_the_paper_says():
    """Of heads of 64 channels, theta 10,000, 2,048 positions stretched 4 times: the pairs by their turns."""
    cos, sin = rope_cos_sin(torch.tensor([1]), 64, 10_000.0, 4.0, 2048, "yarn")
    length = 1 + math.log(4) / 10
    turns = [2048 * 10_000 ** (-i / 32) / (2 * math.pi) for i in range(32)]
    first, last = sum(t > 32 for t in turns) - 1, sum(t >= 1 for t in turns)  # rounded outwards
    assert (first, last) == (8, 21)
    for i in range(32):
        plain, kept = 10_000 ** (-i / 32), 1 - min(1, max(0, (i - first) / (last - first)))
        angle = plain * kept + plain / 4 * (1 - kept)
        assert cos[0, i].item() == pytest.approx(length * math.cos(angle), abs=1e-6)
        assert sin[0, i + 32].item() == pytest.approx(length * math.sin(angle), abs=1e-6)


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
