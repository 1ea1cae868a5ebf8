"""What a run will take, as one dictionary of plain values, which plan.py prints as text and as JSON.

It takes a model on the meta device, so that nothing of its size is ever in memory. docs/planning.md says what is
assumed, and where from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from flatgpt.data.loader import BatchPlan
from flatgpt.planning import flops, memory
from flatgpt.planning.hardware import NETWORKS, Machine
from flatgpt.planning.laws import expected_losses
from flatgpt.planning.layout import Layout
from model import LanguageModel

ASSUMED_MFU = 0.4  # Llama 3 405B was trained at 0.38 to 0.43 on H100 (arXiv:2407.21783, table 4)
CORPORA = {  # vocabulary, and tokens of the train split: of those that nanoGPT prepares as its readme files say, and
    # the hub's samples of ten billion tokens, as they are called
    "openwebtext": (50257, 9_035_582_198), "shakespeare_char": (65, 1_003_854), "shakespeare": (50257, 301_966),
    "fineweb": (50257, 10_000_000_000), "fineweb_edu": (50257, 10_000_000_000)}


@dataclass
class Speed:
    """Operations a second that one process makes, None where nobody knows, and where that number is from."""

    flops_per_s: float | None
    source: str  # in words, with "assumed" or "measured"


@dataclass
class PlannedRun:
    """What is planned. `layout` is rank 0's."""

    model: LanguageModel
    plan: BatchPlan
    layout: Layout
    machine: Machine
    memory_room: float  # bytes that a process may use
    program_bytes: float  # that a process has before it has a model
    per_host: int  # ranks that hsdp groups
    optimizer: str
    max_iters: int
    dataset_tokens: int | None  # of the train split; None where nobody knows
    checkpoints_kept: int
    speed: Speed
    price_per_gpu_hour: float

    @property
    def num_tokens(self) -> int:
        return self.max_iters * self.plan.seqs_per_step * self.model.config.block_size


def summarize(run: PlannedRun) -> dict[str, Any]:
    """The plan, in numbers: see docs/planning.md for what each is."""
    model, tokens = run.model, run.num_tokens
    params, non_embedding = model.num_params(non_embedding=False), flops.num_non_embedding(model)
    each = memory.checkpoint_bytes(model, run.optimizer)
    found = {
        "model": {
            "shape": asdict(model.config),
            "parameters": params, "parameters_by_part": flops.params_by_part(model), "non_embedding": non_embedding,
            "flops_per_token": flops.flops_per_token(model), "flops_per_token_by_part": flops.flops_by_part(model)},
        "machine": {"name": str(run.machine), "processes": run.machine.world_size, "memory_bytes": run.memory_room,
                    "peak_flops": run.machine.accelerator.flops if run.machine.accelerator else None},
        "batch": asdict(run.plan) | {"tokens_per_step": run.plan.seqs_per_step * model.config.block_size},
        "memory": memory_table(run),
        "checkpoints": {"bytes_each": each, "kept": run.checkpoints_kept, "bytes": each * run.checkpoints_kept},
        "tokens": {"steps": run.max_iters, "tokens": tokens, "per_parameter": tokens / params,
                   "dataset_tokens": run.dataset_tokens,
                   "epochs": tokens / run.dataset_tokens if run.dataset_tokens else None},
        "compute": compute(run),
        "losses": [{"law": law, "loss": loss, "limits": limits, "applies": loss < math.log(model.config.vocab_size)}
                   for law, loss, limits in (expected_losses(params, non_embedding, tokens) if tokens else [])]}
    return found | {"warnings": list(warnings(run, found))}


