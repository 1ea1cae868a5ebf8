"""The main job on CUDA: training, resuming, fitting the batch, sampling, and the same numbers as elsewhere.

`make test-gpu` runs these on a machine with an NVIDIA GPU; those over two processes need two of them. An H100 takes
about six minutes, reckoned, when the compiler's caches are empty: some twenty compilations of a tiny model, of eight to
twenty seconds each, are most of it. With the caches of an earlier time it is about three.

The scripts run in this process, one after the other, and each test leaves it as it was. Where a tolerance is wider than
float32's rounding, it says what is rounded.
"""

import collections
import functools
import gc
import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, Result, records_of, run_process, torchrun
from safetensors.torch import load_file

from flatgpt.data.loader import pin
from flatgpt.models.attention import attend, has_varlen_kernel
from flatgpt.models.baselines import build
from flatgpt.models.generate import Decoder
from flatgpt.models.language_model import LanguageModel
from flatgpt.models.sampling import Sampler
from flatgpt.run_folder import read_trainer
from flatgpt.training import compiling, preflight
from flatgpt.training.checkpoint import RunConfig, RunFolder
from flatgpt.training.device import pick_attention, pick_dtype
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, build_optimizer, optimizer_state
from flatgpt.training.resume import Progress, read_optimizer
from model import GPT, Block, GPTConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

CUDA = torch.device("cuda", 0)
RUN = tuple(option for option in TINY_RUN if not option.startswith(("--device", "--dtype")))  # auto, auto
RUN_WITHOUT_BATCH = tuple(option for option in RUN if not option.startswith(("--batch_size", "--gradient")))
SHAPE = {"block_size": 64, "vocab_size": 300, "n_layer": 3, "n_head": 4, "n_embd": 128}


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE | changes))


def run(cli, script: str, *options: str) -> Result:
    """A script that is expected to succeed; the test fails with all that it said."""
    result = cli(script, *options)
    assert result.code == 0, f"{script}.py {' '.join(options)} ended with {result.code}:\n{result.out}\n{result.err}"
    return result


def val_losses(folder: str) -> list[float]:
    return [record["val/loss"] for record in records_of(folder) if "val/loss" in record]


def assert_same_weights(one: str, other: str, why: str) -> None:
    """The newest checkpoints of two runs, byte by byte."""
    paths = [Path(folder, "checkpoints/latest/model.safetensors") for folder in (one, other)]
    first, second = map(load_file, paths)
    differing = {name: (first[name] - second[name]).abs().max().item() for name in first
                 if not torch.equal(first[name], second[name])}
    assert not differing, f"{one} and {other} should have the same weights, because {why}; the differences: {differing}"
    assert (paths[0].read_bytes() == paths[1].read_bytes()), f"{one} and {other}: the same weights in other bytes"


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """What a script sets is for its process; these tests run many in one, and the compiler takes so many shapes of a
    block before it gives up on it."""
    environment = dict(os.environ)
    # torch looks for this once a process, at the first product: a script that sets it would come too late here.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    for key in os.environ.keys() - environment.keys():  # NCCL_ALGO
        del os.environ[key]
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


# Whole runs


def test_a_run_with_all_defaults_learns_as_it_does_on_a_cpu_and_samples_and_is_evaluated(cli, tiny_data):
    said = run(cli, "train", *RUN).out
    assert "torch.compile failed" not in said, f"the blocks should have been compiled:\n{said}"
    run(cli, "train", *TINY_RUN, "--out_dir=out/cpu")
    # Six steps in bfloat16, of three digits, against float32; on a CPU they differ by 3e-5.
    np.testing.assert_allclose(val_losses("out/tiny"), val_losses("out/cpu"), rtol=3e-3)
    texts = [run(cli, "sample", "--out_dir=out/tiny", "--prompt=the", "--num_samples=3", "--max_new_tokens=50",
                 "--top_p=0.9", "--deterministic=True").out for _ in range(2)]
    assert "on cuda" in texts[0], texts[0]
    samples = [text.rpartition("\n---")[0] for text in texts]  # without the speed
    assert samples[0] == samples[1], "one seed should write one text"
    measured = json.loads(run(cli, "eval", "--init_from=out/tiny/checkpoints/latest", "--json=True").out)
    # The same windows, in eager blocks, of which bfloat16 rounds other sums.
    np.testing.assert_allclose(measured["results"]["tiny"]["loss"], val_losses("out/tiny")[-1], rtol=2e-3)


