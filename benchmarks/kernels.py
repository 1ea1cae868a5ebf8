"""What each thing that saves a GPU time gains, on the GPU that is here: measured beside the way it replaced.

`measure_all` is the second table of `python -m benchmarks.bench gpu`. "At least" is the time that a row's memory
traffic takes at the speed at which this GPU copies, and its products of matrices at the speed at which it multiplies
large ones; both speeds are measured first. The traffic is what BENCHMARKS.md counts.

Letters: as in model.py.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.scripts import Figures
from flatgpt.files import one_line
from flatgpt.models.attention import AttentionContext, Documents, VarlenMask, attend
from flatgpt.models.fused import ChunkLoss, add_product, swiglu
from flatgpt.models.positions import rope_cos_sin
from flatgpt.training.compiling import compile_in_place
from flatgpt.training.device import pick_device, pick_dtype
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, build_optimizer, muon_params
from model import GPT, Block, CausalSelfAttention, GPTConfig

REPEATS = 20  # of which the median counts
BLOCK_BYTES, FAST_BLOCK_BYTES = 128, 152  # that a compiled block moves for each value of its input: BENCHMARKS.md


class Size(NamedTuple):
    """A micro-batch of GPT-2 small, and the rows of logits that exist at a time."""

    B: int = 64
    T: int = 1024
    H: int = 12
    C: int = 768
    V: int = 50257
    rows: int = 8192
    layers: int = 12

    def config(self, **shape: Any) -> GPTConfig:
        return GPTConfig(block_size=self.T, vocab_size=self.V, n_layer=self.layers, n_head=self.H, n_embd=self.C,
                         **shape)


class Row(NamedTuple):
    """One thing, and another way to do it."""

    name: str
    now: Callable[[], Any]
    before: Callable[[], Any] | None
    num_bytes: float = 0.0  # that it moves now
    flops: float = 0.0  # of its products of matrices


def measure_all(size: Size) -> dict[str, Figures]:
    """Milliseconds of each row: before, now, and at least. What cannot run here has none."""
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    torch.manual_seed(0)
    bandwidth, product_rate = speeds(size, device, dtype)
    print(f"this device copies at {bandwidth / 1e12:.3g} TB/s and multiplies at {product_rate / 1e12:.3g} TFLOP/s",
          flush=True)
    seen: dict[str, Figures] = {}
    makers = (whole_model, chunk_loss, head_gradient, swiglus, orders_of_rotation, recomputation, attentions,
              attention_within_documents, muon_update, zeroing, decoding)
    for make in makers:
        with torch.device(device):
            for row in make(size, dtype):
                seen[row.name] = {"at_least_ms": 1000 * (row.num_bytes / bandwidth + row.flops / product_rate)}
                for key, step in (("before_ms", row.before), ("now_ms", row.now)):
                    torch.compiler.reset()  # else the second would find the first one's code
                    try:
                        seen[row.name] |= {key: milliseconds(step)} if step else {}
                    except Exception as error:  # of a kernel that this device lacks, or of the compiler
                        print(f"error: {row.name}: {key}: {one_line(error)}", flush=True)
    return seen


def milliseconds(step: Callable[[], Any]) -> float:
    """The median time of a step, on a GPU between two of its events."""
    on_cuda = torch.cuda.is_available()
    for _ in range(3):
        step()
    times = []
    for _ in range(REPEATS):
        if on_cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            step()
            ended.record()
            torch.cuda.synchronize()
            times.append(began.elapsed_time(ended))
        else:
            since = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - since))
    return statistics.median(times)


def speeds(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy, read and written; floating-point operations a second of a large product."""
    source = torch.empty(size.B * size.T, 4 * size.C, device=device, dtype=dtype)
    copied = torch.empty_like(source)
    a = torch.randn(size.rows, size.rows, device=device).to(dtype)
    return (2 * source.nbytes / milliseconds(partial(copied.copy_, source)) * 1000,
            2 * size.rows**3 / milliseconds(partial(torch.mm, a, a)) * 1000)


def compiled(part: Any) -> Any:
    """As train.py runs it: compiled on a GPU alone."""
    return torch.compile(part) if torch.cuda.is_available() else part


def forward_and_backward(do: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor,
                         dtype: torch.dtype) -> Callable[[], None]:
    """A step for `milliseconds`: do(x), and the gradients of x and of the weights, under autocast."""
    x = x.requires_grad_()
    dy = None

    def step() -> None:
        nonlocal dy
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            y = do(x)
        dy = torch.ones_like(y) if dy is None else dy
        x.grad = None
        y.backward(dy)

    return step


