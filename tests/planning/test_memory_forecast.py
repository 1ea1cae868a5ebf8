"""flatgpt.planning.memory against what is there: torch's tracker of tensors, autograd's, and peaks of processes."""

from __future__ import annotations

import contextlib
import io
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import on_ranks, write_shard
from peaks import peak_and_forecast

from flatgpt.data.loader import BatchPlan, empty_batch
from flatgpt.models.baselines import build, build_empty
from flatgpt.planning import memory
from flatgpt.training import muon
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, build_optimizer, muon_params
from model import GPT, GPTConfig

HERE = Job(0, 1, torch.device("cpu"), torch.float32)
STATUS = Path("/proc/self/status")
SMALL = {"block_size": 64, "vocab_size": 256, "n_layer": 3, "n_head": 4, "n_embd": 128}
LLAMA = {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 2, "tie_embeddings": False}


def make_model(**options) -> GPT:
    return GPT(GPTConfig(**{"block_size": 64, "vocab_size": 300, "n_layer": 3, "n_head": 2, "n_embd": 64} | options))


@pytest.mark.parametrize(("dtype", "case"), [
    (torch.float32, {"micro_batch": 16}), (torch.float32, {"micro_batch": 16, "checkpointing": True}),
    (torch.bfloat16, {"micro_batch": 16}), (torch.float32, {"micro_batch": 2, "vocab_size": 20000}),
    (torch.float32, {"micro_batch": 2, "steps": 2, "vocab_size": 20000}),
    (torch.bfloat16, {"micro_batch": 2, "vocab_size": 20000}), (torch.float32, {"micro_batch": 8} | LLAMA),
    (torch.float32, {"micro_batch": 8, "checkpointing": True} | LLAMA),
    (torch.float32, {"micro_batch": 8, "dropout": 0.1}),
    (torch.float32, {"micro_batch": 8, "documents": "mask", "block_size": 128}),
    (torch.float32, {"micro_batch": 1, "optimizer": "muon"})])
def test_the_tensors_of_a_step_are_those_that_torch_counts(dtype, case):
    peak, forecast = peak_and_forecast("cpu", dtype, **SMALL | case)
    assert forecast == pytest.approx(peak, rel=0.1)


def peak_and_parts(options: tuple[str, ...], folder: str) -> tuple[int, dict[str, float]]:
    """Of a rank's process that trains: the most memory it has held, and what preflight forecast when it began."""
    import train
    from flatgpt.training import preflight

    os.chdir(folder)
    parts: list[dict[str, float]] = []
    forecast = preflight.memory_parts
    preflight.memory_parts = lambda *args: parts.append(forecast(*args)) or parts[-1]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(list(options))
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]), parts[-1]


@pytest.mark.skipif(not STATUS.is_file() or "VmHWM" not in STATUS.read_text(), reason="only Linux tells a peak")
@pytest.mark.parametrize(("num_ranks", "options"), [
    (1, "--n_layer=4 --n_embd=32 --n_head=1 --batch_size=256"),
    (1, "--n_layer=6 --n_embd=32 --n_head=1 --batch_size=256 --activation_checkpointing=True"),
    (1, "--n_layer=3 --n_embd=32 --n_head=1 --batch_size=256 --pos=rope --norm=rmsnorm --mlp=swiglu"),
    (1, "--n_layer=2 --n_embd=64 --n_head=1 --batch_size=8 --vocab_size=50257"),
    (1, "--n_layer=2 --n_embd=768 --n_head=8 --batch_size=1"),
    (2, "--n_layer=2 --n_embd=512 --n_head=8 --batch_size=1 --gradient_accumulation_steps=4"),
    (2, "--n_layer=4 --n_embd=512 --n_head=8 --batch_size=1 --gradient_accumulation_steps=4 --parallel=fsdp")])
def test_processes_peak_within_15_percent_of_the_forecast(tmp_path, num_ranks, options):
    for split, count in (("train", 100_000), ("val", 600)):
        (tmp_path / "data" / "random").mkdir(parents=True, exist_ok=True)
        write_shard(tmp_path / "data" / "random" / f"{split}_000000.bin",
                    np.random.default_rng(0).integers(0, 256, count, dtype=np.uint16))
    always = ("--dataset=random --vocab_size=256 --block_size=64 --gradient_accumulation_steps=1 --max_iters=6 "
              "--eval_interval=1 --eval_iters=1 --warmup_iters=1 --lr_decay_iters=6 --device=cpu --dtype=float32")
    for peak, parts in on_ranks(num_ranks, peak_and_parts, (*always.split(), *options.split()), str(tmp_path)):
        assert sum(parts.values()) == pytest.approx(peak, rel=0.15), parts


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimisers_means_are_counted(optimizer):
    for options in ({}, {"tie_embeddings": False, "bias": True}, {"model": "lstm"}):
        model = build(GPTConfig(**SMALL | options))
        tokens = torch.zeros(1, 8, dtype=torch.long)
        model(tokens, tokens)[1].backward()
        stepper = build_optimizer(model, OptimConfig(optimizer=optimizer))
        stepper.step()
        held = sum(value.nbytes for state in stepper.state.values() for key, value in state.items() if key != "step")
        assert memory.optimizer_bytes(model, optimizer) == held
        assert {*memory.muon_matrices(model)} == {*muon_params(model)}
    assert memory.MUON_STACK_ELEMENTS == muon.STACK_ELEMENTS


