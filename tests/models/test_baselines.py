"""baselines.py against closed forms, loops written out and torch's cells; the scripts with each of its models."""

import copy
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_RUN, on_ranks, records_of, run_process

from flatgpt.models.baselines import build, build_empty, count_pairs, fit_bigram
from flatgpt.models.fused import activation
from flatgpt.training import distributed, parallel
from flatgpt.training.device import DeviceConfig
from flatgpt.training.distributed import ParallelConfig
from model import GPTConfig, LanguageModel

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
            behind = model.hidden_states(part, cache)
            if state is not None:  # a mark holds it
                torch.testing.assert_close(state, before, atol=0, rtol=0)
        whole = model.hidden_states(torch.cat([idx, tokens(2, 9), tokens(2, 1)], dim=1))
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


# Counting


def entropy(counts: np.ndarray, k: float, of: np.ndarray | None = None) -> float:
    """Mean -log of the smoothed probabilities over the pairs counted in `of`, written out in float64."""
    probs = (counts + k) / (counts + k).sum(axis=1, keepdims=True)
    of = counts if of is None else of
    return float(-(of * np.log(probs)).sum() / of.sum())


def naive_counts(shards: list[list[int]], size: int) -> np.ndarray:
    counts = np.zeros((size, size))
    for shard in shards:
        for pair in itertools.pairwise(shard):
            counts[pair] += 1
    return counts


@pytest.mark.parametrize("chunk", [1, 2, 7, 2**20])
def test_pairs_are_counted_within_shards_in_chunks_of_any_size(monkeypatch, chunk):
    monkeypatch.setattr("flatgpt.models.baselines.CHUNK_TOKENS", chunk)
    shards = [np.random.default_rng(n).integers(0, 5, n).astype(np.uint16) for n in (29, 0, 1, 14, 2)]
    assert np.array_equal(count_pairs(shards, 5), naive_counts([shard.tolist() for shard in shards], 5))


def test_counting_refuses_ids_outside_the_vocabulary_and_tables_beyond_reason():
    with pytest.raises(ValueError, match="shard 1: token id 5 is outside the vocabulary of 5"):
        count_pairs([np.array([4, 4]), np.array([0, 5])], 5)
    with pytest.raises(ValueError, match=r"50257 x 50257 counts takes 20 GB; .* at most 46340 \(prepare_data.py"):
        count_pairs([], 50257)


@pytest.mark.parametrize("chunk", [1, 16, 2**22])
@pytest.mark.parametrize("k", [0.01, 1.0])
def test_the_fitted_bigram_has_the_entropy_of_the_smoothed_counts(monkeypatch, chunk, k):
    monkeypatch.setattr("flatgpt.models.baselines.CHUNK_CELLS", chunk)
    text, other = (np.random.default_rng(seed).zipf(1.5, 3000) % 36 for seed in (0, 1))  # 36 never comes
    counts, model = count_pairs([text], 37), make_model("bigram", scale=0.0)
    assert fit_bigram(model, counts, k) == pytest.approx(entropy(counts, k), abs=1e-9)
    for tokens_, of in ((text, counts), (other, count_pairs([other], 37))):
        idx = torch.from_numpy(tokens_)[None]
        assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(entropy(counts, k, of), abs=1e-5)


def prepare_shakespeare(cli, shakespeare) -> None:
    assert cli("prepare_data", "shakespeare_char", f"--input={shakespeare}").code == 0


COUNTING = ("--model=bigram", "--bigram_counts=True", "--device=cpu", "--out_dir=out/counted")


def test_counting_on_tiny_shakespeare_and_training_gets_there(cli, shakespeare):
    prepare_shakespeare(cli, shakespeare)
    result = cli("train", "--dataset=shakespeare_char", *COUNTING)
    assert result.code == 0, result.err
    assert float(re.search(r"train loss is ([\d.]+)", result.out)[1]) == pytest.approx(2.4546, abs=1e-3)
    (record,) = records_of("out/counted")
    assert record["step"] == 0
    assert record["val/loss"] == pytest.approx(2.4819, abs=1e-3)
    counted = LanguageModel.from_pretrained("out/counted")
    assert counted.num_params() == 65**2
    again = cli("train", "--dataset=shakespeare_char", *COUNTING)
    assert "out/counted is finished: 0 steps. To go on, train with --bigram_counts=False" in again.out
    result = cli("train", "--dataset=shakespeare_char", "--model=bigram", "--device=cpu", "--out_dir=out/trained",
                 "--block_size=64", "--batch_size=128", "--gradient_accumulation_steps=1", "--max_iters=200",
                 "--eval_interval=200", "--eval_iters=1", "--learning_rate=0.3", "--min_lr=0.01", "--warmup_iters=0",
                 "--lr_decay_iters=200", "--weight_decay=0")
    assert result.code == 0, result.err
    assert records_of("out/trained")[-1]["val/loss"] == pytest.approx(record["val/loss"], abs=0.02)


