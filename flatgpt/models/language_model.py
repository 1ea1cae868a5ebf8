"""What every model has, a GPT or a baseline: loss, generation, files, and the number of its parameters.

Owns the interface that the scripts and the training loop use. A subclass brings layers and `hidden_states`; model.py
and baselines.py have the subclasses. This module does not know how logits and loss are chunked (fused.py), how a token
is decoded (generate.py) or chosen (sampling.py), or what a file looks like (weights.py). It imports weights.py when it
is called, because weights.py builds on model.py, and model.py on this.

Invariants:
- Tables of tokens have `padded_vocab_size` rows. Rows from vocab_size on are zero, get no gradient, take no part in the
  softmax, and never leave `forward` as logits.
- The logits of a training batch never exist as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from flatgpt.models import generate as generation
from flatgpt.models.attention import Documents
from flatgpt.models.fused import ChunkLoss, LinearCrossEntropy
from flatgpt.models.generate import Cache
from flatgpt.models.sampling import Sampler
from flatgpt.options import check_options

if TYPE_CHECKING:
    from model import GPTConfig


class LanguageModel(nn.Module):
    """A model of the next token. Subclasses define `hidden_states`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        check_options(config)
        self.config = config
        self.activation_checkpointing = False  # keep only the blocks' inputs, and run the blocks again in backward
        self.keeps_within_documents = False  # batches come with positions in documents
        self.compile_decoding = False  # compile the step that generates a token
        self.is_compiled = False  # its parts, in place: see compiling.compile_in_place
        self.chunk_loss = ChunkLoss()
        self.h = nn.ModuleList()  # blocks: they are sharded, compiled and recomputed one by one
        self.lm_head: nn.Linear | None = None  # None: the token table is the head

    def hidden_states(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Tokens (B, T), which follow those in the cache -> what the head reads (B, T, C)."""
        raise NotImplementedError

    @property
    def head(self) -> torch.Tensor:
        """(padded V, C)"""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
        """What the head reads (..., C) -> logits (..., V)."""
        logits = F.linear(x, self.head) if self.lm_head is None else self.lm_head(x)
        return logits[..., :self.config.vocab_size]

    def summed_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy, float32, of what the head reads (B, T, C) against targets (B, T)."""
        return LinearCrossEntropy.apply(x.flatten(0, 1), self.head, targets.flatten(), self.config.vocab_size,
                                        self.compute_dtype(), torch.is_grad_enabled(), self.chunk_loss)

    def compute_dtype(self) -> torch.dtype:
        """The number type of matrix products: that of autocast, or else that of the weights."""
        device = self.head.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.head.dtype

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                num_targets: torch.Tensor | int | None = None,
                positions: torch.Tensor | None = None,
                max_documents: int = 0) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits (B, T, V) of tokens idx (B, T), or, with targets (B, T), the loss: (logits, None) or (None, loss).

        Targets of -1 are ignored. The loss, float32, is the summed cross-entropy divided by `num_targets`: by default
        the number of targets in this batch (a mean); a training step split over micro-batches and ranks passes the
        number in the whole of it.

        With the `positions` (B, T) of the tokens in their documents, of which each begins with 0, as does each row, a
        GPT's attention stays within documents. A kernel is compiled for `max_documents`, by default as many as there
        can be. Raises ValueError when T is more than the model has positions.
        """
        if positions is None:
            x = self.hidden_states(idx)
        else:
            x = self.hidden_states(idx, documents=Documents(positions, max_documents or idx.numel()))
        if targets is None:
            return self.compute_logits(x), None
        if num_targets is None:
            num_targets = (targets >= 0).sum().clamp(min=1)
        return None, self.summed_loss(x, targets) / num_targets

    def set_documents(self, documents: str) -> None:
        """Be ready for batches as --documents makes them. Raises ValueError for a model that cannot keep within
        documents."""
        if documents != "stream" and self.config.model != "gpt":
            raise ValueError(f"documents={documents} is for model=gpt: a {self.config.model} reads on across documents")
        self.keeps_within_documents = documents != "stream"

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters without padding rows; `non_embedding` leaves out the position table (a tied token table is the
        head as well, and counts)."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        tables = [p for name, p in self.named_parameters() if name in ("wte.weight", "lm_head.weight")]
        total = sum(p.numel() for p in self.parameters()) - sum(padding * p.size(1) for p in tables)
        return total - (self.wpe.weight.numel() if non_embedding and getattr(self, "wpe", None) else 0)

    def set_attention(self, backend: str) -> None:
        """Use one of the kernels in attention.AttentionBackend in all blocks."""
        for block in self.h:
            block.attn.backend = backend

    def compiled_parts(self) -> list[nn.Module]:
        """The parts that are worth compiling, each in place. The blocks are alike, so they share one compilation."""
        return [*self.h, self.chunk_loss]

    def crop_block_size(self, block_size: int) -> None:
        """Change the context in place, e.g. to fine-tune a model of 1,024 positions on windows of 256. A model whose
        positions go on can be given more as well. Raises ValueError."""
        self.config.block_size = block_size

    # Generation

    def make_cache(self, batch_size: int, num_tokens: int) -> Cache:
        """An empty cache for so many tokens a row, prompt included."""
        return Cache()

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 use_cache: bool = True, **options: Any) -> torch.Tensor:
        """Continue each row of idx (B, T >= 1) by `max_new_tokens` tokens: (B, T + max_new_tokens). See `stream`;
        sampling.Sampler has more `options`."""
        tokens = self.stream(idx, max_new_tokens, Sampler(temperature, top_k, **options), use_cache)
        return torch.cat([idx, *(token.unsqueeze(1) for token in tokens)], dim=1)

    # Functions of generate.py whose first argument is a model: as methods they get this one. FSDP gathers the weights
    # for next_token_logits as it does for `forward` (see parallel._shard).
    stream = generation.stream
    next_token_logits = generation.next_token_logits

    # Files

    @staticmethod
    def from_pretrained(source: str, **overrides: Any) -> LanguageModel:
        """Load a model: a hub id (`gpt2` ... `gpt2-xl`, `owner/name`) or Hugging Face folder of a family that
        families.py knows, a checkpoint or run folder of ours, or nanoGPT's ckpt.pt. `overrides` replace fields of the
        configuration that do not change the weights' shapes (dropout). Raises ValueError or OSError in words for a
        user."""
        from flatgpt.models import weights

        model, state = weights.open_pretrained(source, **overrides)
        weights.fill(model, state)
        return model

    def save_pretrained(self, folder: str, eot_id: int | None = None) -> None:
        """Write a Hugging Face model folder: config.json, generation_config.json, model.safetensors."""
        from flatgpt.models import weights

        weights.save_pretrained(self.config, self.state_dict(), folder, eot_id)
