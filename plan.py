"""What a run will take, before it runs: parameters, memory a GPU, hours, price, and the loss to expect.

    python plan.py config/gpt2_124m.py --gpus=8xH100                  a config, on a node of eight
    python plan.py config/gpt2_124m.py --gpus=2x8xA100 --parallel=fsdp --mfu=0.45 --price_per_gpu_hour=2
    python plan.py --depth=12 --write=config/mine.py                  a shape, a batch and rates for 12 blocks
    python plan.py --flops=1e19 --gpus=8xH100                         the best model for so much compute
    python plan.py --hours=24 --gpus=1xRTX4090                        or for so much time
    python plan.py --fit out/*                                        the law of your own runs, and a picture of it
    python plan.py --fit out/* --params=1e9 --tokens=20e9             and the loss that it tells of such a run

It needs neither data, nor a GPU, nor the memory of the weights. Options of train.py are understood, in config files and
as --key=value. docs/planning.md says how to read a plan, what is assumed, and where from.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signals.begin()

import contextlib
import json
import shlex
import statistics
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from flatgpt import files, machine, run_folder
from flatgpt.data import loader
from flatgpt.data.shards import UNKNOWN_VOCAB_SIZE
from flatgpt.models import inference, weights
from flatgpt.models.baselines import build_empty
from flatgpt.options import check_options, failed_rules, field_types, flatten, parse_options, run_script
from flatgpt.planning import fit, fit_summary, flops, memory, proposal
from flatgpt.planning.hardware import Machine, parse_machine
from flatgpt.planning.layout import Layout
from flatgpt.planning.proposal import Setting
from flatgpt.planning.summary import ASSUMED_MFU, CORPORA, PlannedRun, Speed, as_text, fits, summarize
from flatgpt.training.config import TrainConfig
from flatgpt.training.device import DTYPES
from model import GPTConfig, LanguageModel

FLOAT16_CARDS = ("V100", "T4")  # have no bfloat16
CHOSEN = ("n_layer", "n_head", "n_embd", "max_iters", "lr_decay_iters")  # by a proposal, in every case
DEFAULTS = {  # of a proposal, where nothing else is asked for: the shape of the models behind the law of batch and rate
    "pos": ("rope", "a Llama's shape, as DeepSeek LLM has it"), "norm": ("rmsnorm", ""), "mlp": ("swiglu", ""),
    "dataset": ("fineweb_edu", "")}


@dataclass
class PlanConfig:
    gpus: str = ""  # 8xH100, 2x8xA100 for two nodes, RTX4090, cpu; empty: cpu with --device=cpu, else 8xH100
    mfu: float = 0.0  # share of the GPUs' peak that the run makes use of; 0 = assumed, or measured
    measured: Annotated[str, "path"] = ""  # run folder, whose speed is taken in place of an assumption
    price_per_gpu_hour: float = 0.0  # in any currency
    dataset_tokens: int = 0  # tokens of the train split; 0 = the data set's own, where it is here or well known
    depth: int = 0  # propose a model of so many blocks
    flops: float = 0.0  # propose the best model for so many floating-point operations
    hours: float = 0.0  # propose the best model for so many hours on the GPUs
    tokens: float = 0.0  # with a proposal: train on so many; 0 = tokens_per_param of them. With --fit: of the run asked
    tokens_per_param: float = proposal.TOKENS_PER_PARAM  # with a proposal: tokens a parameter
    write: Annotated[str, "path"] = ""  # write the proposal to this file, as a config
    fit: Annotated[tuple[str, ...], "path"] = ()  # fit a law to the finished ones of these run folders
    params: float = 0.0  # with --fit: parameters of the run whose loss is asked for
    picture: Annotated[str, "path"] = "fit.svg"  # with --fit: the picture to write, svg or png
    json: bool = False  # print the plan, or the law, as JSON
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self) -> list[str]:
        return failed_rules(self, ("mfu", 0 <= self.mfu <= 1, "a share of 1"),
                            ("price_per_gpu_hour", self.price_per_gpu_hour >= 0, "0 or more"),
                            ("dataset_tokens", self.dataset_tokens >= 0, "0 or more"),
                            ("depth", 0 <= self.depth <= proposal.MAX_DEPTH, f"0 to {proposal.MAX_DEPTH}"),
                            ("flops", self.flops >= 0, "0 or more"), ("hours", self.hours >= 0, "0 or more"),
                            ("tokens", self.tokens >= 0, "0 or more"),
                            ("tokens_per_param", self.tokens_per_param > 0, "positive"),
                            ("params", self.params >= 0, "0 or more"),
                            ("picture", Path(self.picture).suffix in (".svg", ".png"), "a name in .svg or .png"))

    def conflicts(self, given: Collection[str]) -> list[str]:
        """Which of the given keys a proposal chooses by itself, or say nothing without one."""
        asked = [key for key in ("depth", "flops", "hours") if getattr(self, key)]
        if "branch_from" in given:
            return [f"branch_from={self.train.run.branch_from} is for train.py: plan the run that it branches from, "
                    "with the --max_iters of the branch"]
        if self.fit:
            return [f"{key} says nothing beside --fit: leave it out"
                    for key in (*asked, "write", "tokens_per_param", "measured") if key in given]
        if not asked:
            return [f"{key} is for a proposal: add --depth, --flops or --hours"
                    for key in ("tokens", "tokens_per_param", "write") if key in given] + [
                    f"{key} is for a law of one's own: add --fit" for key in ("params", "picture") if key in given]
        faults = [f"{' and '.join(asked)} say the same thing twice: give one of them"] if len(asked) > 1 else []
        if {"tokens", "tokens_per_param"} <= {*given}:
            faults.append("tokens and tokens_per_param say the same thing twice: give one of them")
        if "init_from" in given:
            faults.append(f"--{asked[0]} proposes a new model: leave init_from out")
        return faults + [f"{key} follows from --{asked[0]}: leave it out" for key in CHOSEN if key in given]


def main(argv: list[str]) -> None:
    """Print the plan, or the law; write the proposal, if one was asked for."""
    config, given = parse_options(PlanConfig, argv, usage=__doc__)
    check_options(config, given)
    if config.fit:
        fit_runs(config, given)
        return
    settings = {}
    if config.depth or config.flops or config.hours:
        if config.write and Path(config.write).exists():
            raise FileExistsError(f"{config.write} is there already: choose another --write")
        settings = propose(config, given)
        config, given = with_settings(argv, settings)
        settings |= fitting(summarize(plan_run(config, given))["memory"], config, given)
        config, given = with_settings(argv, settings)
    run = plan_run(config, given)
    found = summarize(run)
    if config.write:
        Path(config.write).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(Path(config.write), proposed_config(argv, config, given, run, settings))
    if config.json:
        print(json.dumps(found | {"proposal": {key: asdict(setting) for key, setting in settings.items()}}, indent=1))
        return
    for line in (*proposal.as_lines(settings), *as_text(found)):
        print(line)
    if config.write:
        print(f"wrote {config.write}")


def fit_runs(config: PlanConfig, given: Mapping[str, str]) -> None:
    """Print the law of the runs, and the loss of a run that --params and --tokens, or options of train.py, describe;
    write the picture. Raises ValueError where the runs are too few."""
    from flatgpt.training import finished_runs, fit_plots, plots  # matplotlib takes a second

    runs, left_out = finished_runs.gather(config.fit)
    points, varies = fit.choose([run.point for run in runs], left_out)
    num_params, num_tokens = config.params, config.tokens
    if given.keys() & field_types(TrainConfig).keys():
        run = plan_run(config, given)
        num_params, num_tokens = num_params or run.model.num_params(non_embedding=False), num_tokens or run.num_tokens
    law = fit.fit_law(points, varies)
    to = fit_summary.target(law, num_params, num_tokens)
    found = fit_summary.summarize_fit(law, to, left_out, finished_runs.differences(runs, points))
    picture = Path(config.picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(picture, plots.render(fit_plots.picture_of_fit(law, to), picture.suffix[1:]))
    print(json.dumps(found | {"picture": config.picture}, indent=1) if config.json else
          "\n".join((*fit_summary.fit_as_text(found), f"wrote {picture}")))


def plan_run(config: PlanConfig, given: Mapping[str, str]) -> PlannedRun:
    """What the options ask for, with the model on the meta device. Raises ValueError."""
    train, hardware = config.train, machine_of(config)
    vocab_size, dataset_tokens = known_data(train.data.dataset, config)
    model = make_model(train, given, vocab_size)
    layout = make_layout(train, hardware)
    room, program = memory_of(hardware)
    plan = loader.plan_batches(
        train.data, given, model.config.block_size, hardware.world_size,
        lambda seqs: max(1, memory.largest_micro_batch(
            seqs, hardware.world_size, partial(fits, model, layout, train.optim.optimizer, room, program))))
    kept = memory.checkpoints_kept(train.run.keep_last, train.run.keep_every,
                                   train.run.save_interval or train.eval_interval, train.max_iters)
    return PlannedRun(model, plan, layout, hardware, room, program, hardware.per_node, train.optim.optimizer,
                      train.max_iters, dataset_tokens, kept, speed_of(config, hardware), config.price_per_gpu_hour)


def machine_of(config: PlanConfig) -> Machine:
    """What the run is planned on. Raises ValueError."""
    return parse_machine(config.gpus or ("cpu" if config.train.where.device == "cpu" else "8xH100"))


def known_data(dataset: str, config: PlanConfig) -> tuple[int, int | None]:
    """Vocabulary and tokens of the train split: as the options say, as the data says where it is here, or as is known
    of a corpus with that name. A vocabulary that nobody knows is GPT-2's, as train.py has it."""
    train = config.train
    vocab_size, num_tokens = CORPORA.get(dataset, (0, 0))
    with contextlib.suppress(FileNotFoundError):  # it need not be here
        data = loader.open_mixture(dataset, train.model.vocab_size, train.data.tokenizer)
        if data.vocab_size == UNKNOWN_VOCAB_SIZE:
            raise ValueError(f"{dataset} does not say how large its vocabulary is: add --vocab_size=N")
        vocab_size = data.vocab_size
        num_tokens = sum(int(split.lengths.sum()) for split in data.splits("train").values())
    return train.model.vocab_size or vocab_size or GPTConfig.vocab_size, config.dataset_tokens or num_tokens or None


