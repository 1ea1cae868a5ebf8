"""attention.py: kernels against the formula, and documents against each alone."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import make_model

from flatgpt.data.documents import find_edges
from flatgpt.data.order import Batch, TrainOrder
from flatgpt.data.packing import PackedOrder
from flatgpt.data.shards import Split
from flatgpt.models.attention import Documents, attend, has_varlen_kernel
from model import GPT

EOT = 36
OPTIONS = [{}, {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_head": 4, "n_kv_head": 2},
           {"pos": "alibi"}, {"pos": "sinusoidal", "n_head": 4, "n_kv_head": 1}, {"pos": "none"},
           {"pos": "rope", "sliding_window": 3, "window_pattern": "SL"},
           {"pos": "alibi", "sliding_window": 4, "n_head": 4, "n_kv_head": 2}]
NAMES = ["learned", "llama", "alibi", "sinusoidal", "none", "windows", "alibi_windows"]


def test_attention_dropout_by_the_formula_drops_and_keeps_the_mean():
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    torch.manual_seed(0)
    mean = torch.stack([attend(q, k, v, None, 0.3, "math") for _ in range(20_000)]).mean(0)
    torch.testing.assert_close(mean, attend(q, k, v, None, 0.0, "math"), atol=0.05, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_heads_that_share_keys_see_what_they_would_see_of_copies(backend):
    """A group of neighbouring heads of queries has the same head of keys: causal, masked, biased, a single query."""
    q, k, v = torch.randn(2, 6, 8, 4), torch.randn(2, 2, 8, 4), torch.randn(2, 2, 8, 4)
    copies = [t.repeat_interleave(3, dim=1) for t in (k, v)]
    for queries, mask in ((q, None), (q[:, :, -1:], None), (q[:, :, :3], torch.rand(1, 1, 3, 8) < 0.7),
                          (q[:, :, :3], torch.randn(1, 6, 3, 8)), (q[:, :, :1], torch.randn(1, 6, 1, 8))):
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = True
        torch.testing.assert_close(attend(queries, k, v, mask, 0.0, backend),
                                   attend(queries, *copies, mask, 0.0, backend))


def test_flash3_gets_what_it_takes_and_sdpa_the_rest(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, causal):  # the real one's layout: (B, T, H, D)
        calls.append((q.shape, causal))
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    q = torch.randn(2, 3, 8, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(attend(q, q, q, None, 0.0, "flash3"), attend(q, q, q, None, 0.0, "sdpa"))
    assert calls == [((2, 8, 3, 16), True)]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    for args in ((q.float(), q.float(), q.float(), None, 0.0), (q, q, q, None, 0.1), (q, q, q, mask, 0.0),
                 (q[:, :, -1:], q, q, None, 0.0)):  # float32, dropout, a mask, a single query
        attend(*args, "flash3")
    assert len(calls) == 1


# Documents


def batch_of(documents: str, seed: int = 0) -> Batch:
    """Eight windows of 16 tokens, of documents of 1 to 14."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 36, 500)
    tokens[np.cumsum(rng.integers(1, 15, 60))] = EOT
    tokens[0] = EOT
    split = Split([Path("train_000000.bin")], 37, [tokens])
    order = (TrainOrder(split, 16, 1, EOT) if documents == "mask" else
             PackedOrder(split, [find_edges(tokens, EOT)], 16, 1))
    return Batch(*(torch.from_numpy(np.ascontiguousarray(rows)) for rows in order.batch(0, 8)[:3]))


def gradients(model: GPT, batches: list[tuple]) -> list[torch.Tensor]:
    """Of the summed loss."""
    model.zero_grad()
    for x, y, *positions in batches:
        model(x, y, 1, *positions)[1].backward()
    return [p.grad.clone() for p in model.parameters()]


