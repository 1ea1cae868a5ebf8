"""What the compiled parts of a training step read and write on an H100: `python tests/fake_h100.py LIBRARY`.

Inductor decides without a card what it fuses into one kernel, and which buffers each kernel reads and writes. Products
of matrices and attention, which are libraries' kernels, are left out. Prints one JSON object: for each case the bytes
of all its kernels, forward and backward pass together, and of the largest buffer among them. LIBRARY is as for
fake_cuda.py.

This is for the tests alone: it reaches into torch's compiler, so that a new torch may ask for changes here.
"""

import contextlib
import functools
import json
import types

import fake_cuda  # before torch
import torch
import torch._inductor.config
import torch._inductor.scheduler as scheduler
from functorch.compile import make_boxed_func
from torch._dynamo import device_interface
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

from flatgpt.models.attention import AttentionContext
from flatgpt.models.fused import ChunkLoss
from model import Block, GPTConfig

SEQS, TOKENS, CHUNK_ROWS = 64, 1024, 4096
SHAPES = {"gpt2": {}, "llama": {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu"},
          "fast": {"pos": "rope", "norm": "rmsnorm", "mlp": "relu2", "qk_norm": True}}
H100 = types.SimpleNamespace(
    type="cuda", name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, warp_size=32,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20, gcnArchName="")


class Interface(device_interface.DeviceInterface):
    """What the compiler asks of a device."""

    class Worker:
        get_device_properties = staticmethod(lambda device=None: H100)
        current_device = staticmethod(lambda: 0)

    device = staticmethod(lambda index: contextlib.nullcontext())
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda device=None: H100)
    get_raw_stream = staticmethod(lambda index: 0)
    is_available = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


def put_in_place() -> None:
    fake_cuda.put_in_place()
    torch.version.cuda = "12.8"
    torch.cuda.get_device_properties = lambda device=None: H100
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *args: None
    device_interface.get_interface_for_device("cpu")  # registers torch's own
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Interface)
    scheduler.has_triton = lambda: True  # the kernels are not written, so that it is not needed
    torch._inductor.config.joint_graph_constant_folding = False  # computes on the card
    torch._inductor.config.force_disable_caches = True


class Counted(BaseException):  # no Exception, which the compiler would wrap
    """Ends a compilation that has come as far as its kernels."""


def traffic(module: torch.nn.Module, *args) -> dict[str, int]:
    """Of what torch.compile makes of module(*args) under autocast, and of its backward pass."""
    buffers = []  # bytes of each buffer that a kernel reads or writes

    def count(lowered: GraphLowering) -> None:
        lowered._update_scheduler()
        for node in lowered.scheduler.nodes:
            if not isinstance(node, scheduler.ExternKernelSchedulerNode):
                buffers.extend(node.get_read_write_buffer_accesses(include_reads=True, include_writes=True).values())
        raise Counted

    def inner_compile(graph: torch.fx.GraphModule, inputs: list, **options):
        same = torch.fx.Graph()
        same.output(same.graph_copy(graph.graph, {}))
        traced = torch.fx.GraphModule(graph, same)  # the compiler changes its own
        with contextlib.suppress(Counted):
            compile_fx_inner(graph, inputs, **options)
        return make_boxed_func(traced)

    GraphLowering.compile_to_module = count
    torch.compiler.reset()
    with torch.autocast("cuda", torch.bfloat16):
        y = torch.compile(module, backend=functools.partial(compile_fx, inner_compile=inner_compile))(*args)
    if y.requires_grad:
        y.sum().backward()
    return {"bytes": sum(buffers), "largest_buffer_bytes": max(buffers)}


def main() -> None:
    put_in_place()
    found = {}
    with FakeTensorMode(), fake_cuda.CUDA:
        for name, shape in SHAPES.items():
            config = GPTConfig(vocab_size=50257, **shape)
            angles = torch.empty(TOKENS, config.n_embd // config.n_head)
            context = AttentionContext((angles, angles) if config.pos == "rope" else None)
            x = torch.empty(SEQS, TOKENS, config.n_embd, requires_grad=True)  # the residual path is float32
            found[name] = traffic(Block(config), x, context)
        logits = torch.empty(CHUNK_ROWS, config.padded_vocab_size, dtype=torch.bfloat16)
        targets = torch.zeros(CHUNK_ROWS, 1, dtype=torch.long)
        with torch.no_grad():
            found["chunk"] = traffic(ChunkLoss(), logits, targets, config.vocab_size, True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
