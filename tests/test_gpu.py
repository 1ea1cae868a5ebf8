"""The main job on CUDA: training, resuming, fitting the batch, sampling, and the same numbers as elsewhere.

`make test-gpu` runs these on a machine with an NVIDIA GPU; those over two processes need two of them.
"""

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, records_of, torchrun

from flatgpt.data.loader import pin
from flatgpt.models.sampling import Sampler
from flatgpt.training.device import pick_attention, pick_dtype
from model import GPT, Block, GPTConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

CUDA = torch.device("cuda")
RUN = tuple(option for option in TINY_RUN if not option.startswith(("--device", "--dtype")))  # auto, auto
SHAPE = {"block_size": 64, "vocab_size": 300, "n_layer": 3, "n_head": 4, "n_embd": 128}


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE | changes))


def val_losses(run: str) -> list[float]:
    return [record["val/loss"] for record in records_of(run) if "val/loss" in record]


@pytest.fixture(autouse=True)
def _exact_float32():
    """What a script sets is for its process; these tests run many in one, and the compiler takes so many shapes of a
    block before it gives up on it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


def test_a_run_with_all_defaults_learns_as_it_does_on_a_cpu_and_samples(cli, tiny_data):
    result = cli("train", *RUN)
    assert result.code == 0, result.err
    assert "torch.compile failed" not in result.out
    assert cli("train", *TINY_RUN, "--out_dir=out/cpu").code == 0
    np.testing.assert_allclose(val_losses("out/tiny"), val_losses("out/cpu"), rtol=0.02)
    texts = [cli("sample", "--out_dir=out/tiny", "--prompt=the", "--num_samples=3", "--max_new_tokens=50",
                 "--top_p=0.9", "--deterministic=True").out for _ in range(2)]
    assert "on cuda" in texts[0]
    assert texts[0].rpartition("\n---")[0] == texts[1].rpartition("\n---")[0]  # without the speed


@pytest.mark.parametrize("options", [(), ("--dtype=float16",), ("--activation_checkpointing=True", "--dropout=0.2"),
                                     ("--optimizer=muon", "--pos=rope", "--qk_norm=True"), ("--model=lstm",)])
def test_a_resumed_run_ends_byte_identical(cli, tiny_data, options):
    options = (*RUN, "--deterministic=True", *options)
    assert cli("train", *options, "--out_dir=out/whole").code == 0
    assert cli("train", *options, "--max_iters=3").code == 0
    result = cli("train", *options)
    assert result.code == 0, result.err
    assert "resuming out/tiny at step 3" in result.out
    weights = [(tiny_data.parent.parent / "out" / run / "checkpoints/latest/model.safetensors").read_bytes()
               for run in ("tiny", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("options", [(), ("--dtype=float32",)])
def test_a_compiled_run_that_writes_samples_ends_as_one_that_does_not(cli, tiny_data, options):
    for name, samples in (("silent", ()), ("writes", ("--sample_interval=2", "--sample_tokens=40"))):
        result = cli("train", *RUN, *options, *samples, "--deterministic=True", f"--out_dir=out/{name}")
        assert result.code == 0, result.err
    weights = [(tiny_data.parent.parent / "out" / run / "checkpoints/latest/model.safetensors").read_bytes()
               for run in ("silent", "writes")]
    assert weights[0] == weights[1]
    assert [record["step"] for record in records_of("out/writes") if "samples" in record] == [2, 4, 6]


@two_gpus
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_train_as_one_does(tiny_data, tmp_path, cli, parallel):
    assert cli("train", *RUN, "--dtype=float32", "--out_dir=out/one").code == 0
    torchrun(2, ROOT / "train.py", *RUN, "--dtype=float32", "--sample_interval=3", f"--parallel={parallel}",
             cwd=tmp_path)
    np.testing.assert_allclose(val_losses("out/tiny"), val_losses("out/one"), rtol=1e-2)


def test_the_micro_batch_fits_itself_to_the_gpu(cli, tiny_data):
    options = [option for option in RUN if not option.startswith(("--batch_size", "--gradient_accumulation"))]
    result = cli("train", *options, "--batch_size=0", f"--total_batch_size={8 * 16}")
    assert result.code == 0, result.err
    assert "1 micro-batches x 8 sequences" in result.out


def test_a_full_gpu_names_the_keys_to_turn(cli, tiny_data):
    options = [option for option in RUN if not option.startswith(("--batch_size", "--gradient_accumulation"))]
    torch.cuda.set_per_process_memory_fraction(64 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
    try:
        result = cli("train", *options, "--batch_size=8192", "--gradient_accumulation_steps=1")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert result.code == 2
    assert "--batch_size" in result.err


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
    torch.testing.assert_close(loss_on_gpu.cpu(), loss)
    loss_on_gpu.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.cpu(), on_cpu[name], atol=1e-5, rtol=1e-3, msg=name)


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
    gradients = []
    for compiled in (False, True):
        model = make_model().to(CUDA)
        for part in model.compiled_parts() if compiled else ():
            part.compile()
        _, loss = model(idx, idx)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "math", "auto"])
def test_attention_kernels_agree_in_bfloat16(attention):
    model, idx = make_model().to(CUDA), torch.randint(300, (4, 64), device=CUDA)
    wanted = model(idx, idx)[1]
    model.set_attention(pick_attention(attention, CUDA, torch.bfloat16, 64))
    with torch.autocast("cuda", torch.bfloat16):
        _, loss = model(idx, idx)
    torch.testing.assert_close(loss, wanted, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("rows", "options"), [
    (1, {}), (5, {}), (2, {"pos": "alibi"}), (2, {"pos": "rope", "qk_norm": True}),
    (2, {"n_kv_head": 2, "mlp": "swiglu", "tie_embeddings": False})])
def test_replayed_graphs_write_what_the_plain_way_writes(compiled, rows, options):
    model, idx = make_model(**options).eval(), torch.randint(300, (rows, 7))
    wanted = model.generate(idx, 150, temperature=0, use_cache=False)
    model.to(CUDA).compile_decoding = compiled
    cache = model.make_cache(rows, 64)
    for _ in range(2):  # the second sample finds the prompt read and the graph recorded
        tokens = torch.stack(list(model.stream(idx.to(CUDA), 50, Sampler(temperature=0), cache=cache)), dim=1)
        assert torch.equal(tokens.cpu(), wanted[:, 7:57])
    assert cache.decoder.graph is not None
    assert (cache.decoder.block_forward is not Block.forward) == compiled
    assert torch.equal(model.generate(idx.to(CUDA), 150, temperature=0).cpu(), wanted)  # past block_size


def test_a_seed_repeats_its_samples():
    model, idx = make_model().to(CUDA, pick_dtype("auto", CUDA)), torch.randint(300, (2, 7), device=CUDA)
    texts = [model.generate(idx, 100, top_k=50, generator=torch.Generator(CUDA).manual_seed(3)) for _ in range(2)]
    assert torch.equal(*texts)


def test_batches_come_from_pinned_memory():
    assert pin(np.arange(4), CUDA).is_pinned()
