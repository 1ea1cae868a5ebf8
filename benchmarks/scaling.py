"""How long a step takes on many GPUs, on paper, and the same reckoning checked on this machine.

    python -m benchmarks.scaling                 the tables of docs/scaling.md
    python -m benchmarks.scaling --check=True    steps on this machine, predicted from its rates and measured
    torchrun --nproc_per_node=2 -m benchmarks.scaling --check=True --parallel=fsdp      by several processes

A step is what is counted, divided by rates: operations, bytes that pass through memory, launches of kernels, and the
collectives of flatgpt/planning/traffic.py, each as a ring. docs/scaling.md says what is assumed.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":
    signals.begin()

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Literal, NamedTuple

import torch

from benchmarks.rates import Counts, check
from flatgpt.data.loader import BatchPlan
from flatgpt.models.baselines import build_empty
from flatgpt.options import parse_options, run_script
from flatgpt.planning import memory
from flatgpt.planning.flops import flops_per_token
from flatgpt.planning.hardware import ACCELERATORS, NETWORKS
from flatgpt.planning.summary import size
from flatgpt.planning.traffic import Collective, step_traffic
from flatgpt.training import distributed
from flatgpt.training.device import DeviceConfig
from flatgpt.training.distributed import Job, ParallelConfig
from flatgpt.training.optim import OptimConfig, build_optimizer
from model import GPTConfig, LanguageModel

NODE, GPUS, LAYOUTS = 8, (8, 64, 512, 4096), ("ddp", "fsdp", "hsdp")
END_BYTES = 44  # a parameter: the clip reads 4 and scales 8, AdamW reads 16 and writes 12, zeroing writes 4
H100 = ACCELERATORS["H100"]
# What is assumed, of published peaks: FlashAttention and products of this size reach about half of the peak; NCCL's
# tests reach 0.8 of a link; copies 0.87 of the memory's (BENCHMARKS.md). HOST_WRITES is a shared file system's.
KERNELS_REACH, LINKS_REACH, MEMORY_REACHES, HOST_WRITES = 0.5, 0.8, 0.87, 2e9
HOST_LINK = 64e9  # bytes a second one way: PCIe 5.0, 16 lanes
SHA256 = 1.2e9  # bytes a second on one core (BENCHMARKS.md: 1.2 s for 1.5 GB)


class Link(NamedTuple):
    bytes_per_s: float
    hop_s: float


class Cluster(NamedTuple):
    """The rates of a rank's processor, and of the links between ranks: within a node, and a rank's share beyond."""

    flops: float
    memory_bytes_per_s: float
    launch_s: float
    counts: Counts
    overlaps: bool  # launches run ahead of kernels, and tensors travel while something is computed
    inside: Mapping[str, Link]  # kind of a collective -> link
    between: Link
    start_s: float  # of a collective


def gpus(network: str) -> Cluster:
    """Nodes of eight H100. The counts are the compiler's for a GPT-2 block (tests/fake_h100.py: 41 kernels, 6.43 GB of
    65,536 tokens and 768 channels) and the loss (1.24 GB of 4,096 rows, and 0.31 of the head's gradient); the latencies
    are those of NCCL's own model for its ring (NVIDIA/nccl, src/graph/tuning.cc: 10 us, 1.9 a hop in a node, 4.0
    between nodes). A launch is assumed to take Python and the driver 6 us."""
    counts = Counts(41, 20, 15, 128, 7.5)
    link = Link(H100.link_bytes_per_s * LINKS_REACH, 1.9e-6)
    return Cluster(H100.flops * KERNELS_REACH, H100.memory_bytes_per_s * MEMORY_REACHES, 6e-6, counts, True,
                   dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter"), link),
                   Link(NETWORKS[network] * LINKS_REACH, 4.0e-6), 10e-6)


def ring_seconds(cluster: Cluster, kind: str, num_bytes: float, ranks: int, ranks_in_node: int) -> float:
    """A collective of a tensor of `num_bytes`: W - 1 hops of a W-th of it, twice as many for an all-reduce. A ring
    enters a node by one adapter of each of its ranks there, and goes through all of them at a time."""
    if ranks == 1:
        return 0.0
    nodes, times, inside = ranks / ranks_in_node, 2 if kind == "all-reduce" else 1, cluster.inside[kind]
    hops, across = times * (ranks - 1), times * (nodes - 1)
    speeds = ([inside.bytes_per_s] if ranks_in_node > 1 else []) + (
        [cluster.between.bytes_per_s * ranks_in_node] if nodes > 1 else [])
    latency = cluster.start_s + (hops - across) * inside.hop_s + across * cluster.between.hop_s
    return latency + hops / ranks * num_bytes / min(speeds)


class Work(NamedTuple):
    """A step of a model in a layout, on one of its ranks."""

    model: LanguageModel
    parallel: str
    shard_size: int
    plan: BatchPlan
    itemsize: int = 2
    checkpointing: bool = False
    reduces_each: bool = False  # reduce_every_micro_batch

    @property
    def world_size(self) -> int:
        return self.plan.world_size


class Passes(NamedTuple):
    """Seconds of a micro-batch on one rank, alone."""

    forward_s: float  # of one block
    backward_s: float
    head_s: float

    def all_s(self, blocks: int) -> float:
        return blocks * (self.forward_s + self.backward_s) + self.head_s


def passes(work: Work, cluster: Cluster) -> Passes:
    """Of a micro-batch: kernels and launches in turn, or, where launches run ahead, the longer of the two."""
    c, rows = work.model.config, work.plan.micro_batch * work.model.config.block_size
    head_flops = 6 * work.model.head.numel()
    block_flops = (flops_per_token(work.model) - head_flops) / c.n_layer
    counts = cluster.counts

    def seconds(flops: float, num_bytes: float, launches: float) -> float:
        kernels = flops / cluster.flops + num_bytes / cluster.memory_bytes_per_s
        waits = launches * cluster.launch_s
        return max(kernels, waits) if cluster.overlaps else kernels + waits

    third = seconds(rows * block_flops, rows * c.n_embd * counts.block_bytes, counts.block_launches) / 3
    head = seconds(rows * head_flops, rows * c.padded_vocab_size * counts.logit_bytes, counts.other_launches)
    return Passes(third, (3 if work.checkpointing else 2) * third, head)


def end_seconds(work: Work, cluster: Cluster) -> float:
    """Clip, AdamW and zeroing, of what a rank holds."""
    held = sum(p.numel() for p in work.model.parameters()) / work.shard_size
    return END_BYTES * held / cluster.memory_bytes_per_s + cluster.counts.end_launches * cluster.launch_s


def step_seconds(work: Work, cluster: Cluster) -> float:
    """Of a step: passes of m micro-batches, what of the collectives nothing hides, and the update."""
    one, blocks, m = passes(work, cluster), work.model.config.n_layer, work.plan.accumulation_steps
    traffic = step_traffic(work.model, work.parallel, work.world_size, work.shard_size, m, work.itemsize,
                           reduce_every_micro_batch=work.reduces_each)
    loop_s = 2 * ring_seconds(cluster, "all-reduce", 24, work.world_size, min(NODE, work.world_size))  # train.py's sums
    end_s = end_seconds(work, cluster) + loop_s
    if work.world_size == 1:
        return m * one.all_s(blocks) + end_seconds(work, cluster)
    if not cluster.overlaps:
        sent = sum(each.count * (send_seconds(each, work, cluster) + copy_seconds(each, cluster)) for each in traffic)
        return m * one.all_s(blocks) + sent + end_s
    if work.parallel == "ddp":  # all buckets but the last, which has the token table, travel in the backward pass
        *early, last = [send_seconds(each, work, cluster) for each in traffic]
        return m * one.all_s(blocks) + max(0.0, sum(early) - blocks * one.backward_s) + last + end_s
    times = {(each.kind, each.group, each.part): send_seconds(each, work, cluster) for each in traffic}
    gather, reduce = (times[kind, "shards", "a block"] for kind in ("all-gather", "reduce-scatter"))
    across = times.get(("all-reduce", "replicas", "a block"), 0.0)
    # A block's weights are fetched while the one before computes; its gradients are sent while the next one does. The
    # first block, the last one, and what is in no block have nothing to hide behind.
    forward = gather + (blocks - 1) * max(one.forward_s, gather) + one.forward_s + one.head_s

    def backward(sent: float, across: float, rest: float) -> float:
        block = max(one.backward_s, gather + sent, across)
        return gather + (blocks - 1) * block + one.backward_s + sent + across + rest

    rest = times["reduce-scatter", "shards", "the rest"]
    rest_across = times.get(("all-reduce", "replicas", "the rest"), 0.0)
    earlier = backward(reduce, 0.0, rest) if work.reduces_each else backward(0.0, 0.0, 0.0)
    return (m * (times["all-gather", "shards", "the rest"] + forward) + (m - 1) * earlier
            + backward(reduce, across, rest + rest_across) + times["all-reduce", "shards", "the norm"] + end_s)


def send_seconds(each: Collective, work: Work, cluster: Cluster) -> float:
    """Of one of them. Shards are neighbours; the replicas of HSDP are one rank a node."""
    if each.group == "shards":
        return ring_seconds(cluster, each.kind, each.num_bytes, work.shard_size, min(NODE, work.shard_size))
    replicas = work.world_size // work.shard_size
    in_node = min(replicas, max(1, NODE // work.shard_size))
    return ring_seconds(cluster, each.kind, each.num_bytes, replicas, in_node)


def copy_seconds(each: Collective, cluster: Cluster) -> float:
    """FSDP copies what it has gathered, and what it will send, from and to one piece; DDP divides its sums."""
    return 2 * each.num_bytes / cluster.memory_bytes_per_s


# The tables


class Size(NamedTuple):
    config: GPTConfig
    batch_tokens: int
    source: str


GPT2 = {"bias": True, "mlp": "gelu_tanh"}
SIZES = {
    "124M": Size(GPTConfig(**GPT2), 2**19, "config/gpt2_124m.py"),
    "1.5B": Size(GPTConfig(n_layer=48, n_head=25, n_embd=1600, **GPT2), 2**20, "GPT-2 XL; the batch of GPT-3 XL"),
    "8B": Size(GPTConfig(block_size=8192, vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                         pos="rope", norm="rmsnorm", mlp="swiglu", mlp_hidden=14336, tie_embeddings=False), 2**22,
               "Llama 3 8B, and the batch that it begins with")}


@cache
def empty(name: str) -> LanguageModel:
    return build_empty(SIZES[name].config)


def plan_work(name: str, parallel: str, world_size: int, batch_tokens: int, network: str) -> Work | str:
    """The fastest step of those that fit: of all micro-batches, with and without activation checkpointing and
    reduce_every_micro_batch. Or why there is none."""
    model, config = empty(name), SIZES[name].config
    shard_size = {"ddp": 1, "fsdp": world_size, "hsdp": NODE}[parallel]
    if parallel == "hsdp" and world_size == NODE:
        return "is fsdp"
    mine, rest = divmod(batch_tokens // config.block_size, world_size)
    if rest or not mine:
        return f"only {batch_tokens // config.block_size} sequences"
    works = [Work(model, parallel, shard_size, BatchPlan(mine * world_size, micro, mine // micro, world_size),
                  checkpointing=checkpointing, reduces_each=each)
             for micro in range(min(mine, 64), 0, -1) if mine % micro == 0
             for checkpointing in (False, True) for each in (False, parallel != "ddp")[:1 + (micro < mine)]]
    fitting = [work for work in works if takes_bytes(work) < memory.ROOM * H100.memory_bytes]
    return min(fitting, key=lambda work: step_seconds(work, gpus(network)), default="does not fit")


def takes_bytes(work: Work) -> float:
    job = Job(0, work.world_size, torch.device("cuda"), torch.bfloat16, work.parallel, work.shard_size,
              reduce_every_micro_batch=work.reduces_each)
    work.model.activation_checkpointing = work.checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there is no GPU
        return sum(memory.forecast(work.model, work.plan, job).values())


def ideal_seconds(name: str, tokens: float) -> float:
    """Of one GPU that computes so many tokens in large micro-batches, sends nothing and updates nothing."""
    model, seqs = empty(name), 64
    work = Work(model, "ddp", 1, BatchPlan(seqs, seqs, 1, 1))
    return passes(work, gpus("InfiniBand")).all_s(model.config.n_layer) * tokens / (seqs * model.config.block_size)


def step_table(grows: bool) -> Iterator[str]:
    """A row for each model and number of GPUs: milliseconds of a step and efficiency, by layout."""
    for name, world_size in product(SIZES, GPUS):
        batch_tokens = SIZES[name].batch_tokens * (world_size // NODE if grows else 1)
        cells = [describe(name, parallel, world_size, batch_tokens) for parallel in LAYOUTS]
        yield f"| {name} | {world_size:,} | {batch_tokens / 2**20:,.4g} M | {' | '.join(cells)} |"


def describe(name: str, parallel: str, world_size: int, batch_tokens: int) -> str:
    """`12 x 4 c r: 100 ms, 90%, 80%`: micro-batches, sequences in each, checkpointing, reduce_every_micro_batch;
    milliseconds and efficiency over InfiniBand, then the efficiency over Ethernet, with the plan that is best there."""
    shares = []
    for network in [*NETWORKS][:1 + (world_size > NODE)]:
        work = plan_work(name, parallel, world_size, batch_tokens, network)
        if isinstance(work, str):
            return work
        step_s = step_seconds(work, gpus(network))
        if not shares:
            extras = " c" * work.checkpointing + " r" * work.reduces_each
            plan = f"{work.plan.accumulation_steps} x {work.plan.micro_batch}{extras}: {1000 * step_s:,.0f} ms"
        shares.append(f"{ideal_seconds(name, batch_tokens / world_size) / step_s:.0%}")
    return f"{plan}, {', '.join(shares)}"


def muon_table() -> Iterator[str]:
    """What a rank receives when the ranks gather Muon's updates, over replicas: DDP's, and HSDP's with eight shards."""
    for name in SIZES:
        for world_size in GPUS:
            cells = [muon_gather_bytes(empty(name), world_size, shards) for shards in (1, NODE)]
            yield f"| {name} | {world_size:,} | {' | '.join(size(cell) for cell in cells)} |"


