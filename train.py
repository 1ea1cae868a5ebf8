"""Train a GPT on tokens that prepare_data.py made.

    python train.py config/shakespeare_char_cpu.py                      one process, laptop
    python train.py config/shakespeare_char.py --compile=False          one GPU; any key can be overridden
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py            one node of eight GPUs

Two nodes of eight, the same command on both, node0 being the name of one of them:

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node0:29500 train.py config/gpt2_124m.py

The same command again goes on from the newest checkpoint in out_dir, also on another number of processes. SIGTERM,
Ctrl-C and SIGUSR1 finish the step, save and exit with status 75, as does --max_minutes. Keys, meanings and
defaults are nanoGPT's; where flatGPT differs (device, dtype and compile are `auto`), --help says so.
"""

from __future__ import annotations

from flatgpt import launcher, signals

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signals.begin()
    launcher.end_with_torchrun()

import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from flatgpt import machine
from flatgpt.options import check_options, failed_rules, flatten, parse_options, run_script

if __name__ == "__main__":
    machine.warn_of_little_memory()

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from flatgpt import files
from flatgpt.data.loader import (
    DataConfig,
    EvalOrder,
    MixedOrder,
    Mixture,
    TrainOrder,
    derive_seed,
    describe_epochs,
    open_mixture,
    plan_batches,
    prefetch,
    read_step,
)
from flatgpt.data.shards import UNKNOWN_VOCAB_SIZE
from flatgpt.models import inference, weights
from flatgpt.models.baselines import build, build_empty, count_pairs, fit_bigram
from flatgpt.training import checkpoint, distributed, optim, preflight
from flatgpt.training.checkpoint import Progress, RunConfig, RunFolder
from flatgpt.training.device import DeviceConfig, Numerics, pick_numerics
from flatgpt.training.distributed import Job, ParallelConfig
from flatgpt.training.metrics import LogConfig, Reporter, describe_losses, validation_losses, write_samples
from flatgpt.training.optim import OptimConfig, StepJudge
from model import GPTConfig, LanguageModel

UNFINISHED = 75  # exit status of a run that was asked to stop: EX_TEMPFAIL, start it again
SAVING_FAILS = "failed saves"  # a reason to stop without another save
MAX_ROLLBACKS = 3

# A run is resumed with the same values of these, or not at all. (World size and micro-batch may change.)
SHAPE = tuple(field.name for field in fields(GPTConfig) if field.name not in ("vocab_size", "dropout"))
FIXED = (*SHAPE, "optimizer", "seed", "seqs_per_step", "data_fingerprint", "data_vocab_size")


@dataclass
class ModelConfig(GPTConfig):
    """Model; init_from other than scratch brings its own"""

    vocab_size: int = 0  # vocabulary; 0 = the data set's own (50257 where it does not say)

    def validate(self) -> list[str]:
        return []  # TrainConfig, which knows whether they make a model by themselves, has them checked


