"""benchmarks/scaling.py by hand; rates.py counts what there is, and both print their tables."""

import re
from dataclasses import replace

import pytest
import torch

from benchmarks import rates, scaling
from benchmarks.scaling import Link, Work, gpus, plan_work, ring_seconds, send_seconds, step_seconds
from flatgpt.data.loader import BatchPlan
from flatgpt.models.baselines import build_empty
from flatgpt.planning.traffic import Collective
from model import GPTConfig

PLAIN = gpus("InfiniBand")._replace(between=Link(1e8, 10.0), start_s=0.5, inside=dict.fromkeys(
    ("all-reduce", "all-gather", "reduce-scatter"), Link(1e9, 1.0)))
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=128)


def test_a_ring_takes_its_hops_and_the_slower_of_its_links():
    assert ring_seconds(PLAIN, "all-reduce", 4e9, 1, 1) == 0
    assert ring_seconds(PLAIN, "all-reduce", 4e9, 4, 4) == pytest.approx(0.5 + 6 + 6 / 4 * 4)  # within a node
    assert ring_seconds(PLAIN, "all-gather", 4e9, 4, 4) == pytest.approx(0.5 + 3 + 3 / 4 * 4)
    # two nodes of two: of three hops one leads from node to node, over the adapters of both ranks
    assert ring_seconds(PLAIN, "all-gather", 4e9, 4, 2) == pytest.approx(0.5 + 2 + 10 + 3 / 4 * 4e9 / 2e8)
    assert ring_seconds(PLAIN, "all-gather", 4e9, 4, 1) == pytest.approx(0.5 + 30 + 3 / 4 * 4e9 / 1e8)


def test_hsdps_shards_are_in_a_node_and_its_replicas_are_not():
    work = Work(build_empty(TINY), "hsdp", 8, BatchPlan(64, 1, 1, 64))
    gather = Collective("all-gather", "shards", "a block", 1, 8_000_000)
    assert send_seconds(gather, work, PLAIN) == ring_seconds(PLAIN, "all-gather", 8e6, 8, 8)
    assert send_seconds(gather._replace(group="replicas"), work, PLAIN) == ring_seconds(PLAIN, "all-gather", 8e6, 8, 1)


def test_a_step_of_one_process_is_its_work_and_nothing_else():
    """Without launches and memory, 6 N + 12 L C T operations a token."""
    model = build_empty(TINY)
    cluster = gpus("InfiniBand")._replace(flops=1e6, launch_s=0.0, memory_bytes_per_s=1e30)
    flops = 6 * (sum(p.numel() for p in model.parameters()) - 16 * 32) + 12 * 2 * 32 * 16
    for plan in (BatchPlan(4, 2, 2, 1), BatchPlan(4, 4, 1, 1)):
        step_s = step_seconds(Work(model, "ddp", 1, plan), cluster)
        assert step_s == pytest.approx(4 * 16 * flops / 1e6, rel=0.02)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hsdp"])
def test_links_without_end_leave_a_step_its_computing_and_slow_ones_add_to_it(parallel):
    model, plan = build_empty(replace(TINY, n_embd=512)), BatchPlan(128, 4, 2, 16)
    work = Work(model, parallel, {"ddp": 1, "fsdp": 16, "hsdp": 8}[parallel], plan)
    fast = gpus("InfiniBand")._replace(start_s=0.0, between=Link(1e30, 0.0), inside=dict.fromkeys(
        PLAIN.inside, Link(1e30, 0.0)))
    computing_s = 2 * scaling.passes(work, fast).all_s(2) + scaling.end_seconds(work, fast)
    assert step_seconds(work, fast) == pytest.approx(computing_s)
    seconds = [step_seconds(work, gpus(network)) for network in ("InfiniBand", "Ethernet")]
    assert computing_s < seconds[0] < seconds[1]
    assert step_seconds(work, gpus("InfiniBand")._replace(overlaps=False)) > seconds[0]


def test_what_does_not_fit_or_has_no_sequence_for_a_gpu_has_no_step():
    assert plan_work("8B", "ddp", 8, 2**22, "InfiniBand") == "does not fit"
    assert plan_work("124M", "ddp", 4096, 2**19, "InfiniBand") == "only 512 sequences"
    work = plan_work("124M", "ddp", 8, 2**19, "InfiniBand")
    assert work.plan.seqs_per_rank == 64
    assert not work.checkpointing


def test_muons_gather_is_padded_only_where_that_is_less():
    """GPT-2 small has six equal stacks of 28 MB in bfloat16, 170 MB together."""
    model = scaling.empty("124M")
    sizes = [scaling.muon_gather_bytes(model, world_size, 1) for world_size in (2, 6, 4096)]
    assert sizes == [2 * 12 * 12 * 768**2, 2 * 12 * 12 * 768**2, 2 * 2 * 12 * 12 * 768**2]


def test_operations_and_bytes_are_counted_as_they_are_made():
    with rates.Passing() as passing:
        x = torch.ones(10)
        _ = x.view(2, 5) + 1  # the view is free
        _ = torch.ones(3, 4) @ torch.ones(4, 5)
    assert passing.launches == 5
    assert passing.num_bytes == 4 * (10 + 2 * 10 + 12 + 20)
    counts = rates.count(TINY, 32)
    assert 20 < counts.block_launches < 200
    assert counts.block_bytes > 4 * 2 * 10


def test_the_tables_are_printed(cli, monkeypatch):
    monkeypatch.setattr(scaling, "GPUS", (8, 64))
    monkeypatch.setattr(scaling, "SIZES", {"124M": scaling.SIZES["124M"], "8B": scaling.SIZES["8B"]})
    result = cli("benchmarks.scaling")
    assert result.code == 0, result.err
    assert [*re.findall(r"^### (.*)$", result.out, re.M)] == [*scaling.TABLES]
    assert re.search(r"^\| 8B \| 64 \| 4 M \| does not fit \| .* ms, \d+%, \d+% \|", result.out, re.M)


def test_the_check_prints_what_was_predicted_and_measured(cli, monkeypatch):
    monkeypatch.setattr(rates, "SHAPES", [TINY])
    monkeypatch.setattr(rates, "ROUNDS", 1)
    result = cli("benchmarks.scaling", "--check=True")
    assert result.code == 0, result.err
    assert re.search(r"^\| 2 x 32 x 64 \| 1 \|  \| \d+ ms \| \d+ ms \| \d+\.\d\d \|$", result.out, re.M)
