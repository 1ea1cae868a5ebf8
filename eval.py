"""Measure a model: loss, perplexity and bits per byte on text or data, and the tasks of lm-evaluation-harness.

    python eval.py --out_dir=out/run                                on the validation split of the run's own data
    python eval.py --init_from=gpt2 --text=book.txt --stride=512    on a text, each token with 512 before it or more
    python eval.py --init_from=gpt2 --dataset=openwebtext --json    on a data set; the numbers as one JSON object
    python eval.py --init_from=gpt2 --tasks=hellaswag,arc_easy      accuracy on questions
    torchrun --nproc_per_node=8 eval.py --out_dir=out/run --tasks=hellaswag
    python eval.py --watch=out/run --tasks=hellaswag,arc_easy,piqa,lambada_openai

The last one scores each checkpoint of a run that goes on, in a process of its own, here or on another machine with the
same folder, until the run has finished. It writes evals.jsonl there, which serve.py and report.py show.

The loss, in nats, is the mean over all tokens of a text, or of a shard, but the first; nothing is put before that.
Perplexity is e^loss. Bits per byte is the sum of those losses, in bits, over the bytes of text that the same tokens
stand for: unlike the other two it can be compared between tokenizers. An end-of-text token in the data adds its loss,
and stands for no bytes.
"""

from __future__ import annotations

from flatgpt import launcher, signals

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signals.begin(needs_reader=True)
    launcher.end_with_torchrun()

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from flatgpt import machine
from flatgpt.options import check_options, failed_rules, parse_options, run_script

if __name__ == "__main__":
    machine.warn_of_little_memory()

import numpy as np

from flatgpt import run_folder
from flatgpt.data.loader import Mixture, separator
from flatgpt.data.order import EvalOrder
from flatgpt.data.shards import Split
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.evaluation import watching
from flatgpt.evaluation.questions import TASKS
from flatgpt.evaluation.tasks import Score, describe, load_tasks
from flatgpt.models import inference
from flatgpt.models.language_model import LanguageModel
from flatgpt.training import distributed
from flatgpt.training.device import DeviceConfig, pick_numerics
from flatgpt.training.distributed import Job
from flatgpt.training.metrics import validation_loss

OF_A_MODEL = ("init_from", "out_dir", "dataset", "split", "documents", "text", "stride", "eval_iters", "json")


@dataclass
class EvalConfig:
    init_from: Annotated[str, "path"] = "resume"  # gpt2, a hub id, a model or run folder, ckpt.pt; resume: out_dir
    out_dir: Annotated[str, "path"] = "out"  # run folder; its best checkpoint is measured
    dataset: Annotated[str, "paths"] = ""  # data set or mixture; empty, as text and tasks: the run's own
    split: Literal["train", "val", "test"] = "val"  # of the data set
    documents: Literal["auto", "stream", "mask"] = "auto"  # mask: attend within documents; auto: as in the model's run
    text: Annotated[str, "path"] = ""  # a text file, read whole as one text
    watch: Annotated[str, "path"] = ""  # run folder: score each of its checkpoints on the tasks until the run has ended
    tasks: str = ""  # hellaswag; with lm-evaluation-harness also its tasks and groups: arc_easy,piqa
    include_path: Annotated[str, "path"] = ""  # folder of one's own task files, in the harness's YAML
    limit: int = 0  # read only so many questions of each task, to try it out; 0 = all
    hellaswag_file: Annotated[str, "path"] = ""  # HellaSwag's, a JSON object a line; empty: the hub's validation
    block_size: int = 0  # tokens in a window; 0 = the model's own context length
    stride: int = 0  # tokens from a window to the next, which sees at least block_size - stride before; 0 = block_size
    eval_iters: int = 0  # batches of windows, evenly spaced over the data or text; 0 = all of it
    batch_size: int = 8  # windows, or answers, that a device reads at a time
    json: bool = False  # print one JSON object, and nothing else
    where: DeviceConfig = field(default_factory=DeviceConfig)

    def validate(self) -> list[str]:
        """What is wrong with these options, a sentence each."""
        faults = failed_rules(
            self, ("block_size", self.block_size >= 0, "0 (the model's) or more"),
            ("stride", self.stride >= 0, "0 (block_size) or more"),
            ("eval_iters", self.eval_iters >= 0, "0 (all) or more"), ("limit", self.limit >= 0, "0 (all) or more"),
            ("batch_size", 1 <= self.batch_size <= 10**6, "1 to 1,000,000"))
        names = task_names(self)
        if not names:
            faults += [f"{key}={getattr(self, key)} is for --tasks=..." for key in ("watch", "include_path", "limit")
                       if getattr(self, key)]
        faults += [f"{name}_file={questions_file(self, name)} is for --tasks={name}" for name in TASKS
                   if questions_file(self, name) and name not in names]
        return faults

    def conflicts(self, given: Collection[str]) -> list[str]:
        """Which of the given keys have no effect together with the others."""
        unwanted = [key for key in OF_A_MODEL if key in given] if self.watch else []
        return [f"--watch={self.watch} scores a run's checkpoints on tasks, and prints lines: leave out "
                + " ".join(f"--{key}" for key in unwanted)] if unwanted else []