def test_a_run_that_is_resumed_by_another_process_ends_byte_identical(tiny_data, tmp_path, monkeypatch):
    """Compiled, with all defaults, and with no variable set but those that train.py sets itself."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    said = [run_process(ROOT / "train.py", *RUN, "--deterministic=True", *options, cwd=tmp_path)
            for options in (("--out_dir=out/whole",), ("--max_iters=3",), ())]
    assert "resuming out/tiny at step 3" in said[2], said[2]
    assert "torch.compile failed" not in "".join(said), "\n".join(said)
    assert_same_weights("out/tiny", "out/whole", "deterministic=True")


@pytest.mark.parametrize("options", [
    ("--compile=False",), ("--compile=False", "--dtype=float16"), ("--activation_checkpointing=True", "--dropout=0.2"),
    ("--compile=False", "--optimizer=muon", "--pos=rope", "--qk_norm=True"), ("--compile=False", "--model=lstm"),
    ("--compile=False", "--block_size=1024", "--batch_size=4", "--gradient_accumulation_steps=1")])
def test_a_resumed_run_ends_byte_identical(cli, tiny_data, options):
    """The last has 4,096 tokens a micro-batch: from 3,073 on, torch sums a token table's gradient in another way."""
    options = (*RUN, "--deterministic=True", *options)
    run(cli, "train", *options, "--out_dir=out/whole")
    run(cli, "train", *options, "--max_iters=3")
    said = run(cli, "train", *options).out
    assert "resuming out/tiny at step 3" in said, said
    assert_same_weights("out/tiny", "out/whole", "deterministic=True")


def test_a_compiled_run_that_writes_samples_ends_as_one_that_does_not(cli, tiny_data):
    for name, samples in (("silent", ()), ("writes", ("--sample_interval=2", "--sample_tokens=40"))):
        run(cli, "train", *RUN, *samples, "--deterministic=True", f"--out_dir=out/{name}")
    assert_same_weights("out/silent", "out/writes", "samples are written without the compiled blocks")
    assert [record["step"] for record in records_of("out/writes") if "samples" in record] == [2, 4, 6]


def test_a_float16_gradient_that_overflows_is_skipped_until_the_scale_fits(cli, tiny_data, monkeypatch):
    """Scaled by 2^26 the gradient of a logit is 5e5 times itself, beyond the 65,504 that float16 ends at."""
    monkeypatch.setattr("torch.amp.GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**26))
    run(cli, "train", *RUN, "--dtype=float16", "--compile=False", "--deterministic=True", "--max_iters=20",
        "--eval_interval=1", "--save_interval=20")
    records = records_of("out/tiny")
    losses = [record.get("val/sampled_loss", record["val/loss"]) for record in records if "val/loss" in record]
    norms = [record["grad_norm"] for record in records if "grad_norm" in record]
    overflowed = [step for step, norm in enumerate(norms, 1) if norm is None]
    assert overflowed, f"no gradient has overflowed: {norms}"
    assert overflowed == [*range(1, len(overflowed) + 1)], f"only the first steps should overflow: {norms}"
    assert len(overflowed) < 16, f"the scale should have come down far enough: {norms}"
    same = [step for step in range(1, 21) if losses[step] == losses[step - 1]]
    assert same == overflowed, f"the weights should stay in the steps that overflow alone: {losses}"
    assert {record["skipped"] for record in records if "skipped" in record} == {0}, "an overflow is no bad step"
    scale = read_trainer(Path("out/tiny/checkpoints/latest"))["scaler"]["scale"]
    assert scale == 2.0**(26 - len(overflowed)), "the scale is halved at each overflow"


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9
                    or (torch.backends.cudnn.version() or 0) <= 91500, reason="needs a Hopper GPU and cuDNN 9.15.1")
