# ruff: noqa: E402  (the library has to be loaded before torch is)
"""A step, an evaluation and some tokens on a CUDA that does nothing: `python tests/fake_cuda.py LIBRARY`.

Tensors are fake: they have shapes, types and a device, and no content. An operation that mixes devices raises, and so
does whatever waits for the device to learn a number. LIBRARY is fake_cuda.cpp, compiled. Prints one JSON object: for
each case what went wrong, the cases that take the kernel for sequences of different lengths, and for the parts of a
step how many operations they launch.
"""

import contextlib
import ctypes
import importlib.util
import json
import math
import sys
import traceback
from pathlib import Path
from unittest.mock import create_autospec

TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0], "lib")
for library in (*TORCH.glob("libgomp*.so*"), TORCH / "libc10.so", TORCH / "libtorch_cpu.so", Path(sys.argv[1])):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # before torch asks whether there is a CUDA

import torch
import torch.nn as nn
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flatgpt.models.fused import add_product
from flatgpt.models.generate import Decoder
from flatgpt.models.sampling import Sampler
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, build_optimizer
from flatgpt.training.parallel import zero_grad
from model import GPT, GPTConfig

CUDA = torch.device("cuda", 0)
SHAPE = {"block_size": 64, "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 128}
LLAMA = {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 2, "tie_embeddings": False}
CASES = {
    "bfloat16": (torch.bfloat16, {}), "float16": (torch.float16, {}), "float32": (torch.float32, {}),
    "dropout": (torch.bfloat16, {"dropout": 0.1, "bias": True}), "llama": (torch.bfloat16, LLAMA),
    "mistral": (torch.bfloat16, LLAMA | {"sliding_window": 8, "head_dim": 8}),
    "fast": (torch.bfloat16, {"pos": "rope", "norm": "rmsnorm", "qk_norm": True, "mlp": "relu2"}),
    "alibi": (torch.bfloat16, {"pos": "alibi"}),
    "post-norm": (torch.bfloat16, {"pos": "sinusoidal", "norm_position": "post"})}


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
    """SDPA, whose choice of a kernel asks the card: FlashAttention-2, and with a mask the memory-efficient kernel,
    which wants as many heads of keys as of queries."""
    is_flash = attn_mask is None and q.dtype != torch.float32
    assert q.size(1) == k.size(1) or (is_flash and enable_gqa)
    if is_flash:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    if attn_mask is not None:
        numbers = attn_mask if attn_mask.dtype != torch.bool else torch.where(attn_mask, 0.0, -math.inf)
        attn_mask = numbers.to(q.dtype).expand(q.size(0), q.size(1), q.size(2), k.size(2))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal)[0]