# What only rank 0 acts on is marked {"rank": 0}: the ranks need not agree, rank 0's value counts for all.
@dataclass
class TrainConfig:
    init_from: Annotated[str, "path"] = "scratch"  # scratch, gpt2, hub id, model or run folder, ckpt.pt; resume: go on
    max_iters: int = 600000  # updates in the whole run
    eval_interval: int = 2000  # steps between evaluations on the validation split
    eval_iters: int = 200  # batches an evaluation, evenly spaced over the split; 0 = the whole split, as at the end
    eval_only: bool = False  # evaluate on the whole validation split and exit
    seed: int = 1337  # of the initial weights, the data order and dropout
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile the blocks; auto = on CUDA only
    attention: Literal["auto", "sdpa", "math", "flash3"] = "auto"  # kernel; auto = FlashAttention-3 where it runs
    activation_checkpointing: bool = False  # run the blocks again in the backward pass: less memory, more time
    bigram_counts: bool = False  # with model=bigram: its best table, by counting; evaluate and save it, make no updates
    bigram_k: float = 1.0  # what is added to each of the counts, so that no pair is impossible
    max_minutes: float = field(default=0.0, metadata={"rank": 0})  # save and stop so long after the launch; 0 = never
    run: RunConfig = field(default_factory=RunConfig, metadata={"rank": 0})
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig, metadata={"rank": 0})
    where: DeviceConfig = field(default_factory=DeviceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def validate(self) -> list[str]:
        faults = failed_rules(
            self, ("seed", 0 <= self.seed < 2**63, "0 or more, below 2**63"),
            ("max_iters", self.max_iters >= 0, "0 or more"), ("eval_interval", self.eval_interval > 0, "positive"),
            ("eval_iters", self.eval_iters >= 0, "0 or more"), ("bigram_k", self.bigram_k > 0, "positive"),
            ("max_minutes", self.max_minutes >= 0, "0 or more"))
        if self.bigram_counts and (self.model.model != "bigram" or self.init_from != "scratch"):
            faults.append(f"bigram_counts=True counts the table of --model=bigram --init_from=scratch, not of model="
                          f"{self.model.model}, init_from={self.init_from}")
        if self.init_from == "scratch":
            try:
                GPTConfig(**asdict(self.model) | {"vocab_size": self.model.vocab_size or 1}).validate()
            except ValueError as error:
                faults.append(str(error))
        return faults


def main(argv: list[str]) -> None:
    """One run; an exit status of UNFINISHED when it was asked to stop."""
    config, given = parse_options(TrainConfig, argv, usage=__doc__)
    if config.init_from == "resume":
        config.run.resume = "must"
    check_options(config)
    if config.bigram_counts:
        config.max_iters = 0
    with distributed.job(config.where, config.parallel) as here:
        distributed.share_rank0s(config, here)
        report = Reporter(Path(config.run.out_dir), config.log, config.max_iters, here)
        with RunFolder(config.run, here, report.say) as run:
            try:
                stopped_by = train(config, given, run, report, here)
            except torch.OutOfMemoryError as error:
                raise ValueError(f"the memory of {here.device} is full: lower --batch_size (now "
                                 f"{config.data.batch_size}; the batch of a step stays what it is), or try "
                                 "--activation_checkpointing=True, or --parallel=fsdp on several GPUs; what was saved "
                                 f"is intact ({str(error).splitlines()[0]})") from None
    if stopped_by:
        launcher.end_torchrun()
        sys.exit(UNFINISHED)


def train(config: TrainConfig, given: Mapping[str, str], run: RunFolder, report: Reporter, here: Job) -> str:
    """One run, from the options to the last checkpoint; returns what stopped it before that, or ""."""
    # 1) The data. What is wrong with it, the options or the run folder is said before anything is written.
    data = open_mixture(config.data.dataset, config.model.vocab_size, config.data.tokenizer)
    if data.vocab_size == UNKNOWN_VOCAB_SIZE:
        raise ValueError(f"{config.data.dataset} holds 32-bit tokens and does not say of which vocabulary: add "
                         "--vocab_size=N")
    train_splits, val_splits = data.splits("train"), data.splits("val")
    if config.log.sample_interval and data.tokenizer is None:
        raise ValueError(f"sample_interval={config.log.sample_interval} needs a tokenizer, and {config.data.dataset} "
                         "has none: --tokenizer=gpt2 says that it is GPT-2's")
    if data.tokenizer is None:
        report.say(f"no tokenizer is known for {config.data.dataset}: the run learns its ids alone, and sample.py will "
                   "have no text to show")
    distributed.check_agreement(flatten(config) | {
        "the code": files.code_fingerprint(), "the data": data.fingerprint, "torch": torch.__version__,
        "device": here.device.type}, here)  # whatever it is called on each rank

    # 2) Where the run stands: rank 0 looks into the run folder, and the others hear of it. An evaluation of other
    # weights does not look at it.
    elsewhere = config.eval_only and config.init_from not in ("scratch", "resume")
    trainer = checkpoint.fresh_state() if elsewhere else run.start(lock=not config.eval_only)

    # 3) The model: weights from the run's checkpoint, from elsewhere, or fresh, and the numbers that it computes in.
    # Then the batch, which needs its shape.
    model = build_model(config, given, data, trainer, report, here)
    if config.init_from != "scratch":
        adopt_shape(config, given, model)
    # What the weights were at first: a run that goes on was told then. A folder's whole path is taken for no hub id.
    if trainer["folder"]:
        config.init_from = trainer["options"]["init_from"]
    elif config.init_from != "scratch":
        config.init_from = weights.full_name(config.init_from)
    block_size = model.config.block_size
    model.activation_checkpointing = config.activation_checkpointing
    plan = plan_batches(config.data, given, block_size, here.world_size, lambda seqs: (
        trainer["options"]["batch_size"] if trainer["folder"] else preflight.fit_batch_size(
            model, seqs, here, config.compile)))
    options = flatten(config)
    identity = {"data_fingerprint": data.fingerprint, "data_vocab_size": data.vocab_size,
                "seqs_per_step": plan.seqs_per_step}
    if trainer["folder"]:
        check_same_run(config, trainer, options | identity, report)
    train_order = MixedOrder([TrainOrder(split, block_size, config.seed) for split in train_splits.values()],
                             data.shares)
    sample_orders, whole_orders = ({name: EvalOrder(split, block_size, num_seqs) for name, split in val_splits.items()}
                                   for num_seqs in (config.eval_iters * config.data.batch_size, 0))
    # In rows of a micro-batch, a shape that compiled blocks know.
    evaluate = partial(validation_losses, model, shares=data.shares, batch_size=plan.micro_batch, here=here)
    if config.eval_only:
        report.say(f"step {trainer['step']}: {describe_losses(evaluate(whole_orders))} on the whole validation split")
        return ""
    if trainer["folder"] and trainer["step"] >= config.max_iters:
        report.say(f"{run.path} is finished: {trainer['step']:,} steps. To go on, raise --max_iters (now "
                   f"{config.max_iters}); for another run, choose another --out_dir.")
        return ""

    # 4) What it will take, before it is taken. Then the model's outer shells, compiled blocks and the averaging of
    # gradients over the ranks, and the optimiser.
    save_interval = config.run.save_interval or config.eval_interval
    for line in preflight.report(model, plan, describe_epochs(data, train_order), run, save_interval, config.max_iters,
                                 config.optim, here):
        report.say(line)
    if failure := distributed.compile_parts(model, config.compile, here, plan.micro_batch):
        report.say(f"torch.compile failed, going on without it: {failure}")
    wrapped = distributed.wrap(model, here, plan.micro_batch)
    optimizer, judge = optim.build_optimizer(model, config.optim, here.dtype), StepJudge()
    scaler = torch.amp.GradScaler(here.device.type, enabled=here.dtype == torch.float16)
    if trainer["folder"]:
        checkpoint.load_training_state(trainer, model, optimizer, scaler, judge, here)
    is_new = distributed.on_rank0(lambda: run.open(options, is_new=trainer["folder"] is None), here)
    source = trainer["folder"] or ("" if config.init_from == "scratch" else config.init_from)
    tokenizer = inference.tokenizer_to_save(weights.resolve(source) if source and here.rank == 0 else None,
                                          model.config.vocab_size, data)
    now, tokens_per_step = Progress.of(trainer), plan.seqs_per_step * block_size
    report.start(model, now.step, trainer["elapsed_s"], options | {"tokens_per_step": tokens_per_step}, is_new)

    # 5) The loop. The next step reads the S sequences from now.next_seq on.
    batches = prefetch(partial(read_step, train_order, plan, here.rank, here.device),
                       itertools.count(now.next_seq, plan.seqs_per_step))
    done_at = now.step if trainer["folder"] else None  # the step that was evaluated and saved before
    stopped_by = ""
    with signals.stop_requests() as asked:
        while True:
            is_last = now.step == config.max_iters

            # Once in a while: evaluate (all ranks). Checkpoints are compared on the same windows each time; the number
            # that counts at the end is the loss over the whole split.
            evaluated = (now.step % config.eval_interval == 0 or is_last) and now.step != done_at
            is_best = False
            if evaluated:
                with report.excluded():
                    losses, sampled = evaluate(sample_orders), None
                    best = math.inf if now.best_val_loss is None else now.best_val_loss
                    # A start is not saved, and so is not the best that there is to go back to.
                    if losses["val/loss"] < best and not now.bad_steps and (now.step or is_last):
                        is_best, now.best_val_loss = True, losses["val/loss"]
                    if is_last and not all(order.is_whole for order in sample_orders.values()):
                        losses, sampled = evaluate(whole_orders), losses
                    report.validation(now.step, now.step * tokens_per_step, losses, sampled)

            # Once in a while: read what it writes (all ranks).
            interval = config.log.sample_interval
            if interval and now.step and (now.step % interval == 0 or is_last) and now.step != done_at:
                with report.excluded():
                    report.samples(now.step, write_samples(model, data.tokenizer, config.log.sample_tokens, here))

            # Once in a while: save (all ranks hand in their part, rank 0 writes). Not amid bad steps: what is saved is
            # what the run may have to go back to.
            periodic = evaluated and config.run.always_save_checkpoint
            if config.run.save_interval:
                periodic = now.step % config.run.save_interval == 0
            due = is_last or stopped_by or (now.step > 0 and (is_best or periodic) and not now.bad_steps)
            if due and now.step != done_at and stopped_by != SAVING_FAILS:
                with report.excluded():
                    run.save(model, optimizer, tokenizer, asdict(now) | identity | {
                        "tokens": now.step * tokens_per_step, "scaler": scaler.state_dict(), "judge": asdict(judge),
                        "seed": config.seed, "micro_batch": plan.micro_batch, "world_size": here.world_size,
                        "elapsed_s": report.elapsed_s(), "options": options, "versions": versions()}, is_best)
            if is_last or stopped_by:
                break

            # Every step: this rank's part of the next S sequences, read ahead by a thread, in micro-batches.
            first, *parts = next(batches)
            x, y, sums = (tensor.to(here.device, non_blocking=True) for tensor in parts)
            num_targets, batch_hash = distributed.sum_over_ranks(sums, here)
            step_loss = torch.zeros((), device=here.device)
            for start in range(0, len(x), plan.micro_batch):
                rows = slice(start, start + plan.micro_batch)
                if model.config.dropout:
                    torch.manual_seed(derive_seed(config.seed, "dropout", first + start))
                # Gradients meet over the ranks once, in the last backward pass.
                distributed.set_gradient_sync(wrapped, rows.stop >= len(x))
                with here.autocast():
                    _, loss = wrapped(x[rows], y[rows], num_targets)
                # The loss is this micro-batch's share of the global mean; times W, because the ranks' gradients are
                # averaged where they should be summed.
                scaler.scale(loss * here.world_size).backward()
                step_loss += loss.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or float("inf"))

            # The one place where a step waits for the device: all that the ranks have to decide alike, in one piece.
            reason = why_stop(asked, config, run, here)
            mean_loss, norm, num_stops = distributed.sum_over_ranks(torch.stack([
                step_loss, distributed.whole(norm) / here.world_size, torch.full_like(step_loss, bool(reason))]),
                here).tolist()
            # A float16 gradient that overflows is the scaler's to skip: it tries again at a lower scale.
            overflow = (scaler.is_enabled() and math.isfinite(mean_loss) and not math.isfinite(norm)
                        and scaler.get_scale() > 1)
            fault = "" if overflow else judge.fault(mean_loss, norm, config.optim.spike_sigma)

            lr = optim.learning_rate(now.step, config.optim)
            optim.set_learning_rate(optimizer, lr)
            if fault:
                scaler.update(scaler.get_scale())  # as it was: this is no overflow
                now.bad_steps, now.skipped = now.bad_steps + 1, now.skipped + 1
            else:
                scaler.step(optimizer)
                scaler.update()
                now.bad_steps = now.bad_steps if overflow else 0
            distributed.zero_grad(model, here)
            now.step, now.next_seq = now.step + 1, now.next_seq + plan.seqs_per_step
            report.count(tokens_per_step)
            run.settle(wait=False)
            if num_stops:
                stopped_by = next(filter(None, distributed.gather(reason, here)))

            # Once in a while: report.
            if now.step % config.log.log_interval == 0 or now.step == 1 or fault:
                report.train(now.step, now.step * tokens_per_step, mean_loss, norm, lr, int(batch_hash), now.skipped,
                             fault)

            # Hardly ever: back to the last good checkpoint, and on with the data behind what was bad.
            if now.bad_steps == config.optim.max_bad_steps:
                trainer = distributed.on_rank0(partial(go_back, run, now, fault), here)
                checkpoint.load_weights(trainer, model, here)
                checkpoint.load_training_state(trainer, model, optimizer, scaler, judge, here)
                now = replace(Progress.of(trainer), next_seq=now.next_seq, skipped=now.skipped,
                              rollbacks=now.rollbacks + 1)
                done_at = now.step
                report.went_back(now.step, now.rollbacks, now.skipped, now.next_seq)
        distributed.on_rank0(partial(finish, run, report, now, stopped_by, data.tokenizer is not None), here)
    return stopped_by


