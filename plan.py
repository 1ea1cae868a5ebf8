"""What a run will take, before it runs: parameters, memory a GPU, hours, price, and the loss to expect.

    python plan.py config/gpt2_124m.py --gpus=8xH100                  a config, on a node of eight
    python plan.py config/gpt2_124m.py --gpus=2x8xA100 --parallel=fsdp --mfu=0.45 --price_per_gpu_hour=2
    python plan.py --depth=12 --write=config/mine.py                  a shape, a batch and rates for 12 blocks
    python plan.py --flops=1e19 --gpus=8xH100                         the best model for so much compute
    python plan.py --hours=24 --gpus=1xRTX4090                        or for so much time

It needs neither data, nor a GPU, nor the memory of the weights. Options of train.py are understood, in config files and
as --key=value. docs/planning.md says how to read a plan, what is assumed, and where from.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signals.begin()

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from flatgpt import files, machine, run_folder
from flatgpt.data import loader
from flatgpt.models import inference, weights
from flatgpt.models.baselines import build_empty
from flatgpt.options import check_options, failed_rules, parse_options, run_script
from flatgpt.planning import flops, memory
from flatgpt.planning.hardware import Machine, parse_machine
from flatgpt.planning.layout import Layout
from flatgpt.planning.summary import ASSUMED_MFU, CORPORA, Run, Speed, as_text, summarize
from flatgpt.training.config import TrainConfig
from flatgpt.training.device import DTYPES
from model import GPTConfig, LanguageModel

FLOAT16_CARDS = ("V100", "T4")  # have no bfloat16


@dataclass
class PlanConfig:
    gpus: str = ""  # 8xH100, 2x8xA100 for two nodes, RTX4090, cpu; empty: cpu with --device=cpu, else 8xH100
    mfu: float = 0.0  # share of the GPUs' peak that the run makes use of; 0 = assumed, or measured
    measured: Annotated[str, "path"] = ""  # run folder, whose speed is taken in place of an assumption
    price_per_gpu_hour: float = 0.0  # in any currency
    dataset_tokens: int = 0  # tokens of the train split; 0 = the data set's own, where it is here or well known
    json: bool = False  # print the plan as JSON
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self) -> list[str]:
        return failed_rules(self, ("mfu", 0 <= self.mfu <= 1, "a share of 1"),
                            ("price_per_gpu_hour", self.price_per_gpu_hour >= 0, "0 or more"),
                            ("dataset_tokens", self.dataset_tokens >= 0, "0 or more"))


def main(argv: list[str]) -> None:
    """Print the plan."""
    config, given = parse_options(PlanConfig, argv, usage=__doc__)
    check_options(config, given)
    found = summarize(plan_run(config, given))
    print(json.dumps(found, indent=1) if config.json else "\n".join(as_text(found)))


def plan_run(config: PlanConfig, given: Mapping[str, str]) -> Run:
    """What the options ask for, with the model on the meta device. Raises ValueError."""
    train, hardware = config.train, parse_machine(config.gpus or ("cpu" if config.train.where.device == "cpu"
                                                                 else "8xH100"))
    vocab_size, dataset_tokens = known_data(config)
    model = make_model(train, given, vocab_size)
    layout = make_layout(train, hardware)
    room, program = memory_of(hardware)
    plan = loader.plan_batches(
        train.data, given, model.config.block_size, hardware.world_size,
        lambda seqs: max(1, memory.largest_micro_batch(model, seqs, layout, memory.ROOM * room, train.optim.optimizer,
                                                       program)))
    kept = memory.checkpoints_kept(train.run.keep_last, train.run.keep_every,
                                   train.run.save_interval or train.eval_interval, train.max_iters)
    return Run(model, plan, layout, hardware, room, program, hardware.per_node, train.optim.optimizer, train.max_iters,
               dataset_tokens, kept, speed_of(config, hardware), config.price_per_gpu_hour)


def known_data(config: PlanConfig) -> tuple[int, int | None]:
    """Vocabulary and tokens of the train split: as the options say, as the data says where it is here, or as is known
    of a corpus with that name. A vocabulary that nobody knows is GPT-2's, as train.py has it."""
    train = config.train
    vocab_size, num_tokens = CORPORA.get(train.data.dataset, (0, 0))
    try:
        data = loader.open_mixture(train.data.dataset, train.model.vocab_size, train.data.tokenizer)
        vocab_size, num_tokens = data.vocab_size, sum(int(split.lengths.sum()) for split in data.splits("train").values())
    except FileNotFoundError:
        pass  # it need not be here
    return train.model.vocab_size or vocab_size or GPTConfig.vocab_size, config.dataset_tokens or num_tokens or None