def memory_table(run: PlannedRun) -> list[dict[str, Any]]:
    """A row for each layout that makes sense on the machine, and for the one that the options ask for, with and without
    activation checkpointing; `chosen` is the one asked for."""
    model, world_size, table = run.model, run.machine.world_size, []
    asked = model.activation_checkpointing
    layouts = {"ddp": 1} | ({"fsdp": world_size} if world_size > 1 else {})
    layouts |= {"hsdp": run.per_host} if 1 < run.per_host < world_size else {}
    layouts |= {run.layout.parallel: run.layout.shard_size}
    for parallel, size in layouts.items():
        layout = replace(run.layout, parallel=parallel, shard_size=size)
        for is_checkpointing in (False, True) if model.h else (False,):
            model.activation_checkpointing = is_checkpointing
            parts = memory.forecast(model, run.plan, layout, run.optimizer, run.program_bytes)
            largest = memory.largest_micro_batch(
                run.plan.seqs_per_rank, world_size, partial(fits, model, layout, run.optimizer, run.memory_room,
                                                            run.program_bytes))
            table.append({
                "parallel": parallel, "shard_size": size, "activation_checkpointing": is_checkpointing,
                "parts": parts, "bytes": sum(parts.values()), "largest_micro_batch": largest,
                "chosen": parallel == run.layout.parallel and is_checkpointing == asked})
    model.activation_checkpointing = asked
    return table


def fits(model: LanguageModel, layout: Layout, optimizer: str, room: float, program_bytes: float,
         plan: BatchPlan) -> bool:
    """Whether a plan's micro-batch is forecast to fit so many bytes."""
    return sum(memory.forecast(model, plan, layout, optimizer, program_bytes).values()) <= memory.ROOM * room


def compute(run: PlannedRun) -> dict[str, Any]:
    """Operations, hours and price; what depends on the speed is None where that is not known."""
    model, processes = run.model, run.machine.world_size
    a_token = flops.flops_per_token(model)
    done = a_token + (flops.recomputed_flops_per_token(model) if model.activation_checkpointing else 0)
    found = {"flops": a_token * run.num_tokens, "speed": run.speed.source, "mfu": None, "tokens_per_sec": None,
             "hours": None, "gpu_hours": None, "price": None}
    if run.speed.flops_per_s is None:
        return found
    tokens_per_sec = processes * run.speed.flops_per_s / done
    hours = run.num_tokens / tokens_per_sec / 3600
    if run.machine.accelerator:
        found["mfu"] = tokens_per_sec * a_token / processes / run.machine.accelerator.flops
    return found | {"tokens_per_sec": tokens_per_sec, "hours": hours, "gpu_hours": hours * processes,
                    "price": hours * processes * run.price_per_gpu_hour if run.price_per_gpu_hour else None}


def warnings(run: PlannedRun, found: dict[str, Any]) -> Iterator[str]:
    """What will fail, or be a waste."""
    tokens, row = found["tokens"], next(row for row in found["memory"] if row["chosen"])
    if row["bytes"] > run.memory_room * memory.ROOM:
        fitting = [f"--parallel={other['parallel']}" + (" --activation_checkpointing=True" * other[
            "activation_checkpointing"]) + f" --batch_size={other['largest_micro_batch']}"
                   for other in found["memory"] if other["largest_micro_batch"]]
        adds_up_whole = run.machine.world_size > 1 and run.plan.accumulation_steps > 1 and not (
            run.layout.reduce_every_micro_batch)
        yield ("this will not fit the memory: " + (
            f"what fits is {', or '.join(fitting)}" if fitting else
            "try --reduce_every_micro_batch=True with fsdp or hsdp, which adds up no whole gradients" if adds_up_whole
            else "take more or larger GPUs, a smaller model or --block_size"))
    if tokens["epochs"] and tokens["epochs"] > 4:
        yield (f"{tokens['epochs']:.1f} epochs: beyond 4 a repeated token is worth less than a new one "
               "(arXiv:2305.16264)")
    if tokens["dataset_tokens"] is None:
        yield ("the data set is not here and not well known: --dataset_tokens=N says how many tokens it has, and "
               "--vocab_size=N its vocabulary, which is GPT-2's otherwise")
    if 0 < tokens["per_parameter"] < 10:
        yield (f"{tokens['per_parameter']:.1f} tokens a parameter: a smaller model that sees more of them would reach "
               "a lower loss with the same compute (20 are best, arXiv:2203.15556)")
    yield from _slow_links(run)


