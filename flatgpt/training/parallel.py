"""How a model and its gradients lie over the ranks: DDP around it, or FSDP's parts; whole tensors and back.

Where several ranks hold one copy of the model together (job.shard_size), it is FSDP2 that lays it out: over all ranks
(fsdp), or over groups of neighbours that hold a copy each (hsdp, a mesh of replicas and shards).

Invariant: tensors that leave this module for a checkpoint are whole, whatever layout they were trained in.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from flatgpt.data.loader import empty_batch
from flatgpt.models import weights
from flatgpt.models.baselines import build_empty
from flatgpt.models.families import State
from flatgpt.training.distributed import Job


def materialize(model: nn.Module, state: State | None, job: Job) -> nn.Module:
    """Give a model made on the meta device its memory and rank 0's weights (`state`; None elsewhere): whole on every
    rank, or, with FSDP, each rank's part of it, so that no GPU and no host ever holds it whole. Empties `state`, as
    `fill` does."""
    if job.world_size == 1:
        weights.fill(model, state, job.device)
        return model
    if job.shard_size > 1:
        _shard(model, _mesh(job), job)
    model.to_empty(device=job.device)
    fill(model, state, job)
    return model


def fill(model: nn.Module, state: State | None, job: Job) -> None:
    """Overwrite a model, however it lies over the ranks, with rank 0's weights (`state`; None elsewhere): one parameter
    after the other is made of what `state` has, and taken out of it, so that a rank holds what it keeps and one more.
    (The ranks could not all read the files: those on other hosts need not see them.)"""
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = torch.empty(p.shape) if state is None else weights.make_parameter(state.pop(name), p.shape)
            p.copy_(from_rank0(value.to(job.device), p, job))


def stand_in(model: nn.Module, job: Job) -> nn.Module:
    """A model of one block for a trial: in `model`'s shape and number type, with weights of zero, on this rank alone.

    A pass that fails leaves FSDP with parameters that are no longer sharded, and the ranks in different collectives.
    So what is to be trained takes part in no trial, and what takes part is thrown away."""
    trial = build_empty(replace(model.config, n_layer=1) if model.h else model.config)
    trial.activation_checkpointing = model.activation_checkpointing
    trial.keeps_within_documents = model.keeps_within_documents
    if job.shard_size > 1:
        shape, names = (job.world_size, 1), ("others", "alone")
        _shard(trial, init_device_mesh(job.device.type, shape, mesh_dim_names=names)["alone"], job)
    trial.to_empty(device=job.device)
    with torch.no_grad():
        for p in trial.parameters():
            p.zero_()
    trial.set_attention(model.h[0].attn.backend if model.h else "sdpa")
    return trial


def _mesh(job: Job) -> DeviceMesh:
    """The ranks as FSDP2 takes them. The job's groups know --timeout_s, which those that a mesh makes would not."""
    if job.replica_group is None:
        return DeviceMesh.from_group(job.shard_group, job.device.type, mesh_dim_names=("shards",))
    ranks = torch.arange(job.world_size).view(-1, job.shard_size)
    return DeviceMesh.from_group([job.replica_group, job.shard_group], job.device.type, ranks,
                                 mesh_dim_names=("replicas", "shards"))


def _shard(model: nn.Module, mesh: DeviceMesh, job: Job) -> None:
    """FSDP2: each rank along the mesh's last dimension holds its part of every parameter; a block's are gathered when
    it runs, and its gradients summed in float32. With 16-bit products the blocks' weights travel in 16 bits; the
    residual path stays float32, as in DDP."""
    # These take a second, which every start would pay.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy()
    if job.dtype != torch.float32:
        policy = MixedPrecisionPolicy(job.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=job.reshard_after_forward)
    fully_shard(model, mesh=mesh)  # what is in no block stays gathered up to the backward pass in any case
    register_fsdp_forward_method(model, "next_token_logits")  # generation does not come through `forward`


def wrap(model: nn.Module, job: Job, batch_size: int) -> nn.Module:
    """The model whose backward pass averages gradients over the ranks: DDP around it, or itself if it is sharded."""
    if job.world_size == 1:
        return model
    if job.shard_size > 1:
        # After a pass that failed they would be whole, and each rank would train a model of its own.
        assert all(hasattr(p, "full_tensor") for p in model.parameters()), "FSDP's parameters are not sharded"
        return model
    device_ids = [job.device.index] if job.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # After its first backward pass DDP sorts its buckets anew, by the order in which gradients came; with them the
    # order of summation over four and more ranks changes. Two passes over nothing get that over before the first
    # step, so that a resumed run sums in the same order as one that was never interrupted.
    for _ in range(2):
        try_pass(wrapped, model, job, batch_size)
    return wrapped


def try_pass(wrapped: nn.Module, model: nn.Module, job: Job, batch_size: int) -> None:
    """A forward and backward pass over zeros; its gradients are dropped."""
    x, y, *documents = empty_batch(batch_size, model.config.block_size, model.keeps_within_documents, job.device)
    try:
        with job.autocast():
            _, loss = wrapped(x, y, None, *documents)
        loss.backward()
    finally:
        zero_grad(model, job)


def zero_grad(model: nn.Module, job: Job) -> None:
    """Forget the gradients. DDP's stay where they are, in its buckets: micro-batches then add up there, and the memory
    of a second set is saved."""
    if job.world_size == 1 or job.shard_size > 1:
        model.zero_grad()
    elif grads := [p.grad for p in model.parameters() if p.grad is not None]:
        torch._foreach_zero_(grads)  # one launch on a GPU


def set_gradient_sync(wrapped: nn.Module, is_last: bool, job: Job) -> None:
    """Before the passes of a micro-batch: in the step's last one gradients are averaged over the ranks, before that
    they are added up, whole on each rank or (reduce_every_micro_batch) in the parts that its copy's ranks hold."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP2's
        wrapped.set_requires_gradient_sync(is_last or job.reduce_every_micro_batch)
        wrapped.set_requires_all_reduce(is_last)  # between copies
    elif isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = is_last


def reshard(model: nn.Module) -> None:
    """Drop the gathered weights that a forward pass without a backward pass leaves behind in FSDP."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be spread over the ranks, as one; every rank has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be spread over the ranks."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def from_rank0(tensor: torch.Tensor, p: torch.Tensor, job: Job) -> torch.Tensor:
    """Rank 0's whole tensor, on the device, laid out over the ranks as parameter p is if it has as many rows: the
    inverse of `full_tensor`. The other ranks hand in one of the same shape, which is overwritten."""
    box = tensor.to(p.device)  # NCCL moves GPU memory only; an optimiser's step count may be on the host
    if job.world_size > 1:
        dist.broadcast(box, src=0)
    tensor = box.to(tensor.device)
    if not hasattr(p, "full_tensor") or tensor.shape[:1] != p.shape[:1]:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
