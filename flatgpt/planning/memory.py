"""What takes how many bytes on one rank while it trains: from shapes alone, before there is a run.

A step is fullest at one of three moments: when the head makes its gradient, when the last block has begun its backward
pass, or when all gradients are there. The parts are those of the fullest:

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
from dataclasses import replace

import torch
import torch.nn as nn

from flatgpt.data.loader import BatchPlan
from flatgpt.models import fused
from flatgpt.planning.layout import Layout
from model import LanguageModel

ROOM = 0.95  # of a GPU's memory, for tensors
HEAP = 1.5  # on a CPU, what a micro-batch takes of the heap, its holes included, to what of it is in use
FIRST_STEP_BYTES = 60_000_000  # that torch's libraries take when they are first used


def forecast(model: LanguageModel, plan: BatchPlan, layout: Layout, optimizer: str = "adamw",
             program_bytes: float = 0) -> dict[str, float]:
    """Part -> bytes of the device on one rank; on a CPU, all that lies in the host's memory, where the process has
    `program_bytes` before it has a model."""
    fullest = max(_moments(model, plan, layout), key=lambda parts: sum(parts.values()))
    own = 4 * sum(p.numel() for p in model.parameters()) // layout.shard_size
    means = optimizer_bytes(model, optimizer) // layout.shard_size
    parts = {"weights": own, "gradients": 0, "optimiser": means, "activations": 0, "logits": 0, "workspace": 0} | fullest
    if layout.device.type != "cuda":
        for part in ("activations", "logits"):
            parts[part] *= HEAP
        parts["checkpoint"] = copy_bytes(model, layout.device, optimizer) if layout.rank == 0 else 0
        parts["program"] = program_bytes + FIRST_STEP_BYTES
    return parts


def largest_micro_batch(model: LanguageModel, seqs_per_rank: int, layout: Layout, room: float,
                        optimizer: str = "adamw", program_bytes: float = 0) -> int:
    """The largest divisor of `seqs_per_rank` whose forecast is below `room` bytes; 0 if not even 1 is."""
    largest = 0
    for size in (n for n in range(1, seqs_per_rank + 1) if seqs_per_rank % n == 0):
        plan = BatchPlan(seqs_per_rank * layout.world_size, size, seqs_per_rank // size, layout.world_size)
        if sum(forecast(model, plan, layout, optimizer, program_bytes).values()) >= room:
            break
        largest = size
    return largest


def optimizer_bytes(model: LanguageModel, optimizer: str) -> int:
    """Of AdamW's two float32 means; of Muon's one for each matrix that is neither a table nor the head."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} | {model.head}
    return sum((4 if optimizer == "muon" and p.dim() == 2 and p not in tables else 8) * p.numel()
               for p in model.parameters())


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


def _moments(model: LanguageModel, plan: BatchPlan, layout: Layout) -> list[dict[str, float]]:
    """What of gradients, activations, logits and workspace there is at each of the moments."""
    rows = plan.micro_batch * model.config.block_size
    count, head = sum(p.numel() for p in model.parameters()), model.head.numel()
    kept, block_backward = kept_bytes(model, plan.micro_batch, layout), _block_backward_bytes(model, rows, layout)
    gathered = _gathered_bytes(model, layout)
    whole, before = _gradient_bytes(count, plan, layout)
    casts = 0 if layout.dtype == torch.float32 else layout.dtype.itemsize * (
        head + (0 if layout.shard_size > 1 else sum(p.numel() for p in model.h.parameters())))
    at_head = {"gradients": before, "activations": kept, "logits": logits_bytes(model, rows, layout),
               "workspace": 4 * head + casts + gathered}
    in_block = {"gradients": before, "activations": kept + block_backward, "logits": 0,
                "workspace": 4 * head + casts + gathered}
    at_update = {"gradients": whole, "activations": 0, "logits": 0, "workspace": 8 * head + gathered}
    return [at_head, in_block, at_update]


def _gradient_bytes(count: int, plan: BatchPlan, layout: Layout) -> tuple[int, int]:
    """Of gradients at the end of a backward pass, and of those that are there before it: of other micro-batches, or
    where DDP keeps them in its buckets."""
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


def kept_bytes(model: LanguageModel, micro_batch: int, layout: Layout) -> int:
    """Bytes that a micro-batch keeps for its backward pass, up to what the head reads."""
    c = model.config
    rows = micro_batch * c.block_size
    if not model.h:
        return _kept_bytes_without_blocks(model, rows)
    block, last_norm = _block_bytes(model, rows, layout), rows * c.n_embd * 2 * 4
    blocks = c.n_layer * (rows * c.n_embd * 4 if model.activation_checkpointing else block)
    return blocks + last_norm + _mask_bytes(model, micro_batch, layout)


def _block_bytes(model: LanguageModel, rows: int, layout: Layout) -> int:
    """A block keeps the inputs of both norms (float32), and in the type of the products 2 C values a position (both
    norms' outputs), 5 H D (q, k and v, attention's output twice) and the MLP's hidden layer before its activation."""
    c = model.config
    heads, hidden = 5 * c.n_head * c.head_size, c.hidden * (2 if c.mlp == "swiglu" else 1)
    return rows * (2 * 4 * c.n_embd + (2 * c.n_embd + heads + hidden) * layout.dtype.itemsize)


def _block_backward_bytes(model: LanguageModel, rows: int, layout: Layout) -> int:
    """Of a block in its backward pass: its activations, where they are made again, and the gradients of the MLP's."""
    if not model.h:
        return 0
    again = _block_bytes(model, rows, layout) if model.activation_checkpointing else 0
    return again + 2 * rows * model.config.hidden * layout.dtype.itemsize


def _mask_bytes(model: LanguageModel, micro_batch: int, layout: Layout) -> int:
    """Of what says which keys a query sees, as truth values twice and as numbers, where they are needed."""
    c = model.config
    has_rows = model.keeps_within_documents and not _has_varlen_kernel(model, layout)
    if not has_rows and c.pos != "alibi":
        return 0
    return (2 + 4) * c.block_size**2 * (micro_batch if has_rows else 1) * (c.n_head if c.pos == "alibi" else 1)


def _has_varlen_kernel(model: LanguageModel, layout: Layout) -> bool:
    """As LanguageModel.has_varlen_kernel; of a model without a device the kernel of cards that have bfloat16."""
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
    """Of the logits that exist at a time, and of their copy in float32."""
    if model.config.model == "bigram":
        return 0
    chunk = fused.LOGITS_CHUNK_BYTES_CUDA if layout.device.type == "cuda" else fused.LOGITS_CHUNK_BYTES
    # On a GPU their copy in float32, which compiled code does not make.
    softmax = 4 * fused.SOFTMAX_ELEMENTS if layout.device.type == "cpu" else 2 * chunk
    return min(chunk + softmax, 8 * rows * model.config.padded_vocab_size)
