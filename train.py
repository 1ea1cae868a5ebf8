"""Train a GPT on tokens that prepare_data.py made.

    python train.py config/shakespeare_char_cpu.py                      one process, laptop
    python train.py config/shakespeare_char.py --compile=False          one GPU; any key can be overridden
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py            one node of eight GPUs

Two nodes of eight, the same command on both, node0 being the name of one of them:

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node0:29500 train.py config/gpt2_124m.py

The same command again goes on from the newest checkpoint in out_dir. Keys, meanings and defaults are nanoGPT's; where
flatGPT differs (device, dtype and compile are `auto`), --help says so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch

import checkpoint
import distributed
import optim
import settings
from checkpoint import RunConfig, RunFolder
from data import (
    DataConfig,
    EvalOrder,
    MixedOrder,
    Mixture,
    TrainOrder,
    derive_seed,
    open_mixture,
    pin,
    plan_batches,
    prefetch,
)
from distributed import DeviceConfig, Job
from metrics import LogConfig, Reporter, validation_losses
from model import GPT, GPTConfig
from optim import OptimConfig

# A run is resumed with the same values of these, or not at all. (World size and micro-batch may change.)
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "bias", "mlp", "norm_eps")
FIXED = (*SHAPE, "seed", "seqs_per_step", "data_fingerprint", "data_vocab_size")


@dataclass
class ModelConfig(GPTConfig):
    """Model; init_from other than scratch brings its own"""

    vocab_size: int = 0  # vocabulary; 0 = the data set's own (50257 where it does not say)


@dataclass
class TrainConfig:
    init_from: str = "scratch"  # scratch, gpt2 ... gpt2-xl, hub id, model or run folder, ckpt.pt; resume: go on
    max_iters: int = 600000  # updates in the whole run
    eval_interval: int = 2000  # steps between evaluations on the validation split
    eval_iters: int = 200  # batches an evaluation, evenly spaced over the split; 0 = the whole split, as at the end
    eval_only: bool = False  # evaluate on the whole validation split and exit
    seed: int = 1337  # of the initial weights, the data order and dropout
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile the blocks; auto = on CUDA only
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto = nccl on CUDA, else gloo
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    where: DeviceConfig = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> None:
    config, given = settings.parse(TrainConfig, argv, usage=__doc__)
    if config.init_from == "resume":
        config.init_from, config.run.resume = "scratch", "must"
    check_options(config)
    with distributed.job(config.where, config.backend) as here, RunFolder(config.run.out_dir) as run:
        train(config, given, run, here)


def train(config: TrainConfig, given: Mapping[str, str], run: RunFolder, here: Job) -> None:
    """One run, from the options to the last checkpoint."""
    report = Reporter(run.path, config.log, config.max_iters, here)

    # 1) The data. What is wrong with it, the options or the run folder is said before anything is written.
    data = open_mixture(config.data.dataset, config.model.vocab_size, config.data.tokenizer)
    train_splits, val_splits = data.splits("train"), data.splits("val")

    # 2) Where the run stands: rank 0 looks into the run folder, and the others hear of it.
    trainer = distributed.on_rank0(lambda: find_start(config, run, report), here)

    # 3) The model: weights from the run's checkpoint, from elsewhere, or fresh. Then the batch, which needs its shape.
    model = build_model(config, given, data, trainer["folder"], here)
    if config.init_from != "scratch":
        adopt_shape(config, given, model)
    plan = plan_batches(config.data, given, config.model.block_size, here.world_size)
    identity = {"data_fingerprint": data.fingerprint, "data_vocab_size": data.vocab_size,
                "seqs_per_step": plan.seqs_per_step}
    options = settings.flatten(config)
    if trainer["folder"]:
        check_same_run(config, trainer, options | identity, report)
    block_size = model.config.block_size
    train_order = MixedOrder([TrainOrder(split, block_size, config.seed) for split in train_splits.values()],
                             data.shares)
    sample_orders, whole_orders = ({name: EvalOrder(split, block_size, num_seqs) for name, split in val_splits.items()}
                                   for num_seqs in (config.eval_iters * config.data.batch_size, 0))
    evaluate = partial(validation_losses, model, shares=data.shares, batch_size=config.data.batch_size, here=here)
    if config.eval_only:
        report.say(f"step {trainer['step']}: {describe_losses(evaluate(whole_orders))} on the whole validation split")
        return
    if trainer["folder"] and trainer["step"] >= config.max_iters:
        report.say(f"{run.path} is finished: {trainer['step']:,} steps. To go on, raise --max_iters (now "
                   f"{config.max_iters}); for another run, choose another --out_dir.")
        return

    # 4) The optimiser, and the model's outer shells: compiled blocks, then gradients averaged over the ranks.
    optimizer = build_optimizer(config, model, trainer, here)
    scaler = torch.amp.GradScaler(here.device.type, enabled=here.dtype == torch.float16)
    if trainer["scaler"]:
        scaler.load_state_dict(trainer["scaler"])
    failure = distributed.compile_blocks(model, config.compile, here, plan.micro_batch)
    if failure:
        report.say(f"torch.compile failed, going on without it: {failure}")
    wrapped = distributed.wrap(model, here, plan.micro_batch)
    tokens_per_step = plan.seqs_per_step * block_size
    report.say(f"{model.num_params(non_embedding=False):,} parameters, {here.dtype} on {here.world_size} x "
               f"{here.device.type}")
    report.say(f"{tokens_per_step:,} tokens a step = {plan.accumulation_steps} micro-batches x {plan.micro_batch} "
               f"sequences x {block_size} tokens x {here.world_size} ranks; an epoch "
               f"{describe_epochs(data, train_order)}")
    distributed.on_rank0(lambda: run.open(options, trainer["folder"] is None, config.run.overwrite), here)
    report.start(model, trainer["step"], trainer["elapsed_s"], options)

    # 5) The loop. `step` counts the updates made; the next one reads the sequences from step * S on.
    step, best_val_loss = trainer["step"], trainer["best_val_loss"]

    def load(step: int) -> tuple[int, torch.Tensor, torch.Tensor, int]:
        """This rank's part of a step's S sequences: the first one's number, inputs, targets, number of targets."""
        first = plan.first_seq(step, here.rank)
        x, y = train_order.batch(first, plan.seqs_per_rank)
        return first, pin(x, here.device), pin(y, here.device), int((y >= 0).sum())

    batches = prefetch(load, range(step, config.max_iters))
    resumed_at = step if trainer["folder"] else None  # evaluated and saved before
    while True:
        is_last = step == config.max_iters

        # Once in a while: evaluate (all ranks).
        evaluated = (step % config.eval_interval == 0 or is_last) and step != resumed_at
        is_best = False
        if evaluated:
            with report.excluded():
                # Checkpoints are compared on the same windows each time; the number that counts at the end is the
                # loss over the whole split.
                losses = evaluate(sample_orders)
                val_loss = losses["val/loss"]
                is_best = val_loss < (math.inf if best_val_loss is None else best_val_loss)
                best_val_loss = val_loss if is_best else best_val_loss
                line = f"step {step}: {describe_losses(losses)}"
                if is_last and not all(order.is_whole for order in sample_orders.values()):
                    losses = evaluate(whole_orders) | {"val/sampled_loss": val_loss}
                    num_windows = sum(len(order) for order in sample_orders.values())
                    line += f" on {num_windows} windows, {describe_losses(losses)} on the whole validation split"
                report.say(line)
                report.record({"step": step, "tokens": step * tokens_per_step, **losses,
                               "elapsed_s": report.elapsed_s()})

        # Once in a while: save (rank 0).
        periodic = evaluated and config.run.always_save_checkpoint
        if config.run.save_interval:
            periodic = step % config.run.save_interval == 0
        due = is_last or (step > 0 and (is_best or periodic))
        if due and step != resumed_at and here.rank == 0:
            with report.excluded():
                state = {"step": step, "next_seq": step * plan.seqs_per_step, "tokens": step * tokens_per_step,
                         "best_val_loss": best_val_loss, "scaler": scaler.state_dict(), "seed": config.seed,
                         "micro_batch": plan.micro_batch, "world_size": here.world_size,
                         "elapsed_s": report.elapsed_s(), **identity, "options": options,
                         "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
                saved = run.save(model, optimizer, data.tokenizer, state, is_best, config.run.keep_last)
                report.say(f"step {step}: saved {saved}{' (best so far)' if is_best else ''}")
        if is_last:
            break

        # Every step: this rank's part of the next S sequences, read ahead by a thread, in micro-batches.
        first, x, y, num_targets = next(batches)
        num_targets = distributed.sum_over_ranks(num_targets, here)
        x, y = x.to(here.device, non_blocking=True), y.to(here.device, non_blocking=True)
        step_loss = torch.zeros((), device=here.device)
        for start in range(0, len(x), plan.micro_batch):
            rows = slice(start, start + plan.micro_batch)
            if model.config.dropout:
                torch.manual_seed(derive_seed(config.seed, "dropout", first + start))
            # Gradients meet over the ranks once, in the last backward pass.
            wrapped.require_backward_grad_sync = rows.stop >= len(x)
            with here.autocast():
                _, loss = wrapped(x[rows], y[rows], num_targets)
            # The loss is this micro-batch's share of the global mean; times W, because the ranks' gradients are
            # averaged where they should be summed.
            scaler.scale(loss * here.world_size).backward()
            step_loss += loss.detach()

        lr = optim.learning_rate(step, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        report.count(tokens_per_step)

        # Once in a while: report. This is the one place where the loop waits for the device.
        if step % config.log.log_interval == 0 or step == 1:
            mean_loss, norm = torch.stack([distributed.sum_over_ranks(step_loss, here), grad_norm]).tolist()
            report.train(step, step * tokens_per_step, mean_loss, norm, lr)
    report.close()
    report.say(f"done. Read what it writes: python sample.py --out_dir={config.run.out_dir}")


def check_options(config: TrainConfig) -> None:
    """Raises ValueError that lists all faults which the options show by themselves."""
    o = config.optim
    faults = [f"{name}={value} must be {what}" for name, value, ok, what in (
        ("seed", config.seed, 0 <= config.seed < 2**63, "0 or more, below 2**63"),
        ("max_iters", config.max_iters, config.max_iters >= 0, "0 or more"),
        ("eval_interval", config.eval_interval, config.eval_interval > 0, "positive"),
        ("eval_iters", config.eval_iters, config.eval_iters >= 0, "0 or more"),
        ("log_interval", config.log.log_interval, config.log.log_interval > 0, "positive"),
        ("save_interval", config.run.save_interval, config.run.save_interval >= 0, "0 or more"),
        ("keep_last", config.run.keep_last, config.run.keep_last >= 0, "0 or more"),
        ("learning_rate", o.learning_rate, o.learning_rate > 0, "positive"),
        ("min_lr", o.min_lr, o.min_lr >= 0, "0 or more"),
        ("beta1", o.beta1, 0 <= o.beta1 < 1, "at least 0 and below 1"),
        ("beta2", o.beta2, 0 <= o.beta2 < 1, "at least 0 and below 1"),
        ("grad_clip", o.grad_clip, o.grad_clip >= 0, "0 or more"),
        ("weight_decay", o.weight_decay, o.weight_decay >= 0, "0 or more"),
    ) if not ok]
    if config.run.overwrite and config.run.resume != "never":
        faults.append("overwrite=True needs resume=never, which says that the old run is to go")
    if faults:
        raise ValueError("; ".join(faults))


def find_start(config: TrainConfig, run: RunFolder, report: Reporter) -> dict[str, Any]:
    """The trainer's state to start from, with `folder`, the checkpoint that it and the weights come from, or None.

    An evaluation of other weights (eval_only with init_from) does not look at the run. Raises ValueError or OSError.
    """
    fresh = {"folder": None, "step": 0, "best_val_loss": None, "scaler": None, "elapsed_s": 0.0}
    if config.eval_only and config.init_from != "scratch":
        return fresh
    folder = run.find(config.run, lock=not config.eval_only, warn=report.say)
    return fresh | checkpoint.read_trainer(folder) | {"folder": str(folder)} if folder else fresh


def check_same_run(config: TrainConfig, trainer: Mapping[str, Any], now: Mapping[str, Any], report: Reporter) -> None:
    """Say which options changed since the checkpoint. Raises ValueError that lists those which must not."""
    before = trainer["options"] | trainer
    changed = {key: "the tokens or the shares of the data sets changed" if key == "data_fingerprint" else
               f"{key} was {before[key]}, is {value}" for key, value in now.items()
               if key in before and before[key] != value and key not in ("init_from", "resume", "eval_only")}
    of_the_batch = ("seed", "seqs_per_step") if config.eval_only else ()
    fixed = [text for key, text in changed.items() if key in FIXED and key not in of_the_batch]
    if fixed:
        raise ValueError(f"{trainer['folder']} was trained with other settings: {'; '.join(fixed)}. Go on with those, "
                         "or choose another --out_dir")
    if not config.eval_only:
        report.say(f"resuming {config.run.out_dir} at step {trainer['step']:,}"
                   + (f"; changed: {'; '.join(changed.values())}" if changed else ""))


def describe_losses(losses: Mapping[str, float]) -> str:
    """val loss 3.2000, or val loss 3.2000 (a 3.1000, b 3.4000) for a mixture."""
    prefix = "val/loss/"
    each = [f"{key.removeprefix(prefix)} {loss:.4f}" for key, loss in losses.items() if key.startswith(prefix)]
    return f"val loss {losses['val/loss']:.4f}" + (f" ({', '.join(each)})" if each else "")


def describe_epochs(data: Mixture, train_order: MixedOrder) -> str:
    """has 12,000 sequences, or the share and the epoch of each data set of a mixture."""
    lengths = [int(order.cut(0)[1].sum()) for order in train_order.orders]
    if len(lengths) == 1:
        return f"has {lengths[0]:,} sequences"
    return "has, of " + "; of ".join(f"{name} ({share:.1%}), {length:,} sequences"
                                     for name, share, length in zip(data.datasets, data.shares, lengths))


def build_model(config: TrainConfig, given: Mapping[str, str], data: Mixture, folder: str | None,
                here: Job) -> GPT:
    """The model on its device: rank 0 makes or reads it, the others get their weights from there."""
    torch.manual_seed(config.seed)
    made: list[GPT] = []

    def make() -> GPTConfig:
        dropout = config.model.dropout
        if folder:  # its checksums were verified when it was found
            made.append(GPT.from_pretrained(folder, dropout=dropout))
        elif config.init_from != "scratch":
            made.append(adapt(checkpoint.load_model(config.init_from, dropout=dropout), config, given, data))
        else:
            made.append(GPT(GPTConfig(**asdict(config.model) | {"vocab_size": data.vocab_size})))
        return made[0].config

    model_config = distributed.on_rank0(make, here)
    model = (made[0] if made else GPT(model_config)).to(here.device)
    distributed.broadcast_tensors((p.data for p in model.parameters()), here)
    return model


def adopt_shape(config: TrainConfig, given: Mapping[str, str], model: GPT) -> None:
    """Make the options that nobody set say what the model from elsewhere is: the batch and a resume go by them."""
    for key in SHAPE:
        if key not in given:
            setattr(config.model, key, getattr(model.config, key))


def adapt(model: GPT, config: TrainConfig, given: Mapping[str, str], data: Mixture) -> GPT:
    """Fit a model from elsewhere to the options. Raises ValueError for an option that it contradicts."""
    faults = [f"{key}={getattr(config.model, key)} was asked for, and it has {getattr(model.config, key)}"
              for key in SHAPE if key != "block_size" and key in given
              and getattr(config.model, key) != getattr(model.config, key)]
    if model.config.vocab_size < data.vocab_size:
        faults.append(f"its vocabulary is {model.config.vocab_size}, and {config.data.dataset} has {data.vocab_size}")
    if faults:
        raise ValueError(f"init_from={config.init_from} does not fit: {'; '.join(faults)}")
    if "block_size" in given:
        model.crop_block_size(config.model.block_size)
    return model


def build_optimizer(config: TrainConfig, model: GPT, trainer: Mapping[str, Any], here: Job) -> torch.optim.Optimizer:
    """AdamW, with the checkpoint's state where there is one: rank 0 reads it, the others get it from there."""
    optimizer = optim.build_optimizer(model, config.optim)
    if trainer["step"]:
        state = checkpoint.read_optimizer(trainer["folder"]) if here.rank == 0 else None
        optim.load_optimizer_state(optimizer, model, state)
        distributed.broadcast_tensors(optim.optimizer_state(optimizer, model).values(), here)
    return optimizer


if __name__ == "__main__":
    settings.run(main)
