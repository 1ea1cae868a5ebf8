"""What takes how many bytes on one rank while it trains: from shapes alone, before there is a run.

A step is fullest when the head makes its gradient, when the last block has begun its backward pass, when all gradients
are there, when Muon makes its update or, on a CPU, when a checkpoint is copied. The parts are those of the fullest
moment:

    weights         a rank's own, float32
    gradients       the same; with FSDP whole ones until the last micro-batch, unless reduce_every_micro_batch
    optimiser       AdamW's two means; Muon has one of a matrix
    activations     what the blocks keep for the backward pass, and what a block makes in it
    logits          the chunk of them that exists at a time, and what the loss makes of it
    workspace       the head's gradient, 16-bit copies of weights, what FSDP gathers
    checkpoint      on a CPU: the copy from which rank 0 writes checkpoints
    program         on a CPU: the process itself

Nothing here knows a running job: training/preflight.py compares the forecast with what there is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn

from flatgpt.data.loader import BatchPlan
from flatgpt.models import fused
from flatgpt.planning.layout import Layout
from model import LanguageModel

ROOM = 0.95  # of the memory: what may be planned for
# What of the C library's heap lies in holes on a CPU, measured with glibc: a share of the activations; where RMSNorm is
# made of many operations; and of what the blocks would keep, where they are run again.
HOLES, HOLES_RMSNORM, HOLES_CHECKPOINTING = 0.25, 0.5, 0.6
HOLES_FSDP = 4  # times the blocks' weights, which are gathered and reduced in buffers that come and go
HEAP_BYTES = 2**25  # of an allocation, from which on the C library gives it back to the system
MUON_STACK_ELEMENTS = 2**24  # that Muon makes at a time, see training/muon.py
FIRST_STEP_BYTES = 60_000_000  # that torch's libraries take when they are first used


def forecast(model: LanguageModel, plan: BatchPlan, layout: Layout, optimizer: str = "adamw",
             program_bytes: float = 0) -> dict[str, float]:
    """Part -> bytes of the device on one rank; on a CPU, all that lies in the host's memory, where the process has
    `program_bytes` before it has a model."""
    on_host = layout.device.type != "cuda"
    moments = _moments(model, plan, layout, optimizer)
    if on_host:
        copy = copy_bytes(model, layout.device, optimizer) if layout.rank == 0 else 0
        for moment in moments:
            moment["activations"] += _hole_bytes(model, moment["activations"], layout, plan)
            moment["workspace"] += _fsdp_hole_bytes(model, layout)
            moment["checkpoint"] = copy - copy // 4  # what stays for the next save is no copy for Hugging Face's names
        in_ddp = layout.world_size > 1 and layout.shard_size == 1
        moments.append({"gradients": moments[-1]["gradients"] if in_ddp else 0, "activations": 0, "logits": 0,
                        "workspace": 0, "checkpoint": copy})
    fullest = max(moments, key=lambda parts: sum(parts.values()))
    own = 4 * sum(p.numel() for p in model.parameters()) // layout.shard_size
    parts = {"weights": own, "gradients": 0, "optimiser": optimizer_bytes(model, optimizer) // layout.shard_size}
    return parts | fullest | ({"program": program_bytes + FIRST_STEP_BYTES} if on_host else {})


def largest_micro_batch(seqs_per_rank: int, world_size: int, fits: Callable[[BatchPlan], bool]) -> int:
    """The largest divisor of `seqs_per_rank` up to which all that are smaller fit as well; 0 if not even 1 does."""
    largest = 0
    for micro_batch in (n for n in range(1, seqs_per_rank + 1) if seqs_per_rank % n == 0):
        if not fits(BatchPlan(seqs_per_rank * world_size, micro_batch, seqs_per_rank // micro_batch, world_size)):
            break
        largest = micro_batch
    return largest


def state_bytes(model: LanguageModel, plan: BatchPlan, layout: Layout, optimizer: str = "adamw") -> int:
    """Of weights, gradients and the optimiser's means on one rank, at the end of a backward pass, and of what FSDP
    gathers."""
    own = 4 * sum(p.numel() for p in model.parameters()) // layout.shard_size
    gradients, _ = _gradient_bytes(model, plan, layout)
    return own + gradients + optimizer_bytes(model, optimizer) // layout.shard_size + _gathered_bytes(model, layout)


def optimizer_bytes(model: LanguageModel, optimizer: str) -> int:
    """Of AdamW's two means in float32, and of Muon's one."""
    matrices = sum(p.numel() for p in muon_matrices(model)) if optimizer == "muon" else 0
    return 8 * sum(p.numel() for p in model.parameters()) - 4 * matrices


def muon_matrices(model: LanguageModel) -> list[nn.Parameter]:
    """What is neither a table nor the head."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} | {model.head}
    return [p for p in model.parameters() if p.dim() == 2 and p not in tables]


