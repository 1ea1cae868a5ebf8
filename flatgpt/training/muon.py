"""Muon (kellerjordan.github.io/posts/muon): the mean of gradients, orthogonalised, matrix by matrix.

Owns the orthogonalisation, and how the ranks share it. Matrices of one shape are stacked, so that a few large products
do the work of many small ones, and each stack has an owner among the ranks. A step, with two replicas of two shards
each (HSDP; FSDP has one replica, DDP has shards of one rank, and what then has no other side is left out):

1. Each rank moves its rows of the means on and sends those of a stack to its owner, if that is in the same replica.
2. The owners put their stacks together, orthogonalise them, and send each rank of the replica the rows that it holds.
3. The replicas, whose stacks are different ones, gather each other's rows.

That is an all-to-all, another one, and an all-gather (or a sum, with many more ranks than stacks: see
distributed.all_gather), in the number type of the products.

Invariant: the same gradients give the same update, bit for bit, on any number of ranks in any layout. A product of a
stack is rounded in another way than that of a single matrix, so stacks depend on the model alone; the number of ranks
decides only who computes which. A rank computes with whole matrices: on parts the sums would have another order, which
the orthogonalisation turns into a difference of percents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from flatgpt.training import distributed
from flatgpt.training.distributed import Job
from flatgpt.training.parallel import local

VERSION = 2  # of what it makes of given gradients; 1 took queries, keys and values for one matrix
STACK_ELEMENTS = 2**24  # of a stack at most: GPT-2 small has six, which is few launches and work for six ranks
# a, b, c of each step x <- a x + b (x x^T) x + c (x x^T)^2 x, by Polar Express (arXiv:2505.16932): the best four of
# this kind for singular values from 0.0042 to 1. They are the paper's second to fifth, which go on from what its first
# makes of 0.001 to 1; the second is scaled to begin at 1, with 1% to spare.
COEFFICIENTS = [(8.0991, -22.606, 16.248), (3.9487, -2.9089, 0.55182), (3.3184, -2.4885, 0.51005),
                (2.3007, -1.6689, 0.41881)]


def orthogonalize(stack: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) with the singular vectors of those in `stack`, in its number type. Singular values
    that were at least 0.0042 of the matrix's norm are 0.87 to 1.13; smaller ones have grown up to 240-fold."""
    is_tall = stack.size(1) > stack.size(2)
    x = stack.mT.contiguous() if is_tall else stack
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=1e-7)
    for a, b, c in COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if is_tall else x


class Matrix(NamedTuple):
    """Rows `start` to `stop` of parameter `p`: all of it, or one of the layers that it fuses."""

    p: nn.Parameter
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.p.size(1)


Stack = list[Matrix]  # of one shape


