"""Train a GPT on tokens that prepare_data.py made.

    python train.py config/shakespeare_char_cpu.py                      one process, laptop
    python train.py config/shakespeare_char.py --compile=False          one GPU; any key can be overridden
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py            one node of eight GPUs

Two nodes of eight, the same command on both, node0 being the name of one of them:

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node0:29500 train.py config/gpt2_124m.py

A new run that goes on from a checkpoint of another one, here to let its constant learning rate decay:

    python train.py --init_from=out/run --branch_from=step_5000 --schedule=wsd --max_iters=6000 --out_dir=out/decayed

The same command again goes on from the newest checkpoint in out_dir, also on another number of processes. SIGTERM,
Ctrl-C and SIGUSR1 finish the step, save and exit with status 75, as does --max_minutes. Keys, meanings and
defaults are nanoGPT's; where flatGPT differs (device, dtype, compile and backend are `auto`), --help says so.
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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from flatgpt import machine
from flatgpt.options import check_options, flatten, parse_options, run_script

if __name__ == "__main__":
    machine.warn_of_little_memory()

import torch
import torch.nn as nn
from torch.distributed.elastic.multiprocessing.errors import record

from flatgpt import files
from flatgpt.data import loader
from flatgpt.data.order import Batch, derive_seed
from flatgpt.models import inference, weights
from flatgpt.training import compiling, distributed, optim, parallel, preflight, resume, setup
from flatgpt.training.checkpoint import RunFolder
from flatgpt.training.config import TrainConfig
from flatgpt.training.device import Numerics
from flatgpt.training.distributed import Job
from flatgpt.training.metrics import Reporter, Validation, describe_losses
from flatgpt.training.optim import SpikeDetector
from flatgpt.training.profiling import Profiler
from flatgpt.training.resume import Progress
from flatgpt.training.samples import Samples
from model import LanguageModel

UNFINISHED = 75  # exit status of a run that was asked to stop: EX_TEMPFAIL, start it again
SAVING_FAILS = "failed saves"  # a reason to stop without another save
VERSIONS = {"python": sys.version.split()[0], "torch": torch.__version__}


def main(argv: list[str]) -> None:
    """One run; an exit status of UNFINISHED when it was asked to stop."""
    config, given = parse_options(TrainConfig, argv, usage=__doc__)
    if config.init_from == "resume":
        config.run.resume = "must"
    check_options(config, given)
    if config.bigram_counts:
        config.max_iters = 0
    with distributed.init_job(config.where, config.parallel) as job:
        distributed.share_rank0s(config, job)
        distributed.check_agreement(flatten(config) | {
            "the code": files.code_fingerprint(), "torch": torch.__version__, "device": job.device.type}, job)
        report = Reporter(Path(config.run.out_dir), config.log, job)
        with RunFolder(config.run, job, report.log) as run:
            try:
                stopped_by = train(config, given, run, report, job)
            except torch.OutOfMemoryError as error:
                data = config.data
                tokens = data.total_batch_size or (
                    data.gradient_accumulation_steps * data.batch_size * config.model.block_size)
                raise ValueError(f"the memory of {job.device} is full: lower --batch_size (now "
                                 f"{data.batch_size}) beside --total_batch_size={tokens}, which keeps the batch "
                                 "of a step, or try --activation_checkpointing=True, or --parallel=fsdp on several "
                                 f"GPUs; what was saved is intact ({str(error).splitlines()[0]})") from None
            finally:
                report.close_line()
    if stopped_by:
        launcher.end_torchrun()
        sys.exit(UNFINISHED)


def train(config: TrainConfig, given: Mapping[str, str], run: RunFolder, report: Reporter, job: Job) -> str:
    """One run, from the options to the last checkpoint; returns what stopped it before that, or ""."""
    # 1) Where the run stands: rank 0 looks into the run folder, unless other weights are to be evaluated.
    elsewhere = config.eval_only and config.init_from not in ("scratch", "resume")
    trainer = resume.fresh_state() if elsewhere else run.start(lock=not config.eval_only)
    if config.run.branch_from:
        trainer = resume.branch(config, given, trainer, report.log, job)

    # 2) The data. What is wrong with it, the options or the run folder is said before anything is written.
    data = setup.open_data(config.data, config.model.vocab_size, config.log.sample_interval, report.log)
    distributed.check_agreement({"the data": data.fingerprint}, job)

    # 3) The model, then the batch, which needs its shape.
    torch.manual_seed(config.seed)
    make = partial(setup.make_model, config.model, config.optim, config.init_from, given, data, trainer["folder"],
                   config.bigram_k if config.bigram_counts else None, report.log)
    model, numerics = setup.build_model(make, config.where, config.attention, config.data.batch_size,
                                        trainer["options"], report.log, job)
    model.set_documents(config.data.documents)
    model.activation_checkpointing = config.activation_checkpointing
    record_choices(config, given, model, numerics, trainer, job)
    block_size = model.config.block_size
    plan = loader.plan_batches(config.data, given, block_size, job.world_size, lambda seqs: (
        trainer["options"]["batch_size"] if trainer["folder"] else preflight.fit_batch_size(
            model, seqs, job, config.compile, config.optim.optimizer)))
    tokens_per_step = plan.seqs_per_step * block_size
    options = flatten(config)
    identity = {"data_fingerprint": data.fingerprint, "data_vocab_size": data.vocab_size,
                "seqs_per_step": plan.seqs_per_step, **optim.version(config.optim)}
    if trainer["folder"]:
        resume.check_same_run(trainer, options | identity, flatten(TrainConfig()), report.log)
    train_order = loader.train_order(data, config.data.documents, block_size, config.seed)
    validation = Validation(model, data, config.data.documents, config.eval_iters * config.data.batch_size,
                            config.eval_tokens, plan.micro_batch, job)  # in rows that compiled blocks know
    samples = Samples(config.log, model, data.tokenizer, job)
    if config.eval_only:
        if config.init_from == "scratch" and not trainer["folder"] and not config.bigram_counts:
            report.log("warning: no checkpoint was read: the weights are random, as a new run would have them")
        report.log(f"step {trainer['step']}: {describe_losses(validation.losses(whole=True))} on {validation.extent}")
        return ""
    if trainer["folder"] and (reason := why_finished(config, trainer)):
        report.log(f"{run.path} is finished: {reason}; for another run, choose another --out_dir.")
        return ""

    # 4) What it will take, before it is taken; then compiled blocks, the averaging over the ranks, and the optimiser.
    for line in preflight.report(model, plan, loader.describe_epochs(data, train_order), run, config.eval_interval,
                                 config.max_iters, config.optim, job):
        report.log(line)
    if failure := compiling.compile_parts(model, config.compile, job, plan.micro_batch):
        report.log(f"torch.compile failed, going on without it: {failure}")
    wrapped = parallel.wrap(model, job, plan.micro_batch)
    optimizer, spike_detector = optim.build_optimizer(model, config.optim, job), SpikeDetector()
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.dtype == torch.float16)
    if trainer["folder"]:
        resume.load_training_state(trainer, model, optimizer, scaler, spike_detector, job)
    tokenizer = distributed.kept_on_rank0(partial(
        inference.tokenizer_to_save, trainer["folder"] or config.init_from, model.config.vocab_size, data), job)
    is_new = distributed.on_rank0(lambda: run.open(options, trainer["is_new"]), job)
    now = Progress.of(trainer)
    report.start(model, now.step, trainer, options | {"tokens_per_step": tokens_per_step}, is_new)

    # 5) The loop. The next step reads the S sequences from now.next_seq on.
    batches = loader.prefetch(partial(loader.read_step, train_order, plan, job.rank, job.device),
                              itertools.count(now.next_seq, plan.seqs_per_step))
    stopped_by, done_at = "", now.step if trainer["folder"] else None  # the step that was evaluated and saved before
    with signals.stop_requests() as asked, Profiler(run.path, config.log, now.step, model, report, job) as profiler:
        while True:
            is_last, is_done = now.step == config.max_iters, now.step == done_at

            # Once in a while: evaluate (all ranks). Checkpoints are compared on the same windows each time; the number
            # that counts at the end is the loss over the whole split.
            evaluated, is_best = (now.step % config.eval_interval == 0 or is_last) and not is_done, False
            if evaluated:
                with report.excluded():
                    losses, sampled = validation.losses(), None
                    is_reached = 0 < config.target_val_loss >= losses["val/loss"] and not now.bad_steps
                    is_last = is_last or is_reached
                    best = math.inf if now.best_val_loss is None else now.best_val_loss
                    # A start is not saved, and so is not the best that there is to go back to.
                    if losses["val/loss"] < best and not now.bad_steps and (now.step or is_last):
                        is_best, now.best_val_loss = True, losses["val/loss"]
                    if is_last and not validation.sample_is_whole:
                        losses, sampled = validation.losses(whole=True), losses
                    report.validation(now.step, now.step * tokens_per_step, losses, sampled,
                                      config.target_val_loss if is_reached else None)

            # Once in a while: read what it writes (all ranks).
            if not is_done and (prompts := samples.due(now.step, evaluated, is_last)):
                with report.excluded():
                    report.samples(now.step, *samples.write(prompts))

            # Once in a while: save (all ranks hand in their part, rank 0 writes). Not amid bad steps: what is saved is
            # what the run may have to go back to.
            every = config.run.save_interval
            periodic = now.step % every == 0 if every else evaluated and config.run.always_save_checkpoint
            due = is_last or stopped_by or (now.step > 0 and (is_best or periodic) and not now.bad_steps)
            if due and not is_done and stopped_by != SAVING_FAILS:
                with report.excluded():
                    run.save(model, optimizer, tokenizer, asdict(now) | identity | report.times() | {
                        "tokens": now.step * tokens_per_step, "scaler": scaler.state_dict(),
                        "spike_detector": asdict(spike_detector), "seed": config.seed, "micro_batch": plan.micro_batch,
                        "world_size": job.world_size, "options": options, "versions": VERSIONS}, is_best)
            if is_last or stopped_by:
                break

            # Every step: gradients of this rank's part of the next S sequences, which a thread has read ahead.
            first_seq, batch, sums = next(batches)
            batch, sums = loader.batch_to_device(batch, job.device), loader.to_device(sums, job.device)
            num_targets, batch_hash = distributed.sum_over_ranks(sums, job)
            step_loss = accumulate(config, wrapped, batch, num_targets, first_seq, plan.micro_batch, scaler, job)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or float("inf"))

            # The one place where a step waits for the device: all that the ranks have to decide alike, in one piece.
            reason = why_stop(asked, config, run, job)
            packed = torch.stack([step_loss, parallel.full_tensor(norm) / job.world_size,
                                  torch.full_like(step_loss, bool(reason))])
            mean_loss, norm, num_stops = distributed.sum_over_ranks(packed, job).tolist()
            batch_hash = int(batch_hash)  # is there as well; read later, it would wait for the update
            # A float16 gradient that overflows is the scaler's to skip: it tries again at a lower scale.
            overflow = (scaler.is_enabled() and math.isfinite(mean_loss) and not math.isfinite(norm)
                        and scaler.get_scale() > 1)
            fault = "" if overflow else spike_detector.fault(mean_loss, norm, config.optim.spike_sigma)

            lr = optim.learning_rate(now.step, config.optim)
            optim.set_learning_rate(optimizer, lr)
            if fault:
                scaler.update(scaler.get_scale())  # as it was: this is no overflow
                now.bad_steps, now.skipped = now.bad_steps + 1, now.skipped + 1
            else:
                scaler.step(optimizer)
                scaler.update()
                now.bad_steps = now.bad_steps if overflow else 0
            parallel.zero_grad(model, job)
            now.step, now.next_seq = now.step + 1, now.next_seq + plan.seqs_per_step
            report.count(tokens_per_step)
            run.poll(wait=False)
            if num_stops:
                stopped_by = next(filter(None, distributed.gather(reason, job)))

            # Once in a while: report.
            if now.step % config.log.log_interval == 0 or now.step == 1 or fault:
                report.train(now.step, now.step * tokens_per_step, mean_loss, norm, lr, batch_hash, now.skipped, fault)

            # Hardly ever: back to the last good checkpoint, and on with the data behind what was bad.
            if now.bad_steps >= config.optim.max_bad_steps:
                now = resume.roll_back(run, now, fault, model, optimizer, scaler, spike_detector, job)
                done_at = now.step
                report.rollback(now.step, now.rollbacks, now.skipped, now.next_seq)
            profiler.step()
        distributed.on_rank0(partial(finish, run, report, now, stopped_by, data.tokenizer is not None), job)
    return stopped_by


def why_finished(config: TrainConfig, trainer: Mapping[str, Any]) -> str:
    """Why a run has come to its end, and what would make it go on; "" if it has not."""
    best, target = trainer["best_val_loss"], config.target_val_loss
    if best is not None and 0 < target >= best:
        return (f"after {trainer['step']:,} steps its best val loss is {best:.4f}, and target_val_loss={target:g}. To "
                "go on, lower it")
    if trainer["step"] >= config.max_iters:
        advice = "train with --bigram_counts=False" if config.bigram_counts else (
            f"raise --max_iters (now {config.max_iters})")
        return f"{trainer['step']:,} steps. To go on, {advice}"
    return ""


def record_choices(config: TrainConfig, given: Mapping[str, str], model: LanguageModel, numerics: Numerics,
                   trainer: Mapping[str, Any], job: Job) -> None:
    """Write into the options what `auto` was resolved to, the model's shape, and what its weights first came from."""
    config.where.dtype, config.attention = str(numerics.dtype).removeprefix("torch."), numerics.attention
    config.where.device = job.device.type if config.where.device == "auto" else config.where.device
    if config.init_from != "scratch":
        # A run that goes on keeps the words it began with: a file may say n_kv_head=8 where they said 0.
        inference.adopt_shape(config.model, given, {**vars(model.config), **trainer["options"]})
        config.init_from = weights.full_name(config.init_from)  # the whole path of a folder is taken for no hub id
    if trainer["folder"]:
        config.init_from = trainer["options"]["init_from"]
        config.run.branch_from = (trainer["folder"] if trainer["branched_from"]
                                  else trainer["options"].get("branch_from", ""))