def check_same_run(config: TrainConfig, trainer: Mapping[str, Any], now: Mapping[str, Any], report: Reporter) -> None:
    """Say which options changed since the checkpoint. Raises ValueError that lists those which must not."""
    before = flatten(TrainConfig()) | trainer["options"] | trainer  # an option newer than the run: its default
    changed = {key: "the tokens or the shares of the data sets changed" if key == "data_fingerprint" else
               f"{key} was {before[key]}, is {value}" for key, value in now.items()
               if key in before and before[key] not in (value, "auto")  # which leaves the choice to us
               and key not in ("init_from", "resume", "eval_only")}
    of_training = ("optimizer", "seed", "seqs_per_step") if config.eval_only else ()
    fixed = [text for key, text in changed.items() if key in FIXED and key not in of_training]
    if fixed:
        raise ValueError(f"{trainer['folder']} was trained with other settings: {'; '.join(fixed)}. Go on with those, "
                         "or choose another --out_dir")
    if not config.eval_only and trainer["step"] < config.max_iters:
        report.say(f"resuming {config.run.out_dir} at step {trainer['step']:,}"
                   + (f"; changed: {'; '.join(changed.values())}" if changed else ""))


def build_model(config: TrainConfig, given: Mapping[str, str], data: Mixture, trainer: Mapping[str, Any],
                report: Reporter, here: Job) -> LanguageModel:
    """The model on its device: rank 0 makes or reads it on the host, and every rank gets its part from there. Rank 0
    decides as well what `auto` means for its number type and attention; the options then say what was chosen."""
    torch.manual_seed(config.seed)
    made: list[LanguageModel] = []

    def make() -> tuple[GPTConfig, Numerics, str]:
        dropout = config.model.dropout
        if trainer["folder"]:  # its checksums were verified when it was found
            made.append(LanguageModel.from_pretrained(trainer["folder"], dropout=dropout))
        elif config.init_from != "scratch":
            made.append(adapt(inference.load_model(config.init_from, dropout=dropout), config, given, data))
        else:
            shape = GPTConfig(**asdict(config.model) | {"vocab_size": data.vocab_size})
            made.append(count_bigram(shape, data, config.bigram_k, report) if config.bigram_counts else build(shape))
        rows = max(1, config.data.batch_size) * made[0].config.block_size
        return made[0].config, *pick_numerics(made[0], config.where.dtype, config.attention, here.device, rows,
                                              trainer["options"])

    model_config, numerics, trial = distributed.on_rank0(make, here)
    if trial:
        report.say(trial)
    here.set_dtype(numerics.dtype)
    config.where.dtype, config.attention = str(numerics.dtype).removeprefix("torch."), numerics.attention
    config.where.device = here.device.type if config.where.device == "auto" else config.where.device
    if here.world_size == 1:
        model = made[0].to(here.device)
    else:
        model = distributed.lay_out(build_empty(model_config), made[0].state_dict() if made else None, here)
    model.set_attention(numerics.attention)
    return model


