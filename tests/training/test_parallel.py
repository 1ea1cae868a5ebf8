"""parallel.py: whatever the layout, the gradients are one process's, and whole tensors are the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import on_ranks, write_shard
from torch.utils._python_dispatch import TorchDispatchMode

from flatgpt.data.order import EvalOrder
from flatgpt.data.shards import Split
from flatgpt.models.baselines import build_empty
from flatgpt.planning.traffic import step_traffic
from flatgpt.training import distributed, parallel
from flatgpt.training.device import DeviceConfig
from flatgpt.training.distributed import Job, ParallelConfig
from flatgpt.training.metrics import validation_loss
from flatgpt.training.optim import OptimConfig, build_optimizer
from model import GPT, GPTConfig

ALONE = Job(0, 1, torch.device("cpu"), torch.float32)
LAYOUTS = ("ddp", "fsdp")
RANKS = {"ddp": 2, "fsdp": 2, "hsdp": 4}  # hsdp: two copies of the model, each over two ranks
LESS_TRAFFIC, LESS_MEMORY = {"reshard_after_forward": False}, {"reduce_every_micro_batch": True}
GRAD_CLIP = 0.5
BATCH_SEQS, MICRO_SEQS, BLOCK_SIZE = 8, 2, 16


def join(layout: str, dtype: str = "float32", shard_size: int = 2, **options):
    config = ParallelConfig(parallel=layout, shard_size=shard_size, timeout_s=60, **options)
    return distributed.init_job(DeviceConfig(device="cpu", dtype=dtype), config)


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=50, n_layer=2, n_head=2, n_embd=32, bias=True))


def materialize(job: Job) -> GPT:
    """That model on all ranks, as the layout has it."""
    model = make_model()
    return parallel.materialize(build_empty(model.config), model.state_dict() if job.rank == 0 else None, job)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (8, 16): rank 1 has far fewer targets than rank 0, its first micro-batch has none at all."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 50, (2, BATCH_SEQS, BLOCK_SIZE), generator=generator)
    y[4:6] = -1
    y[6, 3:] = -1
    y[1, :5] = -1
    return x, y


def accumulate(layout: str, options: dict, activation_checkpointing: bool = False):
    """The gradients of the batch, summed over micro-batches and ranks as train.py does it, before and after the clip,
    and their norm, on every rank."""
    with join(layout, **options) as job:
        model = materialize(job)
        model.activation_checkpointing = activation_checkpointing
        backward(parallel.wrap(model, job, MICRO_SEQS), job)
        before = gradients(model)
        norm = parallel.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)).item()
        return before, norm, gradients(model)


def backward(wrapped: torch.nn.Module, job: Job) -> None:
    """The passes of a step, in two micro-batches a rank."""
    x, y = make_batch()
    num_targets = (y >= 0).sum()
    mine = slice(*(BATCH_SEQS * r // job.world_size for r in (job.rank, job.rank + 1)))
    x, y = x[mine], y[mine]
    for start in (0, len(x) // 2):
        rows = slice(start, start + len(x) // 2)
        parallel.set_gradient_sync(wrapped, rows.stop >= len(x), job)
        with job.autocast():
            _, loss = wrapped(x[rows], y[rows], num_targets)
        (loss * job.world_size).backward()


def gradients(model: GPT) -> dict[str, np.ndarray]:
    return {name: parallel.full_tensor(p.grad).float().numpy().copy() for name, p in model.named_parameters()}


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


@pytest.mark.parametrize(("layout", "activation_checkpointing", "options"), [
    ("ddp", False, {}), ("ddp", True, {}), ("fsdp", False, {}), ("fsdp", True, LESS_TRAFFIC | LESS_MEMORY),
    ("hsdp", False, {}), pytest.param("hsdp", True, LESS_TRAFFIC | LESS_MEMORY, marks=pytest.mark.soak)])
def test_gradients_and_their_norm_are_one_processs(expected, layout, activation_checkpointing, options):
    for before, norm, after in on_ranks(RANKS[layout], accumulate, layout, options, activation_checkpointing):
        assert norm == pytest.approx(expected[1], abs=1e-6)
        assert_close(before, expected[0])
        assert_close(after, expected[2])


def test_16_bit_gradients_of_both_layouts_are_close():
    (ddp, ddp_norm, _), (fsdp, fsdp_norm, _) = (on_ranks(2, accumulate, layout, {"dtype": "bfloat16"})[0]
                                                for layout in LAYOUTS)
    assert fsdp_norm == pytest.approx(ddp_norm, rel=0.01)
    for name, value in ddp.items():
        assert np.linalg.norm(fsdp[name] - value) < 0.03 * np.linalg.norm(value), name


def take_apart_and_put_together(layout: str):
    """Shard a model over the ranks; what `whole` gives, and rank 0's halves sent out by `from_rank0`."""
    with join(layout) as job:
        model = materialize(job)
        gathered, returned, numels = {}, {}, {}
        for name, p in model.named_parameters():
            gathered[name] = parallel.full_tensor(p.detach()).numpy().copy()
            sent = torch.from_numpy(gathered[name] / 2) if job.rank == 0 else torch.full(p.shape, torch.nan)
            laid_out = parallel.from_rank0(sent, p, job)
            assert laid_out.placements == p.placements
            numels[name] = laid_out.to_local().numel()
            returned[name] = parallel.full_tensor(laid_out).numpy().copy()
        return gathered, returned, numels