def make_model(train: TrainConfig, given: Mapping[str, str], vocab_size: int) -> LanguageModel:
    """The model on the meta device, without weights; of --init_from its shape alone is read. Raises ValueError."""
    shape = GPTConfig(**asdict(train.model) | {"vocab_size": vocab_size})
    block_size = shape.block_size
    if train.init_from != "scratch":
        found = weights.read_shape(train.run.out_dir if train.init_from == "resume" else train.init_from)
        if faults := inference.shape_faults(found, shape, given):
            raise ValueError(f"init_from={train.init_from} does not fit: {'; '.join(faults)}")
        inference.adopt_shape(shape, given, vars(found))
        block_size = shape.block_size
        shape.vocab_size, shape.block_size = found.vocab_size, found.block_size
    model = build_empty(shape)
    if block_size != shape.block_size:
        model.crop_block_size(block_size)
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
    if hardware.accelerator is None and config.mfu:
        raise ValueError(f"mfu={config.mfu:g} is for GPUs: a CPU has no listed peak")
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


# Proposals


def propose(config: PlanConfig, given: Mapping[str, str]) -> dict[str, Setting]:
    """A model for the depth, the operations or the hours that were asked for: those options that were not given. Raises
    ValueError."""
    train, hardware = config.train, machine_of(config)
    chosen = {key: Setting(value, why) for key, (value, why) in DEFAULTS.items() if key not in given}
    shape = GPTConfig(**asdict(train.model) | {key: setting.value for key, setting in chosen.items()
                                               if hasattr(train.model, key)})
    dataset = chosen["dataset"].value if "dataset" in chosen else train.data.dataset
    shape.vocab_size = known_data(dataset, config)[0]

    def num_tokens(params: int) -> float:
        return config.tokens or config.tokens_per_param * params

    depth, compute = config.depth, config.flops
    if config.hours:
        speed = speed_of(config, hardware)
        if speed.flops_per_s is None:
            raise ValueError(f"hours={config.hours:g} on {hardware}: {speed.source}")
        compute = config.hours * 3600 * hardware.world_size * speed.flops_per_s
    depth = depth or proposal.depth_for(compute, shape, num_tokens)
    size = proposal.size_of(proposal.shape_of_depth(depth, shape))
    tokens = compute / size.flops if compute and not config.tokens else num_tokens(size.params)
    budget = f", {compute:.3g} flops" if compute else ""
    why = f"{tokens / size.params:.3g} a parameter (arXiv:2203.15556: 20){budget}"
    asked = {key: value for key, value in flatten(train).items() if key in given}
    if hardware.accelerator is None and "device" not in given:
        chosen["device"] = Setting("cpu", "")
    return chosen | proposal.propose(depth, shape, tokens, hardware.world_size, why, asked)