def checkpoint_bytes(model: LanguageModel, optimizer: str) -> int:
    """Of a checkpoint on the disk: float32 weights, and the optimiser's means."""
    return 4 * model.num_params(non_embedding=False) + optimizer_bytes(model, optimizer)


def checkpoints_kept(keep_last: int, keep_every: int, save_interval: int, max_iters: int) -> int:
    """The most that lie in the run folder at a time, with the best one and the one that is being written."""
    saves = max_iters // save_interval + 1
    nth = max_iters // keep_every if keep_every else 0
    return min(saves, keep_last + nth + 2) if keep_last else saves


def copy_bytes(model: LanguageModel, device: torch.device, optimizer: str = "adamw") -> int:
    """Of host memory that rank 0's copy for a checkpoint takes, float32: weights, means, and the weights once more as
    Hugging Face has them. What a GPU copies to is pinned, which torch hands out in powers of two."""
    weights = 4 * model.num_params(non_embedding=False)
    copies = [weights, optimizer_bytes(model, optimizer)]
    if device.type == "cuda":
        copies = [1 << (num_bytes - 1).bit_length() for num_bytes in copies]
    return sum(copies) + weights


# Moments of a step


def _moments(model: LanguageModel, plan: BatchPlan, layout: Layout, optimizer: str) -> list[dict[str, float]]:
    """What of gradients, activations, logits and workspace there is at each of the moments."""
    c, dtype = model.config, layout.dtype.itemsize
    rows, head = plan.micro_batch * c.block_size, model.head.numel()
    all_gradients, earlier = _gradient_bytes(model, plan, layout)
    gathered, kept = _gathered_bytes(model, layout), kept_bytes(model, plan.micro_batch, layout)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.h]
    casts, cast = (0, 0) if dtype == 4 else (dtype * n for n in (  # of all blocks, and of those in a backward pass
        0 if layout.shard_size > 1 else sum(blocks),
        max(blocks, default=0) if layout.shard_size > 1 or model.activation_checkpointing else sum(blocks)))
    read = rows * c.n_embd * 4  # what the head reads is part of `kept`; its gradient is as large
    at_head = {"gradients": earlier, "activations": kept + read, "logits": logits_bytes(model, rows, layout),
               "workspace": 4 * head + casts + (0 if dtype == 4 else dtype * (head + rows * c.n_embd)) + gathered}
    in_block = {"gradients": earlier, "activations": kept + _backward_bytes(model, rows, layout), "logits": 0,
                "workspace": 4 * head + cast + gathered}
    # A tied table has two gradients, the head's and its own, which are added up, and then added to earlier ones.
    tables = 4 * head * ((3 if earlier else 2) if model.lm_head is None else (1 if earlier else 0)) if model.h else 0
    at_end = {"gradients": all_gradients, "activations": 0, "logits": 0, "workspace": tables + gathered}
    at_update = {"gradients": all_gradients, "activations": 0, "logits": 0,
                 "workspace": _muon_bytes(model, layout) if optimizer == "muon" else 0}
    return [at_head, in_block, at_end, at_update]