@pytest.mark.parametrize(("layout", "num_copies"), [("fsdp", 1), ("hsdp", 2)])
def test_whole_tensors_are_the_models_and_rank_0s_go_back_to_where_they_came_from(layout, num_copies):
    model = {name: p.detach().numpy() for name, p in make_model().named_parameters()}
    ranks = on_ranks(RANKS[layout], take_apart_and_put_together, layout)
    for gathered, returned, _ in ranks:
        for name, value in model.items():
            assert np.array_equal(gathered[name], value), name
            assert np.array_equal(returned[name], value / 2), name
    for name, value in model.items():
        assert sum(numels[name] for _, _, numels in ranks) == num_copies * value.size
        assert all(numels[name] < value.size for _, _, numels in ranks), name


def evaluate(layout: str, folder: Path, num_seqs: list[int]) -> list[float]:
    with join(layout) as job:
        model = materialize(job)
        return [validation_loss(model, order, MICRO_SEQS, job) for order in orders(folder, num_seqs)]


def orders(folder: Path, num_seqs: list[int]) -> list[EvalOrder]:
    split = Split([folder / "val_000000.bin"], 50)
    return [EvalOrder(split, BLOCK_SIZE, num) for num in num_seqs]


@pytest.mark.parametrize("layout", RANKS)
def test_validation_loss_does_not_depend_on_the_layout(tmp_path, layout):
    write_shard(tmp_path / "val_000000.bin", np.random.default_rng(0).integers(0, 50, 16 * 9 + 5))
    num_seqs = [1, 3, 5, 0]  # rank 0 without any, two batches against one, ...; 0 = all 10, the last of them short
    alone = [validation_loss(make_model(), order, MICRO_SEQS, ALONE) for order in orders(tmp_path, num_seqs)]
    assert len(set(alone)) == len(alone)
    for losses in on_ranks(RANKS[layout], evaluate, layout, tmp_path, num_seqs):
        assert losses == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_float16_is_refused_with_fsdp(monkeypatch, layout):
    monkeypatch.setattr(distributed, "pick_dtype", lambda name, device: torch.float16)
    with pytest.raises(ValueError, match=f"dtype=float16 does not work with parallel={layout}"), join(layout):
        pass