def make_model(train: TrainConfig, given: Mapping[str, str], vocab_size: int) -> LanguageModel:
    """The model on the meta device, without weights; of --init_from its shape alone is read."""
    shape = GPTConfig(**asdict(train.model) | {"vocab_size": vocab_size})
    if train.init_from != "scratch":
        found = weights.read_shape(train.run.out_dir if train.init_from == "resume" else train.init_from)
        inference.adopt_shape(shape, given, vars(found))
        shape.vocab_size = found.vocab_size
    model = build_empty(shape)
    model.set_documents(train.data.documents)
    model.activation_checkpointing = train.activation_checkpointing
    return model


def make_layout(train: TrainConfig, hardware: Machine) -> Layout:
    """Rank 0's place, on a device that need not be here."""
    device = torch.device("cpu" if hardware.accelerator is None else "cuda")
    dtype = DTYPES.get(train.where.dtype)
    if dtype is None:  # auto
        dtype = torch.float16 if hardware.name in FLOAT16_CARDS else torch.bfloat16
        dtype = dtype if hardware.accelerator else torch.float32
    parallel, world_size = train.parallel, hardware.world_size
    shard_size = parallel.ranks_per_copy(world_size, hardware.per_node)
    if world_size % shard_size:
        raise ValueError(f"shard_size={shard_size} does not divide the {world_size} processes of {hardware}")
    return Layout(0, world_size, device, dtype, parallel.parallel, shard_size, parallel.reshard_after_forward,
                  parallel.reduce_every_micro_batch)


def memory_of(hardware: Machine) -> tuple[float, float]:
    """Bytes that a process may use, and what it has before it has a model: of a GPU, or of this machine's memory."""
    if hardware.accelerator:
        return hardware.accelerator.memory_bytes, 0
    return machine.memory_bytes() / hardware.per_node, machine.resident_bytes()


def speed_of(config: PlanConfig, hardware: Machine) -> Speed:
    """What a process computes in a second: as a run has been measured, as the options say, or as is assumed."""
    if config.measured:
        return measured_speed(Path(config.measured), hardware)
    if hardware.accelerator is None:
        return Speed(None, "a CPU has no listed peak; --measured=RUN_FOLDER takes the speed of a run on one")
    if config.mfu:
        return Speed(config.mfu * hardware.accelerator.flops, f"{config.mfu:.0%} of the peak, by --mfu")
    return Speed(ASSUMED_MFU * hardware.accelerator.flops,
                 f"{ASSUMED_MFU:.0%} of the peak, assumed: what Llama 3 405B reached on H100, arXiv:2407.21783")


def measured_speed(run: Path, hardware: Machine) -> Speed:
    """Of a run's processes, the median over its reports. Raises ValueError, FileNotFoundError."""
    records = [record for record in run_folder.read_records(run / "metrics.jsonl") if record.get("tokens_per_sec")]
    if not records:
        raise FileNotFoundError(f"{run} holds no run that has reported a speed")
    if hardware.accelerator:
        shares = [record["mfu"] for record in records if record.get("mfu")]
        if not shares:
            raise ValueError(f"{run} was not measured on a GPU with a listed peak, and gpus={hardware}")
        mfu = statistics.median(shares)
        return Speed(mfu * hardware.accelerator.flops, f"{mfu:.1%} of the peak, measured in {run}")
    if records[-1].get("mfu"):
        raise ValueError(f"{run} was measured on a GPU, and gpus={hardware}")
    tokens_per_sec = statistics.median(record["tokens_per_sec"] for record in records)
    ranks = files.read_json(run / "launch.json")["ranks"]
    a_token = flops.flops_per_token(build_empty(weights.read_shape(str(run))))
    return Speed(a_token * tokens_per_sec / len(ranks), f"measured in {run}: {tokens_per_sec:,.0f} tokens/s there")


if __name__ == "__main__":
    run_script(main)