def _gradient_bytes(model: LanguageModel, plan: BatchPlan, layout: Layout) -> tuple[int, int]:
    """Of gradients at the end of a backward pass, and of those that are there before it: of other micro-batches, or
    where DDP keeps them in its buckets."""
    count = sum(p.numel() for p in model.parameters())
    own = 4 * count // layout.shard_size
    adds_up = plan.accumulation_steps > 1
    if layout.shard_size > 1 and adds_up and not layout.reduce_every_micro_batch:
        return own + 4 * count, 4 * count
    keeps = adds_up or (layout.world_size > 1 and layout.shard_size == 1)
    return own, own if keeps else 0


def _gathered_bytes(model: LanguageModel, layout: Layout) -> int:
    """Of whole weights and gradients that FSDP has at a time: of a block, and of all that is in none."""
    if layout.shard_size == 1:
        return 0
    count = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.h]
    gathered = 8 * (max(blocks, default=0) + count - sum(blocks))
    if not layout.reshard_after_forward:
        gathered += layout.dtype.itemsize * (sum(blocks) - max(blocks, default=0))
    return gathered


def _muon_bytes(model: LanguageModel, layout: Layout) -> int:
    """Of the stacks that a rank owns, before and after, and of what it makes one of; and of the rows that travel."""
    dtype = 2 if layout.dtype == torch.bfloat16 else 4
    matrices = sum(p.numel() for p in muon_matrices(model))
    travel = 2 * matrices // layout.shard_size if layout.world_size > 1 else 0
    return dtype * (2 * matrices // layout.world_size + min(matrices, MUON_STACK_ELEMENTS) + travel)


def kept_bytes(model: LanguageModel, micro_batch: int, layout: Layout) -> int:
    """Bytes that a micro-batch keeps for its backward pass, up to what the head reads."""
    c = model.config
    rows = micro_batch * c.block_size
    if not model.h:
        return _kept_bytes_without_blocks(model, rows)
    block = rows * c.n_embd * 4 if model.activation_checkpointing else _block_bytes(model, rows, layout)
    last_norm = rows * c.n_embd * 4 * (2 + _keeps_normed(model, layout))
    return c.n_layer * block + last_norm + _mask_bytes(model, micro_batch, layout)


def _block_bytes(model: LanguageModel, rows: int, layout: Layout) -> int:
    """What a block keeps of so many positions, C channels each, with Q = H D channels of queries and K of keys:

    in float32 the inputs of both norms; in the type of the products the norms' outputs, queries, keys and values, what
    attention makes of them, and the MLP's hidden layer before its activation. Rotated or normed queries and keys come
    on top, and with dropout masks, and attention's weights where no kernel drops them."""
    c, dtype = model.config, layout.dtype.itemsize
    q, k, gates = c.n_head * c.head_size, c.num_kv_heads * c.head_size, 2 if c.mlp == "swiglu" else 1
    row = 4 * 2 * c.n_embd + dtype * (2 * c.n_embd + 2 * q + 2 * k + gates * c.hidden) + 4 * c.n_head
    if c.pos == "rope" or c.qk_norm:
        row += dtype * (q + k)
    if _keeps_normed(model, layout):
        row += 4 * 2 * c.n_embd
    if c.qk_norm and c.norm == "rmsnorm":  # which are float32
        row += 4 * (q + k) * (_keeps_normed(model, layout) + (dtype != 4))
    if c.dropout:
        on_cpu = layout.device.type == "cpu"
        row += 2 * c.n_embd * (dtype if on_cpu else 1) + (4 * 3 * c.n_head * c.block_size if on_cpu else 0)
    elif model.h[0].attn.backend == "math":
        row += dtype * c.n_head * c.block_size
    return rows * row


def _keeps_normed(model: LanguageModel, layout: Layout) -> bool:
    """Whether RMSNorm is made of several operations, of which one keeps its output."""
    return model.config.norm == "rmsnorm" and layout.device.type == "cpu"


def _backward_bytes(model: LanguageModel, rows: int, layout: Layout) -> int:
    """What the last block makes in its backward pass: its activations, where they are made again, the gradient of its
    output, and of the MLP the activation and the gradients of that and of its input."""
    if not model.h:
        return 0
    c = model.config
    again = _block_bytes(model, rows, layout) if model.activation_checkpointing else 0
    hidden = c.hidden * {"swiglu": 6, "relu2": 5}.get(c.mlp, 3)
    return again + rows * (4 * c.n_embd + layout.dtype.itemsize * hidden)


def _hole_bytes(model: LanguageModel, activations: float, layout: Layout, plan: BatchPlan) -> float:
    """On a CPU: of the heap, what is neither in use nor given back to the system."""
    if model.h and model.activation_checkpointing and activations:
        rows = plan.micro_batch * model.config.block_size
        return HOLES_CHECKPOINTING * model.config.n_layer * _block_bytes(model, rows, layout)
    return activations * (HOLES_RMSNORM if _keeps_normed(model, layout) else HOLES)


def _fsdp_hole_bytes(model: LanguageModel, layout: Layout) -> int:
    """The same of the buffers of FSDP, where a block is small."""
    blocks = [4 * sum(p.numel() for p in block.parameters()) for block in model.h]
    return HOLES_FSDP * sum(blocks) if layout.shard_size > 1 and max(blocks, default=0) < HEAP_BYTES else 0


def _mask_bytes(model: LanguageModel, micro_batch: int, layout: Layout) -> int:
    """Of what says which keys a query sees, where no kernel knows it: numbers that each block with a window makes of
    truth values, or, for documents and ALiBi, those values twice and numbers once for all blocks."""
    c = model.config
    has_kernel = _has_varlen_kernel(model, layout)
    has_rows = model.keeps_within_documents and not has_kernel
    if not has_rows and c.pos != "alibi":
        num_windows = 0 if has_kernel else sum(0 < window < c.block_size for window in c.windows)
        return num_windows * layout.dtype.itemsize * c.block_size**2
    return (2 + 4) * c.block_size**2 * (micro_batch if has_rows else 1) * (c.n_head if c.pos == "alibi" else 1)


def _has_varlen_kernel(model: LanguageModel, layout: Layout) -> bool:
    """As GPT.has_varlen_kernel; of a model without a device the kernel of cards that have bfloat16."""
    if model.head.device.type == "meta":
        return (layout.device.type == "cuda" and layout.dtype == torch.bfloat16 and model.config.pos != "alibi"
                and not model.config.dropout and model.config.head_size % 8 == 0 and model.config.head_size <= 256)
    with layout.autocast():
        return model.has_varlen_kernel()


def _kept_bytes_without_blocks(model: LanguageModel, rows: int) -> int:
    """The same of a model of baselines.py, in float32: that 16-bit products take less is not counted."""
    c = model.config
    if c.model == "bigram":  # its logits, those of the vocabulary alone, and their softmax
        return 4 * rows * 3 * c.padded_vocab_size
    if c.model == "mlp":  # the window, the hidden layer before and after its activation, what the head reads
        return 4 * rows * ((c.window + 1) * c.n_embd + (3 if c.mlp == "swiglu" else 2) * c.hidden)
    # So many C a layer are kept on a CPU, cuDNN keeps fewer; the vectors, the norm's input and output.
    return 4 * rows * ({"rnn": 2, "gru": 8, "lstm": 16}[c.model] * c.n_layer + 3) * c.n_embd


def logits_bytes(model: LanguageModel, rows: int, layout: Layout) -> int:
    """Of the logits that exist at a time: a chunk of them and its copy in float32, or, where that is none, the chunk
    and the one before (see fused.LinearCrossEntropy). Compiled code makes no copy."""
    if model.config.model == "bigram":
        return 0
    width, dtype, on_gpu = model.config.padded_vocab_size, layout.dtype.itemsize, layout.device.type == "cuda"
    chunk = min(rows, fused.chunk_rows(width, dtype, on_gpu))
    copied = 0 if dtype == 4 else min(chunk, fused.part_rows(width)) if layout.device.type == "cpu" else chunk
    return width * max(dtype * chunk + 4 * copied, dtype * min(rows, 2 * chunk))