def count_bigram(shape: GPTConfig, data: Mixture, k: float, report: Reporter) -> LanguageModel:
    """The bigram whose table fits the train split best. Raises ValueError for a mixture, whose shares are of sequences
    drawn, not of what there is to count."""
    if len(data.datasets) > 1:
        raise ValueError(f"bigram_counts=True counts one data set, not a mixture of {', '.join(data.datasets)}: choose "
                         "one of them, or train on the mixture without --bigram_counts")
    split, = data.splits("train").values()
    counts = count_pairs(split.shards, data.vocab_size)
    model = build(shape)
    loss = fit_bigram(model, counts, k)
    report.say(f"counted {counts.sum():,} pairs of tokens; with {k:g} added to each count the train loss is {loss:.4f}")
    return model


def adopt_shape(config: TrainConfig, given: Mapping[str, str], model: LanguageModel) -> None:
    """Make the options that nobody set say what the model from elsewhere is: the batch and a resume go by them."""
    for key in SHAPE:
        if key not in given:
            setattr(config.model, key, getattr(model.config, key))


def adapt(model: LanguageModel, config: TrainConfig, given: Mapping[str, str], data: Mixture) -> LanguageModel:
    """Fit a model from elsewhere to the options. Raises ValueError for an option that it contradicts."""
    faults = [f"{key}={getattr(config.model, key)} was asked for, and it has {getattr(model.config, key)}"
              for key in SHAPE if key != "block_size" and key in given
              and getattr(config.model, key) != getattr(model.config, key)]
    if model.config.vocab_size < data.vocab_size:
        faults.append(f"its vocabulary is {model.config.vocab_size}, and {config.data.dataset} has {data.vocab_size}")
    elif data.tokenizer and not inference.has_the_ids(
            inference.known_tokenizer(weights.resolve(config.init_from), model.config.vocab_size), data):
        faults.append(f"its tokenizer gives other ids than that of {config.data.dataset}: prepare the data with "
                      f"--tokenizer={weights.full_name(config.init_from)}")
    if faults:
        raise ValueError(f"init_from={config.init_from} does not fit: {'; '.join(faults)}")
    if "block_size" in given:
        model.crop_block_size(config.model.block_size)
    return model


