"""distributed.py: whatever the layout, the gradients are one process's; what the ranks must agree on, they compare."""

import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, on_ranks, write_shard

from flatgpt.data.loader import EvalOrder
from flatgpt.data.shards import Split
from flatgpt.models.baselines import build_empty
from flatgpt.options import flatten
from flatgpt.training import distributed, hosts
from flatgpt.training.device import DeviceConfig
from flatgpt.training.distributed import Job, ParallelConfig
from flatgpt.training.metrics import validation_loss
from flatgpt.training.optim import OptimConfig, build_optimizer
from model import GPT, GPTConfig
from train import TrainConfig

ALONE = Job(0, 1, torch.device("cpu"), torch.float32)
LAYOUTS = ("ddp", "fsdp")
GRAD_CLIP = 0.5
MUON = OptimConfig(optimizer="muon")
BATCH_SEQS, MICRO_SEQS, BLOCK_SIZE = 8, 2, 16  # two ranks with two micro-batches each


def join(layout: str, dtype: str = "float32"):
    return distributed.init_job(DeviceConfig(device="cpu", dtype=dtype), ParallelConfig(parallel=layout, timeout_s=60))


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=50, n_layer=2, n_head=2, n_embd=32, bias=True))


def materialize(job: Job) -> GPT:
    """That model on all ranks, as the layout has it."""
    model = make_model()
    return distributed.materialize(build_empty(model.config), model.state_dict() if job.rank == 0 else None, job)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (8, 16): rank 1 has far fewer targets than rank 0, its first micro-batch has none at all."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 50, (2, BATCH_SEQS, BLOCK_SIZE), generator=generator)
    y[4:6] = -1
    y[6, 3:] = -1
    y[1, :5] = -1
    return x, y


def accumulate(layout: str, dtype: str = "float32", activation_checkpointing: bool = False):
    """The gradients of the batch, summed over micro-batches and ranks as train.py does it, before and after the clip,
    and their norm, on every rank."""
    with join(layout, dtype) as job:
        return accumulate_on(job, activation_checkpointing)


def accumulate_on(job: Job, activation_checkpointing: bool):
    model = materialize(job)
    model.activation_checkpointing = activation_checkpointing
    backward(distributed.wrap(model, job, MICRO_SEQS), job)
    before = gradients(model)
    norm = distributed.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)).item()
    return before, norm, gradients(model)


def backward(wrapped: torch.nn.Module, job: Job) -> None:
    x, y = make_batch()
    num_targets = (y >= 0).sum()
    mine = slice(*(BATCH_SEQS * r // job.world_size for r in (job.rank, job.rank + 1)))
    x, y = x[mine], y[mine]
    for start in range(0, len(x), MICRO_SEQS):
        rows = slice(start, start + MICRO_SEQS)
        distributed.set_gradient_sync(wrapped, rows.stop >= len(x))
        with job.autocast():
            _, loss = wrapped(x[rows], y[rows], num_targets)
        (loss * job.world_size).backward()


def gradients(model: GPT) -> dict[str, np.ndarray]:
    return {name: distributed.full_tensor(p.grad).float().numpy().copy() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def expected():
    """The same from one process, the whole batch at once and torch's own loss over whole logits."""
    model = make_model()
    x, y = make_batch()
    torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), ignore_index=-1).backward()
    before = gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP).item()
    assert norm > 2 * GRAD_CLIP  # it clips
    return before, norm, gradients(model)


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(value).max() > 1e-4, name  # there is something to see
        assert np.abs(ours[name] - value).max() <= 1e-6, name


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_their_norm_are_one_processs(expected, layout, activation_checkpointing):
    for before, norm, after in on_ranks(2, accumulate, layout, "float32", activation_checkpointing):
        assert norm == pytest.approx(expected[1], abs=1e-6)
        assert_close(before, expected[0])
        assert_close(after, expected[2])


def test_16_bit_gradients_of_both_layouts_are_close():
    (ddp, ddp_norm, _), (fsdp, fsdp_norm, _) = (on_ranks(2, accumulate, layout, "bfloat16")[0] for layout in LAYOUTS)
    assert fsdp_norm == pytest.approx(ddp_norm, rel=0.01)
    for name, value in ddp.items():
        assert np.linalg.norm(fsdp[name] - value) < 0.03 * np.linalg.norm(value), name


def update_with_muon(layout: str):
    with join(layout) as job:
        return update_with_muon_on(job)


def update_with_muon_on(job: Job) -> dict[str, np.ndarray]:
    """What two updates by the batch make of the blocks' matrices."""
    model = materialize(job)
    wrapped, optimizer = distributed.wrap(model, job, MICRO_SEQS), build_optimizer(model, MUON, torch.bfloat16)
    for _ in range(2):
        backward(wrapped, job)
        optimizer.step()
        distributed.zero_grad(model, job)
    return muons(model, optimizer)