# The rows, most with the way that was replaced


def whole_model(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    """A micro-batch through GPT-2 small and back, as train.py runs it; nothing beside it."""
    model, tokens = GPT(size.config()), torch.randint(size.V, (size.B, size.T))
    if torch.cuda.is_available():
        compile_in_place(model)

    def step() -> None:
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(tokens, tokens)[1]
        model.zero_grad()
        loss.backward()

    logits = tokens.numel() * model.config.padded_vocab_size
    yield Row(f"GPT-2 small, {size.B} x {size.T:,} tokens forward and backward", step, None,
              size.layers * BLOCK_BYTES * tokens.numel() * size.C + 3 * 2 * logits,
              size.layers * (block_flops(size) + attention_flops(size)) + 3 * 2 * logits * size.C)


class ScatterLoss(ChunkLoss):
    def forward(self, logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, want_grad: bool) -> torch.Tensor:
        z = logits.float()
        z[:, vocab_size:] = -math.inf
        valid, index = targets >= 0, targets.clamp(min=0)
        largest, of_target = z.amax(dim=1, keepdim=True), z.gather(1, index)
        total = z.sub_(largest).exp_().sum(dim=1, keepdim=True)
        logits.copy_(z.mul_(valid / total).scatter_add_(1, index, -valid.float()))
        return ((largest + total.log() - of_target) * valid).sum()


def chunk_loss(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    logits = torch.randn(size.rows, size.config().padded_vocab_size, dtype=dtype)
    targets = torch.randint(size.V, (size.rows, 1))
    now, before = (torch.no_grad()(partial(compiled(part), logits, targets, size.V, True))
                   for part in (ChunkLoss(), ScatterLoss()))
    yield Row(f"the loss of {size.rows:,} rows: compares columns, before scatter_add_", now, before, 3 * logits.nbytes)


def head_gradient(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    logits, x = (torch.randn(size.rows, width, dtype=dtype) for width in (size.config().padded_vocab_size, size.C))
    total = torch.zeros(logits.size(1), size.C)

    def before() -> None:  # in chunks of half as many rows
        for z, x_c in zip(logits.chunk(2), x.chunk(2)):
            total.add_(z.t() @ x_c)

    yield Row("the head's gradient: added within the product, before after it",
              partial(add_product, total, logits.t(), x), before, 2 * total.nbytes + logits.nbytes,
              2 * logits.numel() * size.C)


def two_chunks(h: torch.Tensor) -> torch.Tensor:
    return F.silu(h.chunk(2, dim=-1)[0]) * h.chunk(2, dim=-1)[1]


def swiglus(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    h = torch.randn(size.B * size.T, 2 * size.config(mlp="swiglu").hidden, dtype=dtype)
    now, before = (forward_and_backward(compiled(act), h, dtype) for act in (swiglu, two_chunks))
    yield Row("SwiGLU, forward and backward: one chunk, before two", now, before, 4 * h.nbytes)


class TransposedFirst(CausalSelfAttention):
    def queries_keys_values(self, x: torch.Tensor, context: AttentionContext) -> list[torch.Tensor]:
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        cos, sin = context.cos_sin

        def turned(t: torch.Tensor) -> torch.Tensor:
            first, second = t.chunk(2, dim=-1)
            return t * cos.to(t.dtype) + torch.cat([-second, first], dim=-1) * sin.to(t.dtype)

        return [turned(self.q_norm(q)).to(v.dtype), turned(self.k_norm(k)).to(v.dtype), v]


def orders_of_rotation(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    config = size.config(pos="rope", norm="rmsnorm", qk_norm=True, mlp="relu2")
    context = AttentionContext(rope_cos_sin(torch.arange(size.T), size.C // size.H, config.rope_theta))
    x, blocks = torch.randn(size.B, size.T, size.C), [Block(config), Block(config)]
    blocks[1].attn = TransposedFirst(config)
    now, before = (forward_and_backward(partial(compiled(block), context=context), x, dtype) for block in blocks)
    yield Row("a fast block: q and k normed and rotated before the transposition, before after it", now, before,
              FAST_BLOCK_BYTES * x.numel(), block_flops(size))


def block_flops(size: Size) -> float:
    """Of the products of a block with an MLP of 4 C, forward and backward, attention's left out."""
    return 3 * 2 * 12 * size.C**2 * size.B * size.T


def attention_flops(size: Size) -> float:
    """Forward and backward, which takes 2.5 times as much; half of the scores count."""
    return 3.5 * 2 * size.B * size.T**2 * size.C


def recomputation(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    """The compiler keeps the MLP's activation, which is its default, or computes it again in the backward pass."""
    import torch._functorch.config as config  # a switch that has no public name

    x, blocks = torch.randn(size.B, size.T, size.C), [Block(size.config()) for _ in range(2)]
    now, before = (forward_and_backward(partial(compiled(block), context=AttentionContext()), x, dtype)
                   for block in blocks)

    def recomputed() -> None:
        with config.patch(ban_recompute_materialized_backward=False) if torch.cuda.is_available() else nullcontext():
            before()

    yield Row("a GPT-2 block: the activation kept, before recomputed", now, recomputed, BLOCK_BYTES * x.numel(),
              block_flops(size))


def attentions(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    """The kernel that torch chooses, and cuDNN's, each beside FlashAttention-2."""
    qkv = torch.randn(3, size.B, size.T, size.H, size.C // size.H, dtype=dtype)
    flops = attention_flops(size)

    def by(*kernels: SDPBackend) -> Callable[[], None]:
        def attention(x: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(list(kernels)) if kernels else nullcontext():
                return attend(*(t.transpose(1, 2) for t in x), None, 0.0, "sdpa")

        return forward_and_backward(attention, qkv, dtype)

    flash, cudnn = by(SDPBackend.FLASH_ATTENTION), by(SDPBackend.CUDNN_ATTENTION)
    yield Row("attention, forward and backward: torch's choice, before FlashAttention-2", by(), flash, 0, flops)
    yield Row("attention, forward and backward: cuDNN's, before FlashAttention-2", cudnn, flash, 0, flops)


def attention_within_documents(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    """Four documents a window, in the kernel for sequences of different lengths, where there is one."""
    qkv = torch.randn(3, size.B, size.T, size.H, size.C // size.H, dtype=dtype)
    positions = torch.arange(size.T) % (size.T // 4)
    documents = Documents(positions.expand(size.B, -1), 4 * size.B)
    with torch.autocast(qkv.device.type, dtype, enabled=dtype != torch.float32):
        found = GPT(size.config()).attention_context(torch.arange(size.T), torch.arange(size.T), documents=documents)
    mask = documents.share()[:, None] & torch.ones(size.T, size.T, dtype=torch.bool).tril()

    def by(mask: torch.Tensor | VarlenMask) -> Callable[[], None]:
        return forward_and_backward(lambda x: attend(*(t.transpose(1, 2) for t in x), mask, 0.0, "sdpa"), qkv, dtype)

    yield Row("attention within documents: a kernel for lengths, before a mask", by(found.mask), by(mask), 0,
              attention_flops(size) / 4)


def muon_update(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    """The update of GPT-2 small, AdamW's part included, from gradients that are there."""
    model = GPT(size.config())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    job = Job(0, 1, model.head.device, dtype)
    optimizer, adamw = (build_optimizer(model, OptimConfig(optimizer=name), job) for name in ("muon", "adamw"))

    @torch.no_grad()
    def before() -> None:  # with five steps of Newton-Schulz
        for p in muon_params(model):
            x = p.grad.to(dtype)
            x = x.T if x.size(0) > x.size(1) else x
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
            p.add_(x.T if p.size(0) > p.size(1) else x, alpha=-1e-3)
        adamw.step()

    yield Row("Muon's and AdamW's update: matrices in stacks, before one by one", optimizer.step, before, 0,
              240 * size.layers * size.C**3)  # four steps of 6 C^3 for 4 matrices a block, of 18 C^3 for 2


def zeroing(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    grads = [torch.zeros_like(p) for _ in range(12) for p in Block(size.config()).parameters()]
    yield Row("the gradients of 12 blocks are zeroed: in one launch, before one by one",
              partial(torch._foreach_zero_, grads), lambda: [grad.zero_() for grad in grads],
              sum(grad.nbytes for grad in grads))


def decoding(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    K, D = size.H // 3, size.C // size.H
    q, k, v = (torch.randn(size.B, heads, length, D, dtype=dtype)
               for heads, length in ((size.H, 1), (K, size.T), (K, size.T)))
    mask = torch.ones(1, 1, 1, size.T, dtype=torch.bool)

    def before() -> torch.Tensor:
        return attend(q, *(t.repeat_interleave(3, dim=1) for t in (k, v)), mask, 0.0, "sdpa")

    yield Row("a token's attention over grouped keys: as they are, before copied to all heads",
              partial(attend, q, k, v, mask, 0.0, "sdpa"), before, k.nbytes + v.nbytes)
