"""device.py: what `auto` takes. On a CPU that is by the times of a trial, which the tests make up; on a GPU, which they
pretend, with a FlashAttention-3 of our own making."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flatgpt.models.baselines import build
from flatgpt.training import device
from flatgpt.training.device import Numerics, pick_attention, pick_device, pick_dtype, pick_numerics
from model import GPTConfig

CPU = torch.device("cpu")
FLOAT32, BFLOAT16, BY_FORMULA = Numerics(torch.float32, "sdpa"), Numerics(torch.bfloat16, "sdpa"), Numerics(
    torch.bfloat16, "math")


def tiny(**options) -> torch.nn.Module:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50, "dropout": 0.1}
    return build(GPTConfig(**shape | options))


@pytest.fixture
def native(monkeypatch):
    """A processor that has instructions for bfloat16."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


@pytest.fixture
def timed(native, monkeypatch):
    """`timed(a, b, ...)`: seconds that a trial's choices take, in their order; gives what was tried."""
    def set_times(*seconds: float) -> list[list[Numerics]]:
        tried: list[list[Numerics]] = []

        def time_in_turn(steps):
            tried.append(list(steps))
            return dict(zip(steps, seconds, strict=True))

        monkeypatch.setattr(device, "time_in_turn", time_in_turn)
        return tried

    return set_times


def flash3(scale: float = 1.0, as_tuple: bool = False) -> SimpleNamespace:
    """flash_attn_interface, in the real one's layout (B, T, H, D); `scale` makes it a wrong build."""
    def flash_attn_func(q, k, v, causal):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        y = scale * F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)
        return (y, None) if as_tuple else y

    return SimpleNamespace(flash_attn_func=flash_attn_func)


@pytest.fixture
def hopper(monkeypatch) -> torch.device:
    """A device that says it is a Hopper GPU and computes on the CPU."""
    class Pretended:
        type = "cuda"

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    randn = torch.randn
    monkeypatch.setattr("torch.randn", lambda *shape, device, dtype: randn(*shape, dtype=dtype))
    return Pretended()


@pytest.mark.parametrize("as_tuple", [False, True])
def test_auto_takes_flash3_where_it_gives_what_sdpa_gives(monkeypatch, hopper, as_tuple):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash3(as_tuple=as_tuple))
    assert pick_attention("auto", hopper, torch.bfloat16, 1024) == "flash3"
    assert pick_attention("auto", hopper, torch.float32, 1024) == "sdpa"
    assert pick_attention("math", hopper, torch.bfloat16, 1024) == "math"


def test_a_wrong_build_of_flash3_is_found_out(monkeypatch, hopper):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash3(scale=1.5))
    assert pick_attention("auto", hopper, torch.bfloat16, 1024) == "sdpa"
    with pytest.raises(ValueError, match=r"attention=flash3: a trial of it failed .* --attention=auto"):
        pick_attention("flash3", hopper, torch.bfloat16, 1024)


def test_flash3_says_why_it_cannot_be_had(monkeypatch, hopper):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    for place, dtype, reason in ((CPU, torch.bfloat16, "Hopper"), (hopper, torch.float32, "dtype=bfloat16"),
                                 (hopper, torch.bfloat16, "not installed")):
        with pytest.raises(ValueError, match=reason):
            pick_attention("flash3", place, dtype, 1024)