def _slow_links(run: PlannedRun) -> Iterator[str]:
    """Where exchanging gradients takes longer than half of computing them, which it overlaps with."""
    if run.machine.accelerator is None or run.speed.flops_per_s is None or run.machine.world_size == 1:
        return
    link = run.machine.accelerator.link_bytes_per_s if run.machine.num_nodes == 1 else NETWORKS["InfiniBand"]
    seconds = 2 * 4 * sum(p.numel() for p in run.model.parameters()) / link
    step = (run.plan.seqs_per_rank * run.model.config.block_size * flops.flops_per_token(run.model)
            / run.speed.flops_per_s)
    if seconds > step / 2:
        yield (f"gradients take {seconds:.2g} s a step between the GPUs, and a step {step:.2g} s of computing: a "
               "larger --total_batch_size keeps them busy")


# As text


def as_text(found: dict[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    model, batch, tokens, disk = (found[key] for key in ("model", "batch", "tokens", "checkpoints"))
    yield f"{model['parameters']:,} parameters, {model['flops_per_token']:.4g} flops a token (forward and backward)"
    counts, work = model["parameters_by_part"], model["flops_per_token_by_part"]
    for part in counts | work:
        yield (f"    {part:<16}{counts.get(part, 0):>16,} parameters"
               f"{work.get(part, 0) / model['flops_per_token']:>8.1%} of the flops")
    many = "es" if batch["accumulation_steps"] > 1 else ""
    yield (f"a step: {batch['tokens_per_step']:,} tokens = {batch['accumulation_steps']} micro-batch{many} x "
           f"{batch['micro_batch']} sequences x {model['shape']['block_size']} tokens x {batch['world_size']} ranks")
    yield from _memory_text(found)
    yield f"checkpoints: {size(disk['bytes_each'])} each, at most {disk['kept']}: {size(disk['bytes'])} on the disk"
    epochs = "" if tokens["epochs"] is None else f", {tokens['epochs']:.3g} epochs of {tokens['dataset_tokens']:,}"
    yield (f"the run: {tokens['tokens']:,} tokens in {tokens['steps']:,} steps, {tokens['per_parameter']:.3g} a "
           f"parameter{epochs}")
    yield from _compute_text(found["compute"])
    for law in found["losses"]:
        guess = "" if law["applies"] else "; guessing among all tokens has less, so that it does not apply"
        yield f"loss to expect: {law['loss']:.2f} by {law['law']}{guess}. {law['limits']}"
    for line in found["warnings"]:
        yield f"warning: {line}"


def _memory_text(found: dict[str, Any]) -> Iterator[str]:
    """The table of layouts."""
    machine, rows = found["machine"], found["memory"]
    parts = list(rows[0]["parts"])
    yield (f"memory a process, of {machine['memory_bytes'] / 1e9:.1f} GB on {machine['name']}, in GB, and the largest "
           "batch_size that fits:")
    yield " " * 22 + "".join(f"{name:>12}" for name in (*parts, "all", "batch_size"))
    for row in rows:
        title = row["parallel"] + (" checkpointing" if row["activation_checkpointing"] else "")
        cells = [f"{num_bytes / 1e9:.2f}" for num_bytes in (*row["parts"].values(), row["bytes"])]
        yield f"  {'*' if row['chosen'] else ' '} {title:<18}" + "".join(
            f"{cell:>12}" for cell in (*cells, row["largest_micro_batch"]))


def _compute_text(done: dict[str, Any]) -> Iterator[str]:
    if done["hours"] is None:
        yield f"compute: {done['flops']:.3g} flops; hours are not known: {done['speed']}"
        return
    mfu = "" if done["mfu"] is None else f", MFU {done['mfu']:.1%}"
    price = "" if done["price"] is None else f", price {done['price']:,.2f}"
    yield (f"compute: {done['flops']:.3g} flops, {done['tokens_per_sec']:,.0f} tokens/s{mfu} ({done['speed']}): "
           f"{done['hours']:,.3g} hours, {done['gpu_hours']:,.3g} GPU-hours{price}")


def size(num_bytes: float) -> str:
    """1.5 GB, 23 MB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