def alone(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each document, or piece of one, of a batch as a batch of its own."""
    pieces = []
    for x, y, positions in zip(*batch[:3]):
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(x)]
        pieces += [(x[None, a:b], y[None, a:b]) for a, b in itertools.pairwise(begins)]
    return pieces


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("documents", ["mask", "pack"])
def test_gradients_are_those_of_each_document_alone(documents, options, backend):
    model, batch = make_model(**options).double(), batch_of(documents)  # in float32 they differ by 3e-6 of the largest
    model.set_attention(backend)
    assert len(alone(batch)) > 1.5 * len(batch.inputs)
    for found, wanted in zip(gradients(model, [batch[:3]]), gradients(model, alone(batch))):
        scale = wanted.abs().max()
        torch.testing.assert_close(found / scale, wanted / scale, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=NAMES[:3])
def test_logits_know_nothing_of_the_document_before(options):
    model, batch = make_model(**options), batch_of("mask")
    x, positions = batch.inputs, batch.positions
    row, column = next((row, column) for row, column in (positions == 0).nonzero().tolist() if column > 4)
    changed = x.clone()
    changed[row, column - 1] = (x[row, column - 1] + 1) % 36
    documents, others = (model.compute_logits(model.hidden_states(idx, documents=Documents(positions, 99)))
                         for idx in (x, changed))
    assert torch.equal(documents[row, column:], others[row, column:])
    assert not torch.equal(documents[row, column - 1], others[row, column - 1])


def test_checkpointed_activations_have_the_same_gradients():
    model, batch = make_model(pos="rope"), batch_of("pack")
    plain = gradients(model, [batch[:3]])
    model.activation_checkpointing = True
    for found, wanted in zip(gradients(model, [batch[:3]]), plain):
        torch.testing.assert_close(found, wanted)


def test_lengths_are_padded_to_a_fixed_number_of_documents():
    documents = Documents(torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3], [0, 0, 1, 2]]), 8)
    assert documents.cu_seqlens().tolist() == [0, 2, 3, 4, 8, 9, 12, 12, 12]
    assert documents.cu_seqlens().dtype == torch.int32
    assert Documents(documents.positions, 6).cu_seqlens().tolist() == [0, 2, 3, 4, 8, 9, 12]


# The kernels for sequences of different lengths, by one that does what they do


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size, causal=True, enable_gqa=True):
    """Rows (B T, H or K, D) in, one sequence after the other, and rows out."""
    assert cu_q is cu_k
    assert causal
    assert max_q == max_k >= cu_q.diff().max()
    assert (enable_gqa or q.size(1) == k.size(1))
    out = torch.empty_like(q)
    for begin, end in itertools.pairwise(cu_q.tolist()):
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        left, right = (size if size >= 0 else end for size in window_size)
        sees = (distance <= left) & (distance >= -right)
        q_, k_, v_ = (rows[begin:end].transpose(0, 1) for rows in (q, k, v))
        out[begin:end] = F.scaled_dot_product_attention(q_, k_, v_, sees, enable_gqa=True).transpose(0, 1)
    return out


@pytest.fixture
def calls(monkeypatch) -> list:
    """Both kernels are there, on a CPU and in float32. What they were called with."""
    calls = []

    def recorded(kernel: Callable) -> Callable:
        return lambda *args, **options: calls.append(options) or kernel(*args, **options)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=recorded(varlen)))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_varlen_func=recorded(varlen)))
    monkeypatch.setattr("model.has_varlen_kernel", lambda *args: True)
    return calls


@pytest.mark.parametrize("backend", ["sdpa", "flash3"])
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("documents", ["mask", "pack"])
def test_the_kernels_for_lengths_do_what_the_mask_does(calls, monkeypatch, documents, options, backend):
    model, batch = make_model(**options), batch_of(documents)
    model.set_attention(backend)
    with monkeypatch.context() as without:
        without.setattr("model.has_varlen_kernel", lambda *args: False)
        wanted = gradients(model, [batch[:3]])
        assert calls == []
    for max_documents in (0, 50):
        for found, of_mask in zip(gradients(model, [(*batch[:3], max_documents)]), wanted):
            torch.testing.assert_close(found, of_mask, atol=1e-4, rtol=1e-4)
    assert len(calls) == (0 if "alibi" in str(options) else 4)  # numbers that are added to scores have no such kernel


def test_a_model_with_windows_takes_the_kernel_for_lengths_without_documents_too(calls, monkeypatch):
    model = make_model(pos="rope", sliding_window=3, window_pattern="SL")
    idx = torch.randint(37, (3, 16))
    found = model(idx)[0]
    assert [call["window_size"] for call in calls] == [(2, 0), (-1, 0)]
    monkeypatch.setattr("model.has_varlen_kernel", lambda *args: False)
    torch.testing.assert_close(found, model(idx)[0], atol=1e-5, rtol=1e-5)
    assert make_model()(idx)[0].shape == (3, 16, 37)
    assert len(calls) == 2


def test_dropout_within_attention_has_no_kernel_for_lengths(calls):
    model, batch = make_model(dropout=0.5), batch_of("mask")
    model(*batch[:2], 1, batch.positions)
    assert calls == []
    model.eval()(*batch[:2], 1, batch.positions)
    assert len(calls) == 2


def test_the_kernel_for_lengths_is_for_16_bits_on_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen))

    def has(backend="sdpa", device="cuda", dtype=torch.bfloat16, head_dim=64, capability=(8, 0)) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return has_varlen_kernel(backend, torch.device(device), dtype, head_dim)

    assert has()
    assert has(dtype=torch.float16, capability=(9, 0), head_dim=256)
    assert has(backend="flash3", capability=(9, 0))
    for without in ({"device": "cpu"}, {"device": "mps"}, {"dtype": torch.float32}, {"backend": "math"},
                    {"head_dim": 12}, {"head_dim": 264}, {"capability": (7, 5)}):
        assert not has(**without), without


def test_a_torch_without_the_kernel_for_lengths_uses_the_mask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert not has_varlen_kernel("sdpa", torch.device("cuda"), torch.bfloat16, 64)
    older = SimpleNamespace(varlen_attn=lambda q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: q)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", older)
    assert not has_varlen_kernel("sdpa", torch.device("cuda"), torch.bfloat16, 64)