@pytest.mark.parametrize(("deterministic", "kernel"), [(False, "cudnn"), (True, "flash")])
def test_torch_takes_cudnns_attention_on_a_hopper_gpu_unless_it_must_be_deterministic(deterministic, kernel):
    torch.use_deterministic_algorithms(deterministic)
    q = torch.randn(2, 4, 256, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile() as profile:
        attend(q, q, q, None, 0.0, "sdpa")
    called = {event.key for event in profile.key_averages()}
    assert f"aten::_scaled_dot_product_{kernel}_attention" in called, called


@pytest.mark.skipif(not torch.cuda.is_available() or not has_varlen_kernel("sdpa", CUDA, torch.bfloat16, 64),
                    reason="needs a GPU and a torch with a kernel for sequences of different lengths")
@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"sliding_window": 40, "window_pattern": "SL"}])
def test_the_kernel_for_documents_does_what_the_mask_does(options, monkeypatch):
    model = make_model(block_size=256, n_embd=256, n_head=4, pos="rope", **options).to(CUDA)
    x = torch.randint(64, (8, 256), device=CUDA)
    lengths = torch.randint(1, 90, (200,), generator=torch.Generator().manual_seed(0)).cumsum(0)
    begins = torch.zeros(8 * 256, dtype=torch.int32)
    begins[[*range(0, 8 * 256, 256), *lengths[lengths < 8 * 256].tolist()]] = 1
    place = torch.arange(8 * 256)
    positions = (place - torch.where(begins > 0, place, 0).cummax(0).values).view(8, 256).to(CUDA)
    found = {}
    for has_kernel in (True, False):
        if not has_kernel:
            monkeypatch.setattr("model.has_varlen_kernel", lambda *args: False)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x, x, 1, positions, 128)[1]
        loss.backward()
        found[has_kernel] = loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-3)
    difference = (found[True][1] - found[False][1]).norm() / found[False][1].norm()
    assert difference < 0.02, f"gradients differ by {difference:.1%}"


@pytest.mark.parametrize("options", [(), ("--compile=True",), ("--dtype=float32",)])
def test_a_packed_run_and_its_evaluation(cli, tmp_path, options):
    (tmp_path / "lines.jsonl").write_text("".join(f'{{"text": "line {i} {"and so on " * (i % 5)}"}}\n'
                                                  for i in range(200)))
    run(cli, "prepare_data", "--input=lines.jsonl", "--tokenizer=byte", "--val_fraction=0.1")
    run(cli, "train", *RUN, "--dataset=lines", "--documents=pack", "--pos=rope", *options)
    losses = val_losses("out/tiny")
    assert losses[-1] < losses[0]


def test_a_step_waits_for_the_device_in_one_place(cli, tiny_data):
    """By torch's own notes of the calls that wait: eight steps have so many more of them than four."""
    places: list[collections.Counter] = []
    for num_steps in (4, 8):
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            run(cli, "train", *RUN, "--compile=False", f"--max_iters={num_steps}", "--eval_interval=100")
            torch.cuda.set_sync_debug_mode("default")
        places.append(collections.Counter(f"{Path(note.filename).name}:{note.lineno}" for note in noted
                                          if "synchronizing CUDA operation" in str(note.message)))
    of_four_steps = places[1]
    of_four_steps.subtract(places[0])
    assert of_four_steps.total() == 8, (
        "a step should wait for its loss, norm and stop flag, and read the batch's hash at once behind them; four "
        f"steps waited {of_four_steps.total()} times: { {place: n for place, n in of_four_steps.items() if n} }")
    assert {place.partition(":")[0] for place, count in of_four_steps.items() if count} == {"train.py"}, of_four_steps