class Launches(TorchDispatchMode):
    """Counts operations, but for those that only look at a tensor in another way."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.namespace == "prim")
        return func(*args, **(kwargs or {}))


def make(dtype: torch.dtype = torch.float32, **shape) -> GPT:
    torch.set_default_dtype(dtype)
    try:
        with CUDA:
            return GPT(GPTConfig(**SHAPE | shape))
    finally:
        torch.set_default_dtype(torch.float32)


def step(model: GPT, optimizer: torch.optim.Optimizer, job: Job, documents: bool = False) -> dict[str, int]:
    """A training step as train.py makes it; the launches of its last parts."""
    tokens = torch.zeros(4, 64, dtype=torch.long, device=CUDA)
    where = (torch.zeros(4, 64, dtype=torch.int32, device=CUDA), 16) if documents else ()
    with job.autocast():
        _, loss = model(tokens, tokens, torch.ones((), dtype=torch.long, device=CUDA), *where)
    loss.backward()
    launches = {}
    for part, do in (("clip", lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)), ("update", optimizer.step),
                     ("zero", lambda: zero_grad(model, Job(0, 2, job.device, job.dtype)))):  # as with DDP
        with Launches() as counter:
            do()
        launches[part] = counter.count
    return launches


def everything(dtype: torch.dtype, **shape) -> None:
    """Training with and without activation checkpointing, evaluation, and tokens by the decoder."""
    job = Job(0, 1, CUDA, dtype)
    for checkpointing in (False, True):
        model = make(**shape)
        model.activation_checkpointing = checkpointing
        optimizer = build_optimizer(model, OptimConfig())
        for documents in (False, True):
            step(model, optimizer, job, documents)
    tokens = torch.zeros(2, 5, dtype=torch.long, device=CUDA)
    with torch.no_grad(), job.autocast():
        model.eval()(tokens, tokens, num_targets=1)
    model = make(dtype, **shape).eval()
    sampler = Sampler(0.8, 200, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    written = list(model.stream(tokens, 4, sampler, cache=model.make_cache(2, 40)))
    assert all(token.device == CUDA for token in written)


class Recorder:
    """What of CUDA's streams and random numbers a recording touches, and how torch leaves it when one breaks off."""

    def __init__(self, breaks: bool = False):
        self.breaks, self.stream, self.random_state = breaks, "usual", "usual"

    def put_in_place(self) -> None:
        Decoder._record = lambda decoder: self.record()
        torch.cuda.current_stream = lambda: self.stream
        torch.cuda.stream = self.on_stream
        torch.cuda.default_generators = (self,)

    def record(self) -> None:
        if self.breaks:
            self.stream = self.random_state = "the recording's"
            raise RuntimeError("operation not permitted when stream is capturing")

    @contextlib.contextmanager
    def on_stream(self, stream: str):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def clone_state(self) -> str:
        return self.random_state

    def graphsafe_set_state(self, state: str) -> None:
        self.random_state = state


def after_a_broken_recording() -> dict[str, str]:
    """Where a decoder whose recording breaks off goes on."""
    recorder = Recorder(breaks=True)
    recorder.put_in_place()
    with FakeTensorMode():
        model = make(torch.bfloat16).eval()
        tokens = torch.zeros(2, 5, dtype=torch.long, device=CUDA)
        list(model.stream(tokens, 4, Sampler(), cache=model.make_cache(2, 40)))
    return {"stream": recorder.stream, "random_state": recorder.random_state}


def put_in_place() -> None:
    """What a card would be asked."""
    F.scaled_dot_product_attention = attention
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False


def main() -> None:
    put_in_place()
    Recorder().put_in_place()  # there is nothing to record
    torch.nn.utils.clip_grad._has_foreach_support = lambda *args: True  # which looks for plain tensors
    found, varlen_attn = {"cases": {}, "varlen": []}, varlen.varlen_attn
    for name, (dtype, shape) in CASES.items():
        varlen.varlen_attn = create_autospec(varlen_attn, side_effect=varlen_attn)
        try:
            with FakeTensorMode():
                everything(dtype, **shape)
            found["cases"][name] = ""
        except Exception:
            found["cases"][name] = traceback.format_exc(limit=-4)
        found["varlen"] += [name] if varlen.varlen_attn.called else []
    with FakeTensorMode():
        model = make(n_layer=12)
        optimizer, job = build_optimizer(model, OptimConfig()), Job(0, 1, CUDA, torch.bfloat16)
        step(model, optimizer, job)  # the first makes the means
        found["launches"] = step(model, optimizer, job)
        model = make(n_layer=12, n_embd=768, n_head=12)
        optimizer = build_optimizer(model, OptimConfig(optimizer="muon"), job)
        step(model, optimizer, job)
        found["launches"]["Muon's update"] = step(model, optimizer, job)["update"]
        a, total = torch.empty(32, 16, dtype=torch.bfloat16, device=CUDA), torch.empty(32, 32, device=CUDA)
        with Launches() as counter:
            add_product(total, a, a.t())
        found["launches"]["add_product"] = counter.count
    found["after_a_broken_recording"] = after_a_broken_recording()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