def muons(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Muon's weights, and what it keeps. (AdamW's one kernel rounds by where in memory an element lies.)"""
    tensors = {name: p for name, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    tensors |= {f"{name}'s momentum": optimizer.state[p]["momentum_buffer"] for name, p in tensors.items()}
    return {name: distributed.full_tensor(tensor.detach()).numpy().copy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_muons_updates_are_one_processs_and_the_same_on_all_ranks(layout):
    alone = update_with_muon_on(ALONE)
    first, second = on_ranks(2, update_with_muon, layout)
    for name, start in make_model().named_parameters():
        if name not in alone:
            continue
        assert np.array_equal(first[name], second[name]), name
        moved = np.linalg.norm(alone[name] - start.detach().numpy())
        # Gradients agree to about 1e-6 of themselves. Where that decides how an element is rounded to bfloat16, to
        # within 0.4%, Newton-Schulz passes it on, magnified where it is small: so some percents, not 1e-6.
        assert np.linalg.norm(first[name] - alone[name]) < 0.02 * moved, name


def update_with_given_gradients(layout: str):
    with join(layout) as job:
        return update_with_given_gradients_on(job)


def update_with_given_gradients_on(job: Job) -> dict[str, np.ndarray]:
    """What two updates by random gradients make of the blocks' matrices."""
    model = materialize(job)
    optimizer = build_optimizer(model, MUON, torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        for p in model.parameters():
            p.grad = distributed.from_rank0(torch.randn(p.shape, generator=generator), p, job)
        optimizer.step()
    return muons(model, optimizer)


def test_muon_over_parts_makes_the_same_bytes_of_the_same_gradients():
    alone = update_with_given_gradients_on(ALONE)
    assert len(alone) == 2 * 2 * 4  # in two blocks four matrices, and as many means
    for ours in on_ranks(3, update_with_given_gradients, "fsdp"):  # over which 32 rows fall unevenly
        assert ours.keys() == alone.keys()
        for name, value in alone.items():
            assert np.array_equal(ours[name], value), name


def take_apart_and_put_together():
    """Shard a model over the ranks; what `whole` gives, and rank 0's halves sent out by `from_rank0`."""
    with join("fsdp") as job:
        model = materialize(job)
        gathered, returned, numels = {}, {}, {}
        for name, p in model.named_parameters():
            gathered[name] = distributed.full_tensor(p.detach()).numpy().copy()
            sent = torch.from_numpy(gathered[name] / 2) if job.rank == 0 else torch.full(p.shape, torch.nan)
            laid_out = distributed.from_rank0(sent, p, job)
            assert laid_out.placements == p.placements
            numels[name] = laid_out.to_local().numel()
            returned[name] = distributed.full_tensor(laid_out).numpy().copy()
        return gathered, returned, numels


def test_whole_tensors_are_the_models_and_rank_0s_go_back_to_where_they_came_from():
    model = {name: p.detach().numpy() for name, p in make_model().named_parameters()}
    ranks = on_ranks(2, take_apart_and_put_together)
    for gathered, returned, _ in ranks:
        for name, value in model.items():
            assert np.array_equal(gathered[name], value), name
            assert np.array_equal(returned[name], value / 2), name
    for name, value in model.items():
        assert sum(numels[name] for _, _, numels in ranks) == value.size
        assert all(numels[name] < value.size for _, _, numels in ranks), name


def disagree():
    with join("ddp") as job:
        distributed.check_agreement({"learning_rate": 0.1, "n_layer": 2}, job)
        try:
            distributed.check_agreement({"learning_rate": (0.1, 0.2)[job.rank], "n_layer": 2}, job)
        except ValueError as error:
            return str(error)


def test_ranks_that_disagree_all_hear_of_what():
    for message in on_ranks(2, disagree):
        assert "learning_rate is 0.2 on rank 1 and 0.1 on rank 0" in message
        assert "n_layer" not in message


def meet_on_two_hosts(address_of_east: str):
    """What rank 0 on `east` and rank 1 on `west` say when they join, and then when rank 0 fails at what it does."""
    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: ("east", "west")[rank]
    hosts._gloo_address = lambda: (address_of_east, "10.0.0.2")[rank]
    try:
        with join("ddp") as job:
            distributed.on_rank0(lambda: 1 / 0, job)
    except (OSError, ZeroDivisionError) as error:
        return str(error)


@pytest.mark.parametrize("address", ["127.0.1.1", "::1"])
def test_a_host_that_is_known_by_loopback_is_named_on_all(address):
    for message in on_ranks(2, meet_on_two_hosts, address):
        assert f"east ({address}) listens only on loopback" in message
        assert "GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME" in message
        assert "west" not in message


def test_another_host_hears_where_to_read_why_rank_0_failed():
    east, west = on_ranks(2, meet_on_two_hosts, "eth0")
    assert east == "division by zero"
    assert west == "rank 0 on east (eth0) has failed: its own output says why"


def test_a_connection_that_breaks_is_one_line_with_the_hosts_and_no_defect_is_taken_for_one():
    job = Job(1, 2, torch.device("cpu"), torch.float32, cpu_group=object(),
              hosts=("east (10.0.0.1)", "west (10.0.0.2)"))
    broken = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4321\nmore"
    line = (r"^rank 1 on west \(10.0.0.2\) lost the connection to east \(10.0.0.1\): RuntimeError: Connection closed "
            r"by peer \[10.0.0.1\]:4321. What was saved is intact")
    with pytest.raises(OSError, match=line), hosts.lost_connections(job):
        raise RuntimeError(broken)
    for defect in ("[enforce fail at /src/third_party/gloo/gloo/transport/tcp/pair.cc:446] 8 vs 4", "size mismatch"):
        with pytest.raises(RuntimeError, match=re.escape(defect)), hosts.lost_connections(job):
            raise RuntimeError(defect)


def test_connecting_has_an_end():
    code = ("import torch, time\nfrom flatgpt.training import distributed, hosts\n"
            "here = distributed.Job(0, 2, torch.device('cpu'), torch.float32,"
            "hosts=('east (10.0.0.1)', 'west (10.0.0.2)'))\n"
            "with hosts.deadline(0, here): time.sleep(100)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: rank 0 on east (10.0.0.1) cannot connect to the others, which listen at ")


def share(marked: dict) -> tuple[dict, str]:
    """A run's options on this rank once rank 0's count, and what the ranks disagree about then."""
    with join("ddp") as job:
        config = TrainConfig(max_minutes=job.rank + 1.0)
        config.run.out_dir, config.log.wandb_run_name = f"out/{job.rank}", f"run-{job.rank}"
        config.optim.learning_rate = marked["learning_rate"][job.rank]
        distributed.share_rank0s(config, job)
        try:
            distributed.check_agreement(flatten(config), job)
        except ValueError as error:
            return flatten(config), str(error)
        return flatten(config), ""


@pytest.mark.parametrize("learning_rates", [(0.1, 0.1), (0.1, 0.2)])
def test_what_only_rank_0_acts_on_is_rank_0s_and_nothing_else_is(learning_rates):
    for rank, (options, fault) in enumerate(on_ranks(2, share, {"learning_rate": learning_rates})):
        assert [options[key] for key in ("out_dir", "wandb_run_name", "max_minutes")] == ["out/0", "run-0", 1.0]
        assert options["learning_rate"] == learning_rates[rank]
        assert ("learning_rate is 0.2 on rank 1" in fault) == (len(set(learning_rates)) == 2)
        for key in ("out_dir", "wandb_run_name", "max_minutes"):
            assert key not in fault


def evaluate(layout: str, folder: Path, num_seqs: list[int]) -> list[float]:
    with join(layout) as job:
        model = materialize(job)
        return [validation_loss(model, order, MICRO_SEQS, job) for order in orders(folder, num_seqs)]


def orders(folder: Path, num_seqs: list[int]) -> list[EvalOrder]:
    split = Split([folder / "val_000000.bin"], 50)
    return [EvalOrder(split, BLOCK_SIZE, num) for num in num_seqs]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_loss_does_not_depend_on_the_layout(tmp_path, layout):
    write_shard(tmp_path / "val_000000.bin", np.random.default_rng(0).integers(0, 50, 16 * 9 + 5))
    num_seqs = [1, 3, 5, 0]  # rank 0 without any, two batches against one, ...; 0 = all 10, the last of them short
    alone = [validation_loss(make_model(), order, MICRO_SEQS, ALONE) for order in orders(tmp_path, num_seqs)]
    assert len(set(alone)) == len(alone)
    for losses in on_ranks(2, evaluate, layout, tmp_path, num_seqs):
        assert losses == pytest.approx(alone, abs=1e-6)


def test_float16_is_refused_with_fsdp(monkeypatch):
    monkeypatch.setattr(distributed, "pick_dtype", lambda name, device: torch.float16)
    with pytest.raises(ValueError, match="dtype=float16 does not work with parallel=fsdp"), join("fsdp"):
        pass


def count_collectives(layout: str) -> dict[str, Counter]:
    """What the ranks send each other in the parts of a step, by torch's names."""
    with join(layout) as job:
        model = materialize(job)
        wrapped, optimizer = distributed.wrap(model, job, MICRO_SEQS), build_optimizer(model, OptimConfig())
        tokens = torch.zeros(MICRO_SEQS, BLOCK_SIZE, dtype=torch.long)
        seen = {}
        for part, do in (("passes", lambda: wrapped(tokens, tokens)[1].backward()),
                         ("clip", lambda: distributed.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), 1.0))),
                         ("update", optimizer.step), ("zero", lambda: distributed.zero_grad(model, job))):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                do()
            seen[part] = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
        return seen


def test_a_step_takes_no_more_collectives_than_it_has_to():
    """FSDP: a gather a pass for each of the two blocks, one for what is in none, a scatter of each one's gradients."""
    clip = 2 if torch.__version__.startswith("2.9.") else 1  # which makes a whole norm twice
    expected = {"ddp": [{"c10d::allreduce_": 1}, {}, {}, {}],
                "fsdp": [{"c10d::_allgather_base_": 5, "c10d::_reduce_scatter_base_": 3}, {"c10d::allreduce_": clip},
                         {}, {}]}
    for layout in LAYOUTS:
        assert list(on_ranks(2, count_collectives, layout)[0].values()) == expected[layout]