@two_gpus
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_train_as_one_does(tiny_data, tmp_path, cli, parallel):
    run(cli, "train", *RUN, "--dtype=float32", "--out_dir=out/one")
    torchrun(2, ROOT / "train.py", *RUN, "--dtype=float32", "--sample_interval=3", f"--parallel={parallel}",
             cwd=tmp_path)
    # TF32 rounds products to three digits, and the ranks' sums have another order.
    np.testing.assert_allclose(val_losses("out/tiny"), val_losses("out/one"), rtol=1e-2)


@two_gpus
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_resumed_run_on_two_gpus_ends_byte_identical(tiny_data, tmp_path, parallel):
    for options in (("--out_dir=out/whole",), ("--max_iters=3",), ()):
        torchrun(2, ROOT / "train.py", *RUN, "--deterministic=True", f"--parallel={parallel}", *options, cwd=tmp_path)
    assert_same_weights("out/tiny", "out/whole", "deterministic=True")


# Memory


@pytest.mark.parametrize("compiled", [False, True])
def test_the_micro_batch_fits_itself_to_the_gpu(cli, tiny_data, compiled):
    said = run(cli, "train", *RUN_WITHOUT_BATCH, "--batch_size=0", f"--total_batch_size={8 * 16}",
               f"--compile={compiled}").out
    assert "1 micro-batches x 8 sequences" in said, f"a whole step of this run should fit any GPU:\n{said}"
    assert "torch.compile failed" not in said, said


@pytest.mark.parametrize("compiled", [False, True])
def test_the_trial_finds_a_size_that_trains_in_the_memory_there_is(compiled):
    """Of 2 GB: a sequence keeps about 4 blocks x 1,024 positions x 30 bytes x 256 channels = 31 MB, and some for the
    logits. The steps afterwards get a quarter more, for what a trial cannot know of their memory's holes."""
    job = Job(0, 1, CUDA, pick_dtype("auto", CUDA))
    model = make_model(block_size=1024, n_layer=4, n_embd=256).to(CUDA)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(2e9 / total)
    found = preflight.fit_batch_size(model, 512, job, str(compiled))
    assert 8 <= found <= 128, f"about 32 sequences should fit 2 GB, and the trial found {found}"
    torch.cuda.set_per_process_memory_fraction(2.5e9 / total)
    failure = compiling.compile_parts(model, str(compiled), job, found)
    assert failure is None, failure
    optimizer, tokens = build_optimizer(model, OptimConfig()), torch.zeros(found, 1024, dtype=torch.long, device=CUDA)
    for _ in range(2):
        with job.autocast():
            _, loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_full_gpu_names_the_keys_to_turn(cli, tiny_data):
    torch.cuda.set_per_process_memory_fraction(64 * 2**20 / torch.cuda.get_device_properties(CUDA).total_memory)
    result = cli("train", *RUN_WITHOUT_BATCH, "--batch_size=8192", "--gradient_accumulation_steps=1", "--compile=False")
    assert result.code == 2, f"8,192 sequences should not fit 64 MiB:\n{result.out}\n{result.err}"
    assert "the memory of cuda:0 is full: lower --batch_size" in result.err, result.err


def test_a_checkpoint_holds_what_was_on_the_gpu_when_it_was_asked_for(tmp_path):
    job, idx = Job(0, 1, CUDA, torch.float32), torch.randint(300, (4, 64), device=CUDA)
    model = make_model().to(CUDA)
    optimizer = build_optimizer(model, OptimConfig())
    with RunFolder(RunConfig(str(tmp_path / "run")), job) as folder:
        folder.open({}, is_new=True)
        for step in (1, 2):  # the second copy is made into the first one's memory
            model(idx, idx)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
            live = model.state_dict(), optimizer_state(optimizer, model)
            wanted = [{name: tensor.detach().cpu().clone() for name, tensor in state.items()} for state in live]
            folder.save(model, optimizer, None, asdict(Progress(step=step)), is_best=False)
            for tensor in live[0].values():  # as the next step would, while the copy is written
                tensor.fill_(float("nan"))
            folder.finish()
            saved = LanguageModel.from_pretrained(str(folder.steps()[-1])).state_dict(), read_optimizer(
                folder.steps()[-1])
            for ours, theirs in zip(wanted, saved):
                assert ours.keys() == theirs.keys()
                differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
                assert not differing, f"step {step}: not what was on the GPU: {differing}"
            model.load_state_dict(wanted[0])


