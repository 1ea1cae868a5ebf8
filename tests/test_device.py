"""device.py: which attention kernel is taken, with a FlashAttention-3 of our own making on a GPU that we pretend."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from device import pick_attention

CPU = torch.device("cpu")


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
    for device, dtype, reason in ((CPU, torch.bfloat16, "Hopper"), (hopper, torch.float32, "dtype=bfloat16"),
                                  (hopper, torch.bfloat16, "not installed")):
        with pytest.raises(ValueError, match=reason):
            pick_attention("flash3", device, dtype, 1024)


def test_a_cpu_computes_short_windows_in_bfloat16_by_the_formula():
    assert pick_attention("auto", CPU, torch.bfloat16, 64) == "math"
    assert pick_attention("auto", CPU, torch.bfloat16, 1024) == "sdpa"
    assert pick_attention("auto", CPU, torch.float32, 64) == "sdpa"