def main(argv: list[str]) -> None:
    config, given = parse_options(EvalConfig, argv, usage=__doc__)
    check_options(config, given)
    if config.watch:
        watching.check_folder(Path(config.watch))
    with distributed.init_job(config.where, alone=bool(config.watch)) as job:
        (watch if config.watch else evaluate)(config, job)


def watch(config: EvalConfig, job: Job) -> None:
    """Score the checkpoints of a run as they appear. Training, which may run beside it, comes first."""
    os.nice(10)
    folder = Path(config.watch)
    with watching.only_watcher(folder):
        watcher = watching.Watcher(folder, asked_tasks(config), config.limit, partial(print, flush=True))
        watcher.run(partial(open_model, config, job), config.batch_size, job)


def open_model(config: EvalConfig, job: Job, path: Path) -> tuple[LanguageModel, Tokenizer]:
    """The model at path and the tokenizer that it has. Raises ValueError or OSError."""
    model = load_model(config, path, job)
    return model, inference.find_tokenizer(path, model.config.vocab_size)


def evaluate(config: EvalConfig, job: Job) -> None:
    """Measure what the options ask for, and print it on rank 0; every rank does its share of the work."""
    asked = asked_tasks(config)
    path, called = inference.find_model(config.init_from, config.out_dir)
    with run_folder.reading(path):
        model = load_model(config, path, job)
        find = inference.find_tokenizer if config.text or asked else inference.known_tokenizer
        tokenizer = find(path, model.config.vocab_size)
    data = None
    if config.dataset or not (config.text or asked):
        data = inference.open_data(path, config.dataset, model.config.vocab_size, tokenizer)
        tokenizer = tokenizer or data.tokenizer
    splits = find_splits(config, model, tokenizer, data)
    documents = config.documents
    if documents == "auto":
        documents = "stream" if inference.options_of(path).get("documents", "stream") == "stream" else "mask"
    model.set_documents(documents)
    has_documents = splits and documents != "stream"  # a question is no document
    eot_id = separator(tokenizer, ",".join(splits)) if has_documents else None
    block_size, stride = model.config.block_size, config.stride or model.config.block_size
    report: dict[str, Any] = {"model": called, "parameters": model.num_params(non_embedding=False),
                              "dtype": str(job.dtype).removeprefix("torch."), "block_size": block_size,
                              "stride": stride, "documents": documents}

    def log(line: str) -> None:
        if job.rank == 0 and not config.json:
            print(line, flush=True)

    log(f"{called}: {report['parameters']:,} parameters on {job.device}, {job.dtype}"
        + (f", windows of {block_size} tokens every {stride}" if splits else "")
        + (", attention within documents" if eot_id is not None else ""))
    results = report["results"] = {}
    for name, split in splits.items():
        results[name] = measure(model, split, tokenizer, eot_id, config, job)
        in_bytes = ", {bits_per_byte:.4f} bits per byte" if tokenizer else ""
        log(("{}: loss {loss:.4f} nats per token, perplexity {perplexity:.4f}" + in_bytes
             + " ({tokens:,} tokens, {bytes:,} bytes)").format(name, **results[name]))
    if data and len(data.datasets) > 1:  # what train.py reports as the validation loss
        loss = sum(share * results[name]["loss"] for name, share in zip(data.datasets, data.shares))
        results["mixture"] = {"loss": loss, "perplexity": perplexity(loss)}
        log("mixture, each by its share: loss {loss:.4f} nats per token, perplexity {perplexity:.4f}".format(
            **results["mixture"]))
    for name, score in asked.items():
        outcome = score(model, tokenizer, config.batch_size, job)
        for line in describe(outcome["scores"]):
            log(line)
        results |= outcome.pop("scores")
        report.setdefault("tasks", {})[name] = outcome
    if job.rank == 0 and config.json:
        # JSON has no NaN and no infinity: null.
        print(json.dumps({**report, "results": {name: {key: value if math.isfinite(value) else None for key, value
                                                       in values.items()} for name, values in results.items()}}))