def test_batches_come_from_pinned_memory():
    assert pin(np.arange(4), CUDA).is_pinned()


# The same numbers as elsewhere. The scripts multiply float32 as TF32; here it is exact.


def test_logits_and_loss_are_those_of_a_cpu():
    model = make_model().eval()
    idx, targets = torch.randint(300, (4, 64)), torch.randint(-1, 300, (4, 64))
    logits, loss = model(idx)[0], model(idx, targets)[1]
    loss.backward()
    on_cpu = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.to(CUDA)
    torch.testing.assert_close(model(idx.to(CUDA))[0].cpu(), logits, atol=1e-5, rtol=1e-4)
    loss_on_gpu = model(idx.to(CUDA), targets.to(CUDA))[1]
    torch.testing.assert_close(loss_on_gpu.cpu(), loss, atol=1e-5, rtol=1e-5)
    loss_on_gpu.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.cpu(), on_cpu[name], atol=1e-5, rtol=1e-3,
                                   msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("kind", ["bigram", "mlp", "rnn", "gru", "lstm"])
def test_baselines_lose_what_they_lose_on_a_cpu(kind):
    torch.manual_seed(0)
    model, idx = build(GPTConfig(model=kind, **SHAPE)), torch.randint(300, (4, 64))
    found = []
    for device in ("cpu", CUDA):
        model.to(device).zero_grad()
        _, loss = model(idx.to(device), idx.to(device))
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])))
    (loss, gradient), (loss_on_gpu, gradient_on_gpu) = found
    assert loss_on_gpu == pytest.approx(loss, rel=1e-3)
    # cuDNN's recurrent layers multiply as TF32 whatever the matrix products do.
    error = (gradient_on_gpu - gradient).norm() / gradient.norm()
    assert error < 0.02, f"the gradient differs by {error:.2%} of its length"