def test_counting_refuses_what_it_cannot_count(refused, cli, tiny_data):
    line = refused("train", "--dataset=tiny", "--bigram_counts=True", "--bigram_k=0")
    assert "bigram_k=0.0 must be positive" in line
    assert "bigram_counts=True counts the table of --model=bigram" in line
    assert "not of model=gpt" in line
    assert "init_from=gpt2" in refused("train", "--dataset=tiny", *COUNTING, "--init_from=gpt2")
    cli("prepare_data", "--input=tiny.txt", "--name=other", "--tokenizer=char")
    assert "not a mixture of tiny, other" in refused("train", "--dataset=tiny,other", *COUNTING)


def test_a_counted_table_can_be_trained_on(cli, tiny_data):
    assert cli("train", *TINY_RUN, *COUNTING).code == 0
    (counted,) = records_of("out/counted")
    result = cli("train", *TINY_RUN, "--model=bigram", "--out_dir=out/counted")
    assert result.code == 0, result.err
    assert "resuming out/counted at step 0" in result.out
    assert records_of("out/counted")[0]["train/loss"] == pytest.approx(counted["val/loss"], abs=0.3)
    assert counted["val/loss"] < math.log(30) - 1


# The scripts


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_is_resumed_byte_identically_and_writes_text(cli, tiny_data, kind):
    options = (*TINY_RUN, f"--model={kind}", "--dropout=0.1", "--bias=True", "--window=3")
    assert cli("train", *options, "--out_dir=out/whole").code == 0
    assert cli("train", *options, "--max_iters=3").code == 0
    result = cli("train", *options)
    assert "resuming out/tiny at step 3" in result.out
    weights = [Path(run, "checkpoints/latest/model.safetensors").read_bytes() for run in ("out/whole", "out/tiny")]
    assert weights[0] == weights[1]
    first, *_, last = (record["val/loss"] for record in records_of("out/tiny") if "val/loss" in record)
    assert last < first
    result = cli("sample", "--out_dir=out/tiny", "--prompt=the", "--num_samples=2", "--max_new_tokens=40",
                 "--device=cpu", "--dtype=bfloat16")
    assert result.code == 0, result.err
    assert result.out.count("\n---------------\n") == 2


def test_another_model_is_another_run(cli, refused, tiny_data):
    assert cli("train", *TINY_RUN, "--model=lstm").code == 0
    assert "model was lstm, is gru" in refused("train", *TINY_RUN, "--model=gru")
    assert "window was 8, is 4" in refused("train", *TINY_RUN, "--model=lstm", "--window=4")
    result = cli("train", *TINY_RUN, "--init_from=out/tiny", "--out_dir=out/next")
    assert result.code == 0, result.err
    assert LanguageModel.from_pretrained("out/next").config.model == "lstm"
    line = refused("train", *TINY_RUN, "--init_from=out/tiny", "--out_dir=out/other", "--model=gpt")
    assert "model=gpt was asked for, and it has lstm" in line


@pytest.mark.parametrize("kind", ["gpt", *MODELS])
def test_an_empty_model_has_the_names_and_shapes_of_a_full_one(kind):
    empty, full = build_empty(config := make_model(kind, n_head=2).config), build(config)
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in full.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())
    assert not any(p.is_meta for p in full.parameters())


def test_models_are_loaded_without_torchs_compiler(tmp_path):
    """Whose import takes longer than torch's."""
    code = """
import sys
import torch
from model import GPTConfig, LanguageModel
from flatgpt.models.baselines import build
for kind in ("gpt", "bigram", "mlp", "rnn", "lstm", "gru"):
    model = build(GPTConfig(model=kind, block_size=8, vocab_size=37, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(sys.argv[1])
    LanguageModel.from_pretrained(sys.argv[1])(torch.zeros(1, 8, dtype=torch.long))
assert "torch._dynamo" not in sys.modules
"""
    run_process("-c", code, tmp_path, cwd=ROOT)


def train_two_steps(layout: str) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of the second step over the ranks, and its gradients."""
    where = distributed.init_job(DeviceConfig(device="cpu", dtype="float32"),
                                 ParallelConfig(parallel=layout, timeout_s=60))
    with where as job:
        whole = make_model("lstm")
        model = parallel.materialize(build_empty(whole.config), whole.state_dict() if job.rank == 0 else None, job)
        wrapped = parallel.wrap(model, job, 2)
        rows = slice(2 * job.rank, 2 * job.rank + 2)
        for _ in range(2):
            parallel.zero_grad(model, job)
            loss = wrapped(tokens(4, 8)[rows], tokens(4, 8, seed=2)[rows], 32)[1]
            (loss * 2).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        total = distributed.sum_over_ranks(loss.detach(), job).item()
        return total, {name: parallel.full_tensor(p.grad).numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_have_the_loss_and_gradients_of_one(layout):
    model = make_model("lstm").train()
    for _ in range(2):
        model.zero_grad()
        loss = model(tokens(4, 8), tokens(4, 8, seed=2), 32)[1]
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    for total, grads in on_ranks(2, train_two_steps, layout):
        assert total == pytest.approx(loss.item(), abs=1e-5)
        for name, p in model.named_parameters():
            np.testing.assert_allclose(grads[name], p.grad, atol=1e-6, rtol=1e-4, err_msg=name)