class Sizes(TorchDispatchMode):
    """Counts collectives by torch's name and the elements of the largest tensor they are given: of an all-gather what
    comes out, of a reduce-scatter what goes in."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # it comes again with the parts
        if func.name().startswith("c10d::"):
            flat = [each for arg in args for each in (arg if isinstance(arg, list) else [arg])]
            self.seen[func.name(), max(each.numel() for each in flat if isinstance(each, torch.Tensor))] += 1
        return func(*args, **kwargs or {})


def count_collectives(layout: str, options: dict) -> list[Counter]:
    """What this rank sends in the passes of a step of two micro-batches, in its clip, update and clean-up, by torch's
    names; then in an evaluation's pass after that. Last, what the passes send by names and sizes."""
    with join(layout, **options) as job:
        model = materialize(job)
        wrapped, optimizer = parallel.wrap(model, job, MICRO_SEQS), build_optimizer(model, OptimConfig())
        tokens = torch.zeros(MICRO_SEQS, BLOCK_SIZE, dtype=torch.long)
        seen = []
        for part in (lambda: backward(wrapped, job),
                     lambda: parallel.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), 1.0)),
                     optimizer.step, lambda: parallel.zero_grad(model, job), lambda: evaluate_once(model, tokens)):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                part()
            seen.append(Counter(event.name for event in profile.events() if event.name.startswith("c10d::")))
        with Sizes() as sizes:
            backward(wrapped, job)
        return [*seen, sizes.seen]


def evaluate_once(model: GPT, tokens: torch.Tensor) -> None:
    before = sum(parallel.local(p).numel() for p in model.parameters())
    with torch.no_grad():
        model(tokens, tokens)
    parallel.reshard(model)
    assert sum(parallel.local(p).numel() for p in model.parameters()) == before


TORCHS_NAMES = {"all-reduce": "c10d::allreduce_", "all-gather": "c10d::_allgather_base_",
                "reduce-scatter": "c10d::_reduce_scatter_base_"}


@pytest.mark.parametrize(("layout", "num_ranks", "options"), [
    ("ddp", 2, {}), ("fsdp", 2, {}), ("fsdp", 2, LESS_TRAFFIC), ("fsdp", 2, LESS_MEMORY), ("hsdp", 4, LESS_MEMORY),
    pytest.param("hsdp", 4, {}, marks=pytest.mark.soak)])
def test_a_step_takes_the_collectives_that_are_reckoned_with_and_no_more(layout, num_ranks, options):
    """FSDP gathers and reduces each block by itself, and all that is in none."""
    shards = {"ddp": 1, "fsdp": num_ranks, "hsdp": 2}[layout]
    passes, by_size, evaluation = Counter(), Counter(), Counter()
    norms = {} if layout == "ddp" else {"c10d::allreduce_": 2 if torch.__version__.startswith("2.9.") else 1}
    for each in step_traffic(make_model(), layout, num_ranks, shards, micro_batches=2, **options):
        name = TORCHS_NAMES[each.kind]
        if each.part != "the norm":
            passes[name] += each.count
            by_size[name, each.num_bytes // 4] += each.count
        if each.kind == "all-gather":
            evaluation[name] += make_model().config.n_layer if each.part == "a block" else 1
    for seen in on_ranks(num_ranks, count_collectives, layout, options):
        assert seen == [passes, Counter(norms), Counter(), Counter(), evaluation, by_size]


def test_a_steps_collectives_are_as_many_as_benchmarks_md_says():
    """Two blocks, two micro-batches; by hand, in L and m."""
    num_blocks = m = 2
    for layout, shards in (("fsdp", 4), ("hsdp", 2)):
        for options, gathers, scatters in (({}, m * (2 * num_blocks + 1), num_blocks + 1),
                                           (LESS_TRAFFIC, m * (num_blocks + 1), num_blocks + 1),
                                           (LESS_MEMORY, m * (2 * num_blocks + 1), m * (num_blocks + 1))):
            count = Counter()
            for each in step_traffic(make_model(), layout, 4, shards, m, **options):
                count[each.kind] += each.count
            assert count == {"all-gather": gathers, "reduce-scatter": scatters,
                             "all-reduce": 1 + (num_blocks + 1) * (layout == "hsdp")}
