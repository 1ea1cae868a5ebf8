"""torch.compile of the model's parts: how often the compiler is called, and that a trial which fails leaves no trace.

A backend that counts, or fails, stands in for the compiler itself, which takes half a minute."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, TINY_RUN, on_ranks, torchrun

from flatgpt.data.order import EvalOrder
from flatgpt.data.shards import Split
from flatgpt.models.baselines import build_empty
from flatgpt.training import compiling, distributed, parallel, preflight
from flatgpt.training.device import DeviceConfig
from flatgpt.training.distributed import Job, ParallelConfig
from flatgpt.training.metrics import validation_loss
from flatgpt.training.optim import OptimConfig, build_optimizer
from model import GPT, GPTConfig

RANKS = {"ddp": 2, "fsdp": 2, "hsdp": 4}  # hsdp: two copies of the model, over two ranks each
LAYOUTS = ("ddp", "fsdp", pytest.param("hsdp", marks=pytest.mark.soak))
MICRO_SEQS, BLOCK_SIZE = 4, 16


def compile_with(put: Callable, backend: Callable) -> None:
    """Have the model's parts compiled by `backend(graph, inputs)`; `put` is a monkeypatch.setattr."""
    compile_in_place = nn.Module.compile
    put(nn.Module, "compile", lambda part, **options: compile_in_place(part, backend=backend))
    torch.compiler.reset()