def load_model(config: EvalConfig, path: Path, job: Job) -> LanguageModel:
    """The model at path on this rank's device, with the context length of the options. Raises ValueError or OSError."""
    model = inference.load_model(str(path)).to(job.device).eval()
    if config.block_size:
        model.crop_block_size(config.block_size)
    if config.stride > model.config.block_size:
        raise ValueError(f"stride={config.stride} would leave out tokens between windows of {model.config.block_size}")
    rows = config.batch_size * model.config.block_size
    numerics, _ = distributed.on_rank0(lambda: pick_numerics(
        model, config.where.dtype, "auto", job.device, rows, inference.options_of(path), training=False), job)
    job.set_dtype(numerics.dtype)
    model.set_attention(numerics.attention)
    return model


# Loss


def find_splits(config: EvalConfig, model: LanguageModel, tokenizer: Tokenizer | None,
                data: Mixture | None) -> dict[str, Split]:
    """The tokens to measure the loss on, by name: the text's, and those of each data set. Raises ValueError or OSError
    for a text that is unreadable or empty, and for data without such a split."""
    splits = data.splits(config.split) if data else {}
    if config.text:
        ids = tokenizer.encode(inference.read(f"FILE:{config.text}"))
        splits = {config.text: Split([Path(config.text)], model.config.vocab_size, [ids])} | splits
    for name, split in splits.items():
        if split.lengths.max(initial=0) < 2:
            raise ValueError(f"cannot measure a loss on {name}: it takes a text of two tokens or more")
    return splits


def measure(model: LanguageModel, split: Split, tokenizer: Tokenizer | None, eot_id: int | None, config: EvalConfig,
            job: Job) -> dict[str, float]:
    """Loss (nats a token), perplexity and, with a tokenizer, bits per byte; with the tokens and bytes they are of."""
    order = EvalOrder(split, model.config.block_size, config.eval_iters * config.batch_size, config.stride, eot_id)
    known = tokenizer.byte_lengths() if tokenizer else {}  # a model may have ids that its tokenizer never makes
    lengths = np.array([known.get(i, 0) for i in range(model.config.vocab_size)], dtype=np.int64)
    num_tokens = num_bytes = 0
    for first in range(0, len(order), 64):
        y = order.batch(first, 64).targets
        targets = y[y >= 0]
        num_tokens += len(targets)
        num_bytes += int(lengths[targets].sum())
    loss = validation_loss(model, order, config.batch_size, job)
    return {"loss": loss, "perplexity": perplexity(loss),
            "bits_per_byte": loss / math.log(2) * num_tokens / num_bytes if num_bytes else math.nan,
            "tokens": num_tokens, "bytes": num_bytes}


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def asked_tasks(config: EvalConfig) -> dict[str, Score]:
    """What scores a model on each of the tasks, in their order. Raises ValueError or OSError."""
    own_files = {name: questions_file(config, name) for name in TASKS}
    return load_tasks(task_names(config), own_files, config.include_path, config.limit)


def task_names(config: EvalConfig) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in config.tasks.split(",") if name.strip()))


def questions_file(config: EvalConfig, name: str) -> str:
    return getattr(config, f"{name}_file")


if __name__ == "__main__":
    run_script(main)