def why_stop(asked: list[str], config: TrainConfig, run: RunFolder, here: Job) -> str:
    """What asks this rank to end the run after the step under way, or ""."""
    if asked:
        return asked[0]
    if run.gave_up:
        return SAVING_FAILS
    if here.rank == 0 and config.max_minutes and launcher.seconds_since_launch() >= 60 * config.max_minutes:
        return f"max_minutes={config.max_minutes:g}"
    return ""


def go_back(run: RunFolder, now: Progress, fault: str) -> dict[str, Any]:
    """The state of the last checkpoint that was not saved amid bad steps. Raises ValueError, a report of how the run
    diverged, when there is none, or when going back has not helped."""
    run.settle()
    folder = run.newest_valid(lambda folder: not run.state_in(folder)["bad_steps"])
    if folder is None or now.rollbacks == MAX_ROLLBACKS:
        helped = f"going back {now.rollbacks} times did not help" if folder else "there is no checkpoint to go back to"
        raise ValueError(
            f"the run diverges: {now.bad_steps} bad steps in a row up to step {now.step} (the last one: {fault}), "
            f"{now.skipped} in all, and {helped}. What was saved is intact"
            + (f", {folder} is the newest of it" if folder else "")
            + ". Lower --learning_rate, lengthen --warmup_iters, try --dtype=bfloat16 or float32, or look at the data")
    run.retire_after(folder)
    return run.state_in(folder)


def finish(run: RunFolder, report: Reporter, now: Progress, stopped_by: str, has_text: bool) -> None:
    """Wait for the last save and say how the run has ended. Raises OSError when that save failed."""
    run.finish()
    if stopped_by:
        report.say(f"stopped by {stopped_by} at step {now.step:,}, and saved: the same command goes on from there")
    else:
        report.say("done." + (f" Read what it writes: python sample.py --out_dir={run.path}" if has_text else ""))
    report.close()  # wandb may take its time to upload, and a run that is told to stop has not much


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], "torch": torch.__version__}


if __name__ == "__main__":
    record(run_script)(main)  # what run_script does not answer for, torchrun reports