def fitting(table: list[dict], config: PlanConfig, given: Mapping[str, str]) -> dict[str, Setting]:
    """The layout that fits the memory with the least work beyond the model's, of those that the options allow, and its
    micro-batch. None where nothing fits: the plan's warning says so."""
    train = config.train
    rows = [row for row in table if row["largest_micro_batch"]
            and ("parallel" not in given or row["parallel"] == train.parallel.parallel)
            and ("activation_checkpointing" not in given
                 or row["activation_checkpointing"] == train.activation_checkpointing)]
    if not rows:
        return {}
    row = min(rows, key=lambda row: row["activation_checkpointing"])  # the first of those
    limit = proposal.micro_batch_limit(train.model.block_size)
    settings = {"batch_size": Setting(min(row["largest_micro_batch"], limit),
                                      f"sequences; at most {row['largest_micro_batch']} are forecast to fit")}
    for key in ("parallel", "activation_checkpointing"):
        if row[key] not in ("ddp", False):
            settings[key] = Setting(row[key], "so that it fits the memory")
    return {key: setting for key, setting in settings.items() if key not in given}


def with_settings(argv: list[str], settings: Mapping[str, Setting]) -> tuple[PlanConfig, dict[str, str]]:
    """The options of the command line, and those that are proposed."""
    argv = [*argv, *(f"--{key}={setting.value}" for key, setting in settings.items())]
    return parse_options(PlanConfig, argv)


