"""fused.py against what it replaces: loss and gradients of whole logits, and an activation that is kept."""

import pytest
import torch
import torch.nn.functional as F
from test_model import make_model

from flatgpt.models.fused import ActivatedLinear, ChunkLoss, LinearCrossEntropy


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


@pytest.mark.parametrize(("chunk_bytes", "softmax_elements"), [(1, 1), (20_000, 300), (20_000, 2**22), (2**27, 2**22)])
def test_loss_and_gradients_equal_cross_entropy_of_whole_logits(monkeypatch, chunk_bytes, softmax_elements):
    monkeypatch.setattr("flatgpt.models.fused.LOGITS_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("flatgpt.models.fused.SOFTMAX_ELEMENTS", softmax_elements)
    model = make_model()
    idx, targets = torch.randint(37, (3, 16)), torch.randint(-1, 37, (3, 16))
    _, loss = model(idx, targets)
    whole = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, whole)
    ours, theirs = (torch.autograd.grad(x * 3, list(model.parameters())) for x in (loss, whole))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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


def test_loss_without_gradients_keeps_none():
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(128, 8)
    loss = LinearCrossEntropy.apply(x, w, torch.arange(5), 37, torch.float32, False, ChunkLoss())
    torch.testing.assert_close(loss, F.cross_entropy(x @ w[:37].T, torch.arange(5), reduction="sum"))


def test_compiled_the_loss_of_a_chunk_is_the_same_bits():
    """Eager code subtracts one at the target by scatter_add_, compiled code by a comparison."""
    torch.compiler.reset()
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets = torch.randn(64, 128).to(dtype), torch.randint(-1, 37, (64, 1))
        gradients = logits.clone(), logits.clone()
        losses = [part(z, targets, 37, True) for part, z in
                  zip((ChunkLoss(), torch.compile(ChunkLoss(), backend="eager")), gradients)]
        assert torch.equal(*losses)
        assert torch.equal(*gradients)
        assert (gradients[0][targets.squeeze(1) < 0] == 0).all()


def test_only_a_cpu_takes_a_chunk_of_logits_in_parts(monkeypatch):
    """On MPS scatter_add_ changes nothing in a part that does not begin a tensor; meta stands in for it."""
    monkeypatch.setattr("flatgpt.models.fused.LOGITS_CHUNK_BYTES", 4 * 8 * 128)
    monkeypatch.setattr("flatgpt.models.fused.SOFTMAX_ELEMENTS", 2 * 128)
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
