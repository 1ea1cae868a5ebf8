"""Where a process of a run stands: its device, and how the ranks share the model. It needs no process group, so that a
run can be reckoned with that nobody has started; training/distributed.py joins the ranks on top of it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch


@dataclass
class Layout:
    """A process's place: rank of world_size, its device, and the number type of its matrix products.

    rank = replica * shard_size + shard: neighbours hold one copy of the model together."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    parallel: str = "ddp"
    shard_size: int = 1  # ranks that hold one copy of the model together
    reshard_after_forward: bool = True
    reduce_every_micro_batch: bool = False

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