def accumulate(config: TrainConfig, wrapped: nn.Module, batch: Batch, num_targets: torch.Tensor, first_seq: int,
               micro_batch: int, scaler: torch.amp.GradScaler, job: Job) -> torch.Tensor:
    """Add up the gradients of this rank's rows of a step, a micro-batch at a time. Their share of the step's loss."""
    step_loss, num_rows = torch.zeros((), device=job.device), len(batch.inputs)
    for start in range(0, num_rows, micro_batch):
        x, y, *documents = batch.rows(start, start + micro_batch)
        if config.model.dropout:
            torch.manual_seed(derive_seed(config.seed, "dropout", first_seq + start))
        parallel.set_gradient_sync(wrapped, start + micro_batch >= num_rows, job)
        with job.autocast():
            _, loss = wrapped(x, y, num_targets, *documents)
        # The loss is this micro-batch's share of the global mean; times W, because the ranks' gradients are averaged
        # where they should be summed.
        scaler.scale(loss * job.world_size).backward()
        step_loss += loss.detach()
    return step_loss


def why_stop(asked: list[str], config: TrainConfig, run: RunFolder, job: Job) -> str:
    """The signal or limit that asks this rank to end the run after the current step, or ""."""
    if asked:
        return asked[0]
    if run.gave_up:
        return SAVING_FAILS
    if job.rank == 0 and config.max_minutes and launcher.seconds_since_launch() >= 60 * config.max_minutes:
        return f"max_minutes={config.max_minutes:g}"
    return ""


def finish(run: RunFolder, report: Reporter, now: Progress, stopped_by: str, has_text: bool) -> None:
    """Wait for the last save and say how the run has ended. Raises OSError when that save failed."""
    run.finish()
    if stopped_by:
        report.record({"step": now.step, "stopped": stopped_by, "elapsed_s": report.elapsed_s()})
        report.log(f"stopped by {stopped_by} at step {now.step:,}, and saved: the same command goes on from there")
    else:
        if now.bad_steps:
            report.log(f"warning: the last {now.bad_steps} updates were skipped, and the loss may not be sound: see "
                       "their warnings; a lower --learning_rate or a longer --warmup_iters may help")
        report.log("done." + (f" Read what it writes: python sample.py --out_dir={run.path}" if has_text else ""))
    report.close()  # wandb may take its time to upload, and a run that is told to stop has not much


if __name__ == "__main__":
    record(run_script)(main)  # what run_script does not answer for, torchrun reports