def make_stacks(matrices: Iterable[Matrix]) -> list[Stack]:
    """Matrices of one shape together, in stacks of about equal size and at most STACK_ELEMENTS."""
    by_shape: dict[tuple[int, int], Stack] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    stacks = []
    for shape, alike in by_shape.items():
        num_stacks = -(-len(alike) // max(1, STACK_ELEMENTS // math.prod(shape)))
        bounds = [len(alike) * i // num_stacks for i in range(num_stacks + 1)]
        stacks += [alike[start:stop] for start, stop in pairwise(bounds)]
    return stacks


def share_out(stacks: Iterable[Stack], world_size: int) -> list[list[Stack]]:
    """Each rank's stacks: the most expensive first, always to the rank that has the least to do."""
    def cost(stack: Stack) -> int:  # multiplications of a step of `orthogonalize`
        n, m = sorted(stack[0].shape)
        return len(stack) * n * n * (2 * m + n)

    shares: list[list[Stack]] = [[] for _ in range(world_size)]
    for stack in sorted(stacks, key=cost, reverse=True):
        min(shares, key=lambda share: sum(map(cost, share))).append(stack)
    return shares


class SharedStacks:
    """Which rank owns which stacks, and how their rows travel to the owners and back. It holds no numbers itself.

    A rank holds one shard's rows of each matrix; the `shard_size` ranks of a replica hold all of them together."""

    def __init__(self, stacks: Iterable[Stack], job: Job):
        self.job, self.num_shards = job, job.shard_size
        replica, self.shard = divmod(job.rank, self.num_shards)
        shares = share_out(stacks, job.world_size)
        self.own = shares[job.rank]
        self.all = [stack for share in shares for stack in share]  # in the order of their owners
        replicas = [shares[first:first + self.num_shards] for first in range(0, job.world_size, self.num_shards)]
        self.of_replica = [stack for share in replicas[replica] for stack in share]
        # Elements that travel: what this rank holds for each owner in its replica, what each shard holds of its own
        # stacks, and what it holds of the stacks of each replica.
        self.for_owners = [self._numel(share, self.shard) for share in replicas[replica]]
        self.from_shards = [self._numel(self.own, shard) for shard in range(self.num_shards)]
        self.from_replicas = [sum(self._numel(share, self.shard) for share in shares) for shares in replicas]

    def held_from(self, p: nn.Parameter, shard: int) -> int:
        """The first row of p that is on a shard, or on the next one. FSDP gives each the next ceil(rows / shards) rows,
        and the last ones what is left."""
        return min(p.size(0), shard * -(-p.size(0) // self.num_shards))

    def rows(self, matrix: Matrix, shard: int) -> range:
        """Those of the parameter's rows that are the matrix's and on a shard."""
        start, stop = self.held_from(matrix.p, shard), self.held_from(matrix.p, shard + 1)
        return range(min(max(matrix.start, start), stop), min(max(matrix.stop, start), stop))

    def _numel(self, stacks: Iterable[Stack], shard: int) -> int:
        return sum(len(self.rows(m, shard)) * m.shape[1] for stack in stacks for m in stack)

    def held(self, stack: Stack, parts: Mapping[nn.Parameter, torch.Tensor]) -> list[torch.Tensor]:
        """The rows of each matrix that this rank holds: views of `parts`, its parts of tensors that lie over the ranks
        as their parameters do."""
        views = []
        for m in stack:
            rows = self.rows(m, self.shard)
            views.append(parts[m.p].narrow(0, rows.start - self.held_from(m.p, self.shard), len(rows)))
        return views

    def to_owners(self, parts: Mapping[nn.Parameter, torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """The own stacks (N, rows, columns), in number type `dtype`, of tensors of which each rank brings its parts."""
        if self.job.shard_group is None:  # the parts are whole
            return [torch.stack(self.held(stack, parts)).to(dtype) for stack in self.own]
        rows = [rows for stack in self.of_replica for rows in self.held(stack, parts)]
        flat = _flat(rows, self.job.device).to(dtype)
        flat = distributed.all_to_all(flat, self.for_owners, self.from_shards, self.job.shard_group)
        from_shards = [part.split([self._numel([[m]], shard) for stack in self.own for m in stack])
                       for shard, part in enumerate(flat.split(self.from_shards))]
        pieces = zip(*from_shards)  # of one matrix after the other, what came from each shard
        return [torch.cat([piece for _ in stack for piece in next(pieces)]).view(len(stack), *stack[0].shape)
                for stack in self.own]

    def from_owners(self, own: list[torch.Tensor], dtype: torch.dtype) -> Iterator[tuple[Stack, list[torch.Tensor]]]:
        """The way back, for all stacks: the rows of each matrix that this rank holds, in float32."""
        if self.job.world_size == 1:
            yield from ((stack, list(x.float())) for stack, x in zip(self.own, own))
            return
        rows = [x[self.rows(m, shard).start - m.start:self.rows(m, shard).stop - m.start]
                for shard in range(self.num_shards) for stack, xs in zip(self.own, own) for m, x in zip(stack, xs)]
        flat = _flat(rows, self.job.device).to(dtype)
        flat = distributed.all_to_all(flat, self.from_shards, self.for_owners, self.job.shard_group)
        flat = distributed.all_gather(flat, self.from_replicas, self.job.replica_group)
        for stack, part in zip(self.all, flat.split([self._numel([stack], self.shard) for stack in self.all])):
            pieces = part.float().split([self._numel([[m]], self.shard) for m in stack])
            yield stack, [piece.view(-1, m.shape[1]) for m, piece in zip(stack, pieces)]


def _flat(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors]) if tensors else torch.empty(0, device=device)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on one group, and AdamW on its own: together they are one list of groups and one table of states.

    `widths` has, for each of Muon's parameters, the numbers of rows of the matrices that it is made of. Muon
    orthogonalises in bfloat16 where the run's products are (`job.dtype`), else in float32: bfloat16 takes ten times as
    long on a CPU without instructions for it, and float16 loses small gradients."""

    def __init__(self, muon_group: dict[str, Any], widths: Mapping[nn.Parameter, list[int]],
                 adamw: torch.optim.Optimizer, job: Job):
        super().__init__([muon_group, *adamw.param_groups], {})
        self.adamw = adamw
        self.dtype = torch.bfloat16 if job.dtype == torch.bfloat16 else torch.float32
        adamw.state = self.state
        matrices = [Matrix(p, stop - width, stop) for p in muon_group["params"]
                    for width, stop in zip(widths[p], accumulate(widths[p]))]
        self.stacks = SharedStacks(make_stacks(matrices), job)

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.param_groups.append(group)  # complete as it is; torch's own imports its compiler

    @torch.no_grad()
    def step(self) -> None:
        """One update. It writes over the gradients of Muon's parameters."""
        group = self.param_groups[0]
        if group["params"]:
            weights = {p: local(p) for p in group["params"]}
            own = self.stacks.to_owners(self._means(group), self.dtype)
            own = [orthogonalize(stack) for stack in own]
            torch._foreach_mul_(list(weights.values()), 1 - group["lr"] * group["weight_decay"])
            for stack, updates in self.stacks.from_owners(own, self.dtype):
                rows, columns = stack[0].shape
                if group["beta2"]:
                    updates = self._even_rows(stack, updates, group["beta2"])
                scale = group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(self.stacks.held(stack, weights), updates, alpha=-scale)
        self.adamw.step()

    def _even_rows(self, stack: Stack, updates: list[torch.Tensor], beta2: float) -> list[torch.Tensor]:
        """The rows of updates, each divided by its usual size (NorMuon, arXiv:2510.05491): the root of a running mean
        of its squares, in parts of what they are in an orthogonal matrix whose rows are all of one size. Begun at 1,
        that needs no correction. (The paper then scales the whole update to a fixed size, which the ranks would have to
        sum up; this one has about that size by itself.)"""
        rows, columns = stack[0].shape
        parts = {m.p: local(self.state[m.p]["row_squares"]) for m in stack}
        evened = []
        for update, usual in zip(updates, self.stacks.held(stack, parts)):
            usual.lerp_(update.square().mean(dim=1, keepdim=True) * max(rows, columns), 1 - beta2)
            evened.append(update / (usual.sqrt() + 1e-8))
        return evened

    def _means(self, group: dict[str, Any]) -> dict[nn.Parameter, torch.Tensor]:
        """Move the means of gradients on. What is to be orthogonalised, this rank's parts: the means with a part of the
        new gradients in advance (Nesterov)."""
        params = group["params"]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                if group["beta2"]:
                    self.state[p]["row_squares"] = torch.ones_like(p[:, :1])
        grads = [local(p.grad) for p in params]
        means = [local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        torch._foreach_lerp_(grads, means, group["momentum"])
        return dict(zip(params, grads))