def test_a_cpu_computes_short_windows_in_bfloat16_by_the_formula():
    assert pick_attention("auto", CPU, torch.bfloat16, 64) == "math"
    assert pick_attention("auto", CPU, torch.bfloat16, 1024) == "sdpa"
    assert pick_attention("auto", CPU, torch.float32, 64) == "sdpa"


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with an old and a new GPU, whose current one is the first."""
    current = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def on(chosen):
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.device", on)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: current[-1].index == 1)


def test_auto_goes_by_the_gpu_that_was_chosen(two_gpus):
    assert pick_dtype("auto", pick_device("cuda")) == torch.float16
    assert pick_dtype("auto", pick_device("cuda:1")) == torch.bfloat16
    assert pick_dtype("auto", pick_device("auto", local_rank=1)) == torch.bfloat16


@pytest.mark.parametrize(("name", "local_rank", "message"), [
    ("auto", 2, "there is no cuda:2 here, only 2 GPUs.*--nproc_per_node.*--device=cuda:0"),
    ("cuda:7", 0, "there is no cuda:7 here"), ("cuda:256", 0, "is not a device"), ("gpu", 0, "is not a device")])
def test_a_gpu_that_is_not_there_is_named(two_gpus, name, local_rank, message):
    with pytest.raises(ValueError, match=message):
        pick_device(name, local_rank)


# A CPU's trial


@pytest.mark.parametrize(("seconds", "chosen"), [
    ((1, 2, 2), FLOAT32), ((2, 1, 1.5), BFLOAT16), ((2, 1.5, 1), BY_FORMULA), ((1, 1, 1), FLOAT32),
    ((1, 0.95, 0.95), FLOAT32), ((1, 0.85, 0.8), BFLOAT16), ((1, 0.95, 0.85), BY_FORMULA)])
def test_a_cpu_takes_what_a_trial_found_clearly_faster(timed, seconds, chosen):
    tried = timed(*seconds)
    found, said = pick_numerics(tiny(), "auto", "auto", CPU, 64, {})
    assert found == chosen
    assert tried == [[FLOAT32, BFLOAT16, BY_FORMULA]]
    assert said == (f"{chosen}: a trial took {1000 * seconds[0]:.3g} ms in float32 with attention=sdpa, "
                    f"{1000 * seconds[1]:.3g} ms in bfloat16 with attention=sdpa, "
                    f"{1000 * seconds[2]:.3g} ms in bfloat16 with attention=math")


@pytest.mark.parametrize(("options", "shape", "choices"), [
    (("auto", "sdpa"), {}, [FLOAT32, BFLOAT16]),
    (("auto", "math"), {}, [Numerics(torch.float32, "math"), BY_FORMULA]),
    (("bfloat16", "auto"), {}, [BFLOAT16, BY_FORMULA]),
    (("auto", "auto"), {"block_size": 1024}, [FLOAT32, BFLOAT16]),  # a long window is the kernel's
    (("auto", "auto"), {"model": "lstm"}, [FLOAT32, BY_FORMULA]),  # without attention
])
def test_only_what_the_options_leave_open_is_tried(timed, options, shape, choices):
    tried = timed(1, 2)
    assert pick_numerics(tiny(**shape), *options, CPU, 64, {})[0] == choices[0]
    timed(2, 1)
    assert pick_numerics(tiny(**shape), *options, CPU, 64, {})[0] == choices[1]
    assert tried == [choices]


def test_nothing_is_tried_where_nothing_is_open(native, monkeypatch):
    monkeypatch.setattr(device, "time_in_turn", None)
    for options, recorded, shape, expected in (
            (("float32", "auto"), {}, {}, FLOAT32),
            (("bfloat16", "sdpa"), {}, {}, BFLOAT16),
            (("auto", "auto"), {"device": "cpu", "dtype": "float32", "attention": "sdpa"}, {}, FLOAT32),
            (("auto", "auto"), {"device": "cpu", "dtype": "bfloat16", "attention": "math"}, {}, BY_FORMULA),
            (("float32", "auto"), {"device": "cpu", "dtype": "bfloat16", "attention": "sdpa"}, {}, FLOAT32),
            (("auto", "auto"), {"device": "auto", "dtype": "auto", "attention": "auto"}, {}, BY_FORMULA),
            (("auto", "auto"), {"device": "cpu", "dtype": "auto", "attention": "auto"}, {"block_size": 256}, BFLOAT16),
            (("auto", "sdpa"), {}, {"model": "bigram"}, BFLOAT16)):
        assert pick_numerics(tiny(**shape), *options, CPU, 64, recorded) == (expected, "")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True}, raising=False)
    assert pick_numerics(tiny(), "auto", "auto", CPU, 64, {}) == (FLOAT32, "")
    assert pick_numerics(tiny(), "bfloat16", "auto", CPU, 64, {}) == (BY_FORMULA, "")  # a trial would take seconds


@pytest.mark.parametrize("recorded", [{"device": "cuda", "dtype": "bfloat16", "attention": "flash3"},
                                      {"device": "cpu", "dtype": "int8", "attention": ["math"]}, {"device": None}])
def test_a_record_of_another_device_or_of_nonsense_is_not_gone_by(timed, recorded):
    timed(1, 2, 2)
    assert pick_numerics(tiny(), "auto", "auto", CPU, 64, recorded)[0] == FLOAT32


@pytest.mark.parametrize("shape", [{}, {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1},
                                   {"pos": "alibi", "norm_position": "post"}, {"model": "mlp"}, {"model": "gru"}])
@pytest.mark.parametrize(("training", "rows"), [(True, 64), (False, 64), (False, 1)])
def test_a_trial_runs_every_model_and_leaves_no_trace(native, monkeypatch, shape, training, rows):
    monkeypatch.setattr(device, "TRIAL_S", 0.001)
    model, again = tiny(**shape), tiny(**shape)
    model.load_state_dict(again.state_dict())
    before = torch.get_rng_state()
    _, said = pick_numerics(model, "auto", "auto", CPU, rows, {}, training)
    assert said.count(" ms in ") == 2 + bool(model.h)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    for p, q in zip(model.parameters(), again.parameters()):
        assert p.grad is None
        assert torch.equal(p, q)