def counting(put: Callable) -> list[torch.fx.GraphModule]:
    """The graphs that the compiler is given from now on."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_with(put, backend)
    return graphs


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError("no compiler for this")


def failing(put: Callable, where: str) -> None:
    """A compiler that fails in the forward pass, or makes what fails in the backward pass."""
    def backend(graph, inputs):
        if where == "forward":
            raise RuntimeError("no compiler for this")
        return lambda *args: [FailsInBackward.apply(y) if y.requires_grad else y for y in graph.forward(*args)]

    compile_with(put, backend)


def make(layout: str, job: Job) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=50, n_layer=3, n_head=2, n_embd=32))
    return parallel.materialize(build_empty(model.config), model.state_dict() if job.rank == 0 else None, job)


def join(layout: str, dtype: str = "float32"):
    return distributed.init_job(DeviceConfig(device="cpu", dtype=dtype),
                                ParallelConfig(parallel=layout, shard_size=2, timeout_s=60))


def train_steps(model: nn.Module, job: Job, num_steps: int = 4) -> list[tuple[float, float]]:
    """The losses and gradient norms of a few steps, over the ranks."""
    wrapped, optimizer = parallel.wrap(model, job, MICRO_SEQS), build_optimizer(model, OptimConfig())
    x = torch.randint(50, (MICRO_SEQS, BLOCK_SIZE), generator=torch.Generator().manual_seed(job.rank))
    seen = []
    for _ in range(num_steps):
        parallel.set_gradient_sync(wrapped, True, job)
        with job.autocast():
            _, loss = wrapped(x, x, 2 * x.numel())
        (loss * job.world_size).backward()
        norm = parallel.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
        seen.append((distributed.sum_over_ranks(loss.detach(), job).item(), norm.item()))
        optimizer.step()
        parallel.zero_grad(model, job)
    return seen


def losses_after_trials(layout: str, cases: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str | None, list]]:
    """For each case, where the compiler fails (""; nowhere, and none is asked for) and on which ranks: why the blocks
    are not compiled, and the steps after that."""
    found = []
    with join(layout) as job:
        for where, ranks in cases:
            with pytest.MonkeyPatch.context() as patched:
                model = make(layout, job)
                if job.rank in ranks:
                    failing(patched.setattr, where)
                else:
                    counting(patched.setattr)
                failure = compiling.compile_parts(model, "True" if where else "False", job, MICRO_SEQS)
                found.append((failure, train_steps(model, job)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trial_of_the_compiler_that_fails_changes_no_step(layout):
    cases = [("", ()), ("forward", (0, 1)), ("backward", (0, 1)), ("backward", (1,))]
    for (failure, undisturbed), *others in on_ranks(RANKS[layout], losses_after_trials, layout, cases):
        assert failure is None
        assert len(others) == 3
        for failure, steps in others:
            assert "no compiler for this" in failure
            assert steps == undisturbed


def forward_alone(layout: str) -> None:
    """What a pass that failed leaves behind in FSDP."""
    with join(layout) as job:
        model = make(layout, job)
        model(torch.zeros(1, 4, dtype=torch.long))
        parallel.wrap(model, job, MICRO_SEQS)


def test_parameters_that_are_not_sharded_are_never_trained():
    with pytest.raises(AssertionError, match="FSDP's parameters are not sharded"):
        on_ranks(2, forward_alone, "fsdp")


def count_graphs(layout: str, dtype: str) -> tuple[list[int], str | None]:
    """The graphs compiled after the trial, after some steps, and after an evaluation and some more."""
    with pytest.MonkeyPatch.context() as patched, join(layout, dtype) as job:
        model, graphs, counts = make(layout, job), counting(patched.setattr), []
        failure = compiling.compile_parts(model, "True", job, MICRO_SEQS)
        counts.append(len(graphs))
        train_steps(model, job)
        counts.append(len(graphs))
        tokens = torch.arange(200).numpy() % 50
        order = EvalOrder(Split([Path("val.bin")], 50, [tokens]), BLOCK_SIZE)
        for _ in range(2):
            validation_loss(model, order, MICRO_SEQS, job)
            train_steps(model, job, 1)
            counts.append(len(graphs))
        return counts, failure


@pytest.mark.parametrize(("layout", "dtype"), [
    ("ddp", "float32"), pytest.param("fsdp", "float32", marks=pytest.mark.soak), ("fsdp", "bfloat16"),
    pytest.param("hsdp", "bfloat16", marks=pytest.mark.soak)])
def test_all_blocks_share_the_trials_compilation(layout, dtype):
    """One graph is a block, one the loss of a chunk; each is compiled once more for evaluations, without gradients."""
    assert on_ranks(RANKS[layout], count_graphs, layout, dtype) == [([2, 2, 4, 4], None)] * RANKS[layout]


def test_a_run_compiles_no_shape_but_the_micro_batch(cli, tiny_data, monkeypatch):
    """Evaluations and samples included: --batch_size=3 makes micro-batches of 2."""
    graphs = counting(monkeypatch.setattr)
    options = [option for option in TINY_RUN if not option.startswith(("--batch_size", "--gradient"))]
    result = cli("train", *options, "--compile=True", "--batch_size=3", "--total_batch_size=64", "--sample_interval=2",
                 "--sample_tokens=4")
    assert result.code == 0, result.err
    assert "2 micro-batches x 2 sequences" in result.out
    assert len(graphs) == 4


@pytest.mark.soak
def test_a_run_whose_compiler_is_missing_ends_as_one_that_wants_none(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    said = {compiled: torchrun(2, ROOT / "train.py", *TINY_RUN, "--parallel=fsdp", f"--compile={compiled}",
                               f"--out_dir=out/{compiled}", cwd=tmp_path) for compiled in (True, False)}
    assert "torch.compile failed, going on without it" in said[True]
    assert "torch.compile failed" not in said[False]
    weights = [(tmp_path / "out" / str(compiled) / "checkpoints/latest/model.safetensors").read_bytes()
               for compiled in said]
    assert weights[0] == weights[1]


def test_deterministic_reaches_the_compiler_and_nccl_whatever_was_imported_before(monkeypatch):
    import torch._inductor.config  # reads its environment variables now

    names, asked = ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG"), []
    monkeypatch.setattr(distributed, "pick_device", lambda *args: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr(nn.Module, "compile", lambda part, **how: asked.append(how))
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32))
    precision, filled = torch.get_float32_matmul_precision(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        with distributed.init_job(DeviceConfig(dtype="bfloat16", deterministic=True)):
            compiling.compile_in_place(model)
        assert asked == [{"options": {"deterministic": True}}] * 3
        if not torch.__version__.startswith("2.9."):  # which lacks the option, so that such a run is not compiled
            torch.compile(model.h[0], **asked[0])  # raises for an option that this torch does not have
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert [os.environ[name] for name in names] == ["Ring", ":4096:8"]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.set_float32_matmul_precision(precision)
        for name in names:
            os.environ.pop(name, None)
    asked.clear()
    compiling.compile_in_place(model)
    assert asked == [{}] * 3


def fit_and_train(layout: str, cases: list[tuple[str, int]]) -> list[tuple[int, list]]:
    """For each case, where rank 1's memory is full ("": no trial is made) in a pass over how many sequences (0: never):
    the micro-batch that is found by what a GPU's trial does, and the steps after it."""
    forward, found = GPT.forward, []

    def overflow(model, idx, targets=None, num_targets=None, *documents):
        loss = forward(model, idx, targets, num_targets)[1]
        if job.rank == 1 and len(idx) == full_at and num_targets is None:
            if where == "forward":
                raise torch.OutOfMemoryError("forward")
            loss.register_hook(out_of_memory)
        return None, loss

    def out_of_memory(gradient):
        raise torch.OutOfMemoryError("backward")

    with join(layout) as job:
        for case in cases:
            where, full_at = case
            model, size = make(layout, job), MICRO_SEQS
            if where:
                with pytest.MonkeyPatch.context() as patched:
                    patched.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
                    patched.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: None)
                    fits = preflight._gpu_trial(model, job, "False")
                    patched.setattr(preflight, "_fits_host", lambda model, job, optimizer, plan, fits=fits: fits(plan))
                    patched.setattr(GPT, "forward", overflow)
                    size = preflight.fit_batch_size(model, 4, job)
            found.append((size, train_steps(model, job)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_size_that_does_not_fit_one_rank_is_no_ranks_and_changes_no_step(layout):
    cases = [("", 0), ("forward", 2), ("backward", 2), ("backward", 4), ("forward", 0)]
    for (_, undisturbed), *others in on_ranks(RANKS[layout], fit_and_train, layout, cases):
        assert others == [(size, undisturbed) for size in (1, 1, 2, 4)]