def muon_gather_bytes(model: LanguageModel, world_size: int, shard_size: int) -> int:
    """Of the all-gather of muon.SharedStacks.from_owners in bfloat16."""
    job = Job(0, world_size, torch.device("cpu"), torch.bfloat16, "hsdp", shard_size)
    counts = build_optimizer(model, OptimConfig(optimizer="muon"), job).stacks.from_replicas
    return 2 * min(len(counts) * max(counts), 2 * sum(counts)) if len(counts) > 1 else 0  # see distributed.all_gather


def host_table() -> Iterator[str]:
    """What rank 0 alone does: it copies a checkpoint to the host and writes it; at a start it reads and sends one."""
    for name in SIZES:
        num_params = empty(name).num_params(non_embedding=False)
        num_bytes, begins = 12 * num_params, 4 * num_params / HOST_WRITES + 12 * num_params / SHA256
        writes = num_bytes / HOST_WRITES + num_bytes / SHA256
        yield f"| {name} | {size(num_bytes)} | {num_bytes / HOST_LINK:.2g} s | {writes:,.0f} s | {begins:,.0f} s |"


def torchtitan_rows() -> Iterator[str]:
    """Llama 3.1 8B on H100 by torchtitan, FSDP and torch.compile (benchmarks/llama3_h100_202412_torchtitan.md there):
    measured tokens a second and GPU, beside what is reckoned here."""
    model = empty("8B")
    for world_size, measured in ((8, 6667), (128, 6514)):
        work = Work(model, "fsdp", world_size, BatchPlan(2 * world_size, 2, 1, world_size))
        tokens_per_s = 2 * model.config.block_size / step_seconds(work, gpus("InfiniBand"))
        yield f"| {world_size} | {measured:,} | {tokens_per_s:,.0f} | {tokens_per_s / measured:.2f} |"