def test_logits_are_those_of_transformers(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=128, n_layer=3, n_head=4)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    idx = torch.randint(300, (2, 64), device=CUDA)
    with torch.no_grad():
        ours, wanted = GPT.from_pretrained(str(tmp_path)).to(CUDA).eval()(idx)[0], theirs.to(CUDA)(idx).logits
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_compiled_and_eager_blocks_give_the_same_loss_and_gradients():
    idx = torch.randint(300, (4, 64), device=CUDA)
    found = []
    for compiled in (False, True):
        model = make_model().to(CUDA)
        for part in model.compiled_parts() if compiled else ():
            part.compile()
        _, loss = model(idx, idx)
        loss.backward()
        found.append({"the loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, eager in found[0].items():
        torch.testing.assert_close(found[1][name], eager, atol=1e-5, rtol=1e-3,
                                   msg=lambda text, name=name: f"{name}, compiled and eager: {text}")


@pytest.mark.parametrize("attention", ["sdpa", "math", "auto"])
def test_attention_kernels_agree_in_16_bits(attention):
    dtype, idx, found = pick_dtype("auto", CUDA), torch.randint(300, (4, 64), device=CUDA), []
    for is_exact in (True, False):
        model = make_model().to(CUDA)
        model.set_attention("sdpa" if is_exact else pick_attention(attention, CUDA, dtype, 64))
        with torch.autocast("cuda", dtype, enabled=not is_exact):
            _, loss = model(idx, idx)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), (rounded_loss, rounded_gradient) = found
    assert rounded_loss == pytest.approx(loss, rel=2e-3)  # bfloat16 has three digits; a CPU differs by 1e-5
    error = (rounded_gradient - gradient).norm() / gradient.norm()
    assert error < 0.03, f"the gradient differs by {error:.2%} of its length; rounding makes half a percent"


# Text

UNTIED = {"tie_embeddings": False}  # tied, an untrained model repeats its last token
SHAPES = [UNTIED, UNTIED | {"pos": "alibi"}, UNTIED | {"pos": "rope", "qk_norm": True, "n_kv_head": 2, "mlp": "swiglu"},
          UNTIED | {"pos": "none", "sliding_window": 20, "window_pattern": "SL", "head_dim": 48, "qkv_bias": True}]


def likeliest_tokens(model: GPT, idx: torch.Tensor, count: int) -> torch.Tensor:
    """What a CPU writes without a cache; each token is so much likelier than the next that rounding changes none."""
    leads = []

    def watch(stages, token):
        first, second = stages[0].logits.topk(2, dim=1).values.unbind(dim=1)
        leads.append((first - second).min().item())

    tokens = torch.stack([*model.stream(idx, count, Sampler(0, watch=watch), use_cache=False)], dim=1)
    assert min(leads) > 1e-5, "no oracle: two tokens are about as likely; take another seed"
    assert tokens.unique().numel() > 20, "no oracle: the model writes the same over and over"
    return tokens


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", SHAPES, ids=lambda options: options.get("pos", "learned"))
def test_replayed_graphs_write_what_the_plain_way_writes(compiled, options):
    model, idx = make_model(**options).eval(), torch.randint(300, (2, 7))
    wanted = likeliest_tokens(model, idx, 100)  # past block_size
    model.to(CUDA).compile_decoding = compiled
    cache = model.make_cache(2, 107)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.compile failed|recording a CUDA graph failed")
        for count in (50, 50, 100):  # the second finds the prompt read and the graph recorded
            tokens = torch.stack([*model.stream(idx.to(CUDA), count, Sampler(0), cache=cache)], dim=1).cpu()
            assert tokens.tolist() == wanted[:, :count].tolist()
    assert cache.decoder.graph is not None, "a step should have been recorded"
    assert (cache.decoder.block_forward is not Block.forward) == compiled


def test_a_seed_repeats_its_samples():
    model, idx = make_model().to(CUDA, pick_dtype("auto", CUDA)), torch.randint(300, (2, 7), device=CUDA)
    texts = [model.generate(idx, 100, top_k=50, generator=torch.Generator(CUDA).manual_seed(3)) for _ in range(2)]
    assert texts[0].tolist() == texts[1].tolist()


def test_a_recording_that_breaks_off_is_done_without(monkeypatch):
    """The last test: what a recording leaves behind is torch's affair."""
    model, idx = make_model(**UNTIED).eval(), torch.randint(300, (2, 7))
    wanted, logits = likeliest_tokens(model, idx, 50), Decoder._logits

    def wait_while_recording(decoder):
        if torch.cuda.is_current_stream_capturing():
            decoder.token.sum().item()  # no recording can hold that
        return logits(decoder)

    monkeypatch.setattr(Decoder, "_logits", wait_while_recording)
    model.to(CUDA)
    with pytest.warns(UserWarning, match="recording a CUDA graph failed, going on without it"):
        written = model.generate(idx.to(CUDA), 50, temperature=0)
    assert written[:, 7:].tolist() == wanted.tolist()
    assert torch.cuda.current_stream() == torch.cuda.default_stream(), "it should go on where it was"
    with pytest.warns(UserWarning, match="recording a CUDA graph failed"):
        drawn = model.generate(idx.to(CUDA), 50)  # from the device's own random numbers
    assert drawn.shape == (2, 57)


def test_a_profile_has_a_memory_snapshot_and_changes_nothing(tiny_data, tmp_path):
    options = (*RUN, "--compile=False", "--deterministic=True")
    said = [run_process(ROOT / "train.py", *options, *more, cwd=tmp_path)
            for more in (["--out_dir=out/plain"], ["--profile=2"])]
    assert "profiled 2 steps from step 4 on; what took the most time:\n" in said[1]
    assert sorted(path.name for path in tmp_path.glob("out/tiny/*_step_00000004*")) == [
        "memory_step_00000004.pickle", "profile_step_00000004.json.gz"]
    assert_same_weights(*(tmp_path / "out" / name for name in ("plain", "tiny")), "a profiler only looks on")