@pytest.mark.parametrize(("world_size", "fits", "largest"), [(1, 24, 24), (2, 5, 4), (4, 0, 0), (8, 7, 6)])
def test_the_largest_micro_batch_divides_a_ranks_sequences(world_size, fits, largest):
    seen = []
    found = memory.largest_micro_batch(24, world_size, lambda plan: seen.append(plan) or plan.micro_batch <= fits)
    assert found == largest
    for plan in seen:
        assert plan == BatchPlan(24 * world_size, plan.micro_batch, 24 // plan.micro_batch, world_size)


def kept_bytes(model, num_seqs: int = 1) -> int:
    """Of what the forward pass keeps for the backward pass."""
    kept: dict[int, torch.Tensor] = {}
    params = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, y, *documents = empty_batch(num_seqs, model.config.block_size, model.keeps_within_documents, HERE.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, y, None, *documents)
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in params)


def test_the_formula_of_attention_keeps_its_weights():
    model, added = make_model(block_size=256), []
    for count in (kept_bytes, partial(memory.kept_bytes, layout=HERE)):
        model.set_attention("sdpa")
        without = count(model, 8)
        model.set_attention("math")
        added.append(count(model, 8) - without)
    assert added[1] == 3 * 4 * 8 * 2 * 256**2 == pytest.approx(added[0], rel=0.05)


@pytest.mark.parametrize("pos", ["rope", "alibi"])
def test_a_mask_of_documents_is_kept_once_for_all_blocks(pos):
    model = make_model(block_size=256, n_embd=32, pos=pos)
    without, forecast = kept_bytes(model), memory.kept_bytes(model, 1, HERE)
    model.set_documents("mask")
    added = memory.kept_bytes(model, 1, HERE) - forecast
    if pos == "alibi":  # it has numbers for each head in any case
        assert abs(kept_bytes(model) - without) < 256**2
        assert added == 0
    else:
        assert 4 * 256**2 <= kept_bytes(model) - without <= 1.1 * 4 * 256**2
        assert added == 6 * 256**2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_about_what_autograd_keeps(checkpointing, dtype):
    model, kept = make_model(n_embd=128, n_head=4), {}
    model.activation_checkpointing = checkpointing
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    job = Job(0, 1, torch.device("cpu"), dtype)
    tokens = torch.ones(16, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), job.autocast():
        x = model.hidden_states(tokens)
    really = sum(num_bytes for num_bytes, _ in kept.values()) + x.nbytes
    estimate = memory.kept_bytes(model, 16, job)
    weights_cast = 0  # autocast's copies of the weights are no activations
    if dtype != torch.float32 and not checkpointing:
        weights_cast = 2 * sum(p.numel() for block in model.h for p in block.parameters())
    assert estimate == pytest.approx(really - weights_cast, rel=0.05)


@pytest.mark.parametrize("options", [{"head_dim": 96}, {"head_dim": 8}, {"sliding_window": 16}])
def test_activations_grow_with_the_width_of_the_heads_and_not_with_a_window(options):
    model = make_model(n_layer=6, **options)
    assert memory.kept_bytes(model, 1, HERE) == pytest.approx(kept_bytes(model), rel=0.05)


@pytest.mark.parametrize("kind", ["bigram", "mlp", "rnn", "lstm", "gru"])
def test_activations_of_the_baselines_are_about_what_autograd_keeps(kind):
    model = build(GPTConfig(model=kind, block_size=512, vocab_size=1000, n_layer=3, n_embd=64))
    estimate = memory.kept_bytes(model, 1, HERE)
    if kind == "bigram":  # what its loss makes on the way is not kept
        assert estimate == 3 * 4 * 512 * 1024
    else:
        assert estimate == pytest.approx(kept_bytes(model), rel=0.3)
    sharded = Job(0, 4, torch.device("cpu"), torch.float32, "fsdp", 4)
    count = sum(p.numel() for p in model.parameters())
    assert memory.state_bytes(model, BatchPlan(8, 1, 2, 4), sharded) == 4 * count + 8 * count + 4 * count


def test_the_copy_for_a_checkpoint_is_counted_as_torch_gives_out_pinned_memory():
    model, count = build_empty(GPTConfig(bias=True, vocab_size=50304)), 124_475_904
    assert memory.copy_bytes(model, torch.device("cpu")) == 16 * count
    assert memory.copy_bytes(model, torch.device("cuda")) == 2**29 + 2**30 + 4 * count


def test_the_parts_of_a_sharded_model_are_smaller():
    model = make_model(n_layer=12, n_embd=128)
    count = sum(p.numel() for p in model.parameters())
    for accumulation_steps, whole_gradients in ((1, 0), (4, 4 * count)):  # FSDP adds up unsummed ones whole
        plan = BatchPlan(8, 1, accumulation_steps, 8)
        alone, shared = (memory.state_bytes(model, plan, Job(0, 8, HERE.device, HERE.dtype, shard_size=shard_size))
                         for shard_size in (1, 8))
        assert alone == 16 * count
        assert alone / 8 < shared - whole_gradients < alone / 2


def test_what_large_models_need_of_fsdp_is_part_of_the_forecast():
    model = make_model(n_layer=12, n_embd=128)
    plan, block = BatchPlan(32, 1, 4, 8), sum(p.numel() for p in model.h[0].parameters())

    def forecast(dtype=torch.float32, shard_size=4, **options) -> int:
        return memory.state_bytes(model, plan, Job(0, 8, HERE.device, dtype, "hsdp", shard_size, **options))

    count = sum(p.numel() for p in model.parameters())
    assert forecast(shard_size=2) - forecast() == 16 * count // 4
    for dtype in (torch.float32, torch.bfloat16):  # which a block's weights are gathered in
        assert forecast(dtype, reshard_after_forward=False) - forecast(dtype) == 11 * block * dtype.itemsize
    assert forecast() - forecast(reduce_every_micro_batch=True) == 4 * count