STEP_HEAD = "| model | GPUs | batch, tokens | ddp | fsdp | hsdp |"
TABLES = {
    "One batch": (STEP_HEAD, partial(step_table, grows=False)),
    "A batch that grows with the GPUs": (STEP_HEAD, partial(step_table, grows=True)),
    "What each rank receives of Muon's updates": ("| model | GPUs | ddp | hsdp |", muon_table),
    "What rank 0 does alone": ("| model | checkpoint | to the host | hashed, written | read at a start |", host_table),
    "Measured elsewhere": ("| GPUs | torchtitan, tokens/s a GPU | reckoned | ratio |", torchtitan_rows)}


@dataclass
class ScalingConfig:
    check: bool = False  # measure this machine's rates, and compare predicted with measured steps here
    parallel: Literal["ddp", "fsdp"] = "ddp"  # layout of the check, where torchrun has started several processes


def main(argv: list[str]) -> None:
    config, _ = parse_options(ScalingConfig, argv, usage=__doc__)
    if config.check:
        where = DeviceConfig(device="cpu", dtype="float32")
        with distributed.init_job(where, ParallelConfig(parallel=config.parallel)) as job:
            for row in check(predict_here, job):
                if job.rank == 0:
                    print(row, flush=True)
        return
    for title, (head, rows) in TABLES.items():
        print(f"\n### {title}\n\n{head}\n|{' --- |' * (head.count('|') - 1)}")
        for row in rows():
            print(row, flush=True)


def predict_here(model: LanguageModel, parallel: str, plan: BatchPlan, here: Mapping) -> float:
    """Seconds of a step on this machine, by the rates that `rates.measure` has found."""
    cluster = Cluster(here["flops"], here["memory_bytes_per_s"], here["launch_s"], Counts(*here["counts"]), False,
                      {kind: Link(*link) for kind, link in here["links"].items()}, Link(1.0, 0.0), 0.0)
    shard_size = plan.world_size if parallel == "fsdp" else 1
    return step_seconds(Work(model, parallel, shard_size, plan, 4), cluster)


if __name__ == "__main__":
    run_script(main)