def proposed_config(argv: list[str], config: PlanConfig, given: Collection[str], run: PlannedRun,
                    settings: Mapping[str, Setting]) -> str:
    """The text of a config file: what is proposed, and what of train.py's options was asked for."""
    train, path = config.train, config.write
    nodes = "" if run.machine.num_nodes == 1 else (
        f"--nnodes={run.machine.num_nodes} --rdzv_backend=c10d --rdzv_endpoint=node0:29500 ")
    start = "python" if run.machine.world_size == 1 else f"torchrun {nodes}--nproc_per_node={run.machine.per_node}"
    params = run.model.num_params(non_embedding=False)
    prepare = f"    python prepare_data.py {train.data.dataset}\n" if train.data.dataset in CORPORA else ""
    docstring = f"""A GPT of {params:,} parameters on {run.num_tokens:,} tokens of {train.data.dataset}, by plan.py:

    python plan.py {shlex.join(argv)}

What it will take, and how it starts:

    python plan.py {path}{f" --gpus={config.gpus}" if config.gpus else ""}
{prepare}    {start} train.py {path}
"""
    flat = flatten(train)
    asked = {key: Setting(flat[key], "as asked") for key in given if key in flat and key not in settings}
    out_dir = {} if "out_dir" in asked else {"out_dir": Setting(f"out/{Path(path).stem}", "")}
    return proposal.as_config(docstring, out_dir | asked | settings)


if __name__ == "__main__":
    run_script(main)
