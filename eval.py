"""Measure a model: loss, perplexity and bits per byte on text or data, and multiple-choice questions.

    python eval.py --out_dir=out/run                                on the validation split of the run's own data
    python eval.py --init_from=gpt2 --text=book.txt --stride=512    on a text, each token with 512 before it or more
    python eval.py --init_from=gpt2 --dataset=openwebtext --json    on a data set; the numbers as one JSON object
    python eval.py --init_from=gpt2 --tasks=hellaswag               accuracy on questions
    torchrun --nproc_per_node=8 eval.py --out_dir=out/run --tasks=hellaswag

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
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from flatgpt import machine
from flatgpt.options import check_options, closest, failed_rules, parse_options, run_script

if __name__ == "__main__":
    machine.warn_of_little_memory()

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from flatgpt import run_folder
from flatgpt.data import local_files, records
from flatgpt.data.loader import Mixture, separator
from flatgpt.data.order import EvalOrder
from flatgpt.data.shards import Split
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.models import inference
from flatgpt.models.language_model import LanguageModel
from flatgpt.training import distributed
from flatgpt.training.device import DeviceConfig, pick_numerics
from flatgpt.training.distributed import Job
from flatgpt.training.metrics import validation_loss

Row = tuple[list[int], int]  # the ids of a question and an answer, and how many of the last of them are the answer's


@dataclass
class EvalConfig:
    init_from: Annotated[str, "path"] = "resume"  # gpt2, a hub id, a model or run folder, ckpt.pt; resume: out_dir
    out_dir: Annotated[str, "path"] = "out"  # run folder; its best checkpoint is measured
    dataset: Annotated[str, "paths"] = ""  # data set or mixture; empty, as text and tasks: the run's own
    split: Literal["train", "val", "test"] = "val"  # of the data set
    documents: Literal["auto", "stream", "mask"] = "auto"  # mask: attend within documents; auto: as in the model's run
    text: Annotated[str, "path"] = ""  # a text file, read whole as one text
    tasks: str = ""  # multiple-choice questions: hellaswag
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
            ("eval_iters", self.eval_iters >= 0, "0 (all) or more"),
            ("batch_size", 1 <= self.batch_size <= 10**6, "1 to 1,000,000"))
        names = task_names(self)
        faults += [f"there is no task {name!r}; {closest(name, TASKS) or 'there is ' + ', '.join(TASKS)}"
                   for name in names if name not in TASKS]
        faults += [f"{name}_file={questions_file(self, name)} is for --tasks={name}" for name in TASKS
                   if questions_file(self, name) and name not in names]
        return faults


def main(argv: list[str]) -> None:
    config, _ = parse_options(EvalConfig, argv, usage=__doc__)
    check_options(config)
    with distributed.init_job(config.where) as job:
        evaluate(config, job)


def evaluate(config: EvalConfig, job: Job) -> None:
    """Measure what the options ask for, and print it on rank 0; every rank does its share of the work."""
    asked = {name: load_questions(name, questions_file(config, name)) for name in task_names(config)}
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

    def say(line: str) -> None:
        if job.rank == 0 and not config.json:
            print(line, flush=True)

    say(f"{called}: {report['parameters']:,} parameters on {job.device}, {job.dtype}"
        + (f", windows of {block_size} tokens every {stride}" if splits else "")
        + (", attention within documents" if eot_id is not None else ""))
    results = report["results"] = {}
    for name, split in splits.items():
        results[name] = measure(model, split, tokenizer, eot_id, config, job)
        in_bytes = ", {bits_per_byte:.4f} bits per byte" if tokenizer else ""
        say(("{}: loss {loss:.4f} nats per token, perplexity {perplexity:.4f}" + in_bytes
             + " ({tokens:,} tokens, {bytes:,} bytes)").format(name, **results[name]))
    if data and len(data.datasets) > 1:  # what train.py reports as the validation loss
        loss = sum(share * results[name]["loss"] for name, share in zip(data.datasets, data.shares))
        results["mixture"] = {"loss": loss, "perplexity": perplexity(loss)}
        say("mixture, each by its share: loss {loss:.4f} nats per token, perplexity {perplexity:.4f}".format(
            **results["mixture"]))
    for name, questions in asked.items():
        results[name] = answer(model, questions, tokenizer, config, job)
        say("{}: acc {acc:.4f} +- {acc_stderr:.4f}, acc_norm {acc_norm:.4f} +- {acc_norm_stderr:.4f} "
            "({questions:,} questions)".format(name, **results[name]))
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


# Multiple choice: the answer that the model finds likeliest is its own. Texts are formed, encoded and judged as
# EleutherAI's lm-evaluation-harness does it (0.4.13, model "hf"), whose numbers are those that people compare.


class Question(NamedTuple):
    where: str  # file and line, or data set and row, for messages
    context: str
    choices: list[str]
    correct: int


class Task(NamedTuple):
    hub: str  # data set on the hub
    split: str  # of it
    form: Callable[[dict[str, Any]], tuple[str, list[str], int]]  # a record -> context, choices, which is correct


def form_hellaswag(record: dict[str, Any]) -> tuple[str, list[str], int]:
    """Zellers et al. 2019, arXiv:1905.07830: which ending follows ctx_a, of whose last sentence ctx_b is the start."""
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return tidy_wikihow(context), [tidy_wikihow(ending) for ending in record["endings"]], int(record["label"])


def tidy_wikihow(text: str) -> str:
    """The text without the marks of WikiHow: [title] becomes the end of a sentence, other brackets are removed."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# To add a task, add a line here, and its NAME_file to EvalConfig.
TASKS = {"hellaswag": Task("Rowan/hellaswag", "validation", form_hellaswag)}


def task_names(config: EvalConfig) -> list[str]:
    return [name.strip() for name in config.tasks.split(",") if name.strip()]


def questions_file(config: EvalConfig, name: str) -> str:
    return getattr(config, f"{name}_file")


def load_questions(name: str, file: str) -> list[Question]:
    """A task's questions. Raises ValueError, which names the line that is not a question, and OSError."""
    questions = []
    for where, record in read_lines(Path(file)) if file else read_hub(name):
        try:
            context, choices, correct = TASKS[name].form(record)
            if not (context.strip() and all(choices) and 0 <= correct < len(choices)):
                raise ValueError("the context or a choice is empty, or none is correct")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{where} is not a question of {name}: {what}") from None
        questions.append(Question(where, context, choices, correct))
    if not questions:
        raise ValueError(f"{file or TASKS[name].hub} holds no questions")
    return questions


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The JSON values in a file, one a line, each with its place."""
    for record in local_files.read_lines(path):
        value, replaced = records.json_of(record)
        if replaced:
            raise ValueError(f"{record.where} holds {replaced:,} bytes that are not valid text")
        yield record.where, value


def read_hub(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a task's data set on the hub, each with its place. Raises OSError."""
    import datasets

    datasets.disable_progress_bars()
    task = TASKS[name]
    try:
        rows = datasets.load_dataset(task.hub, split=task.split)
    except Exception as error:  # of many kinds: no network, no such data set, files of no known format
        raise OSError(f"could not get the data set {task.hub}: {type(error).__name__}: {error} (without network: on a "
                      f"machine that has it, datasets.load_dataset({task.hub!r}, split={task.split!r}).to_json(FILE) "
                      f"writes its questions; then copy FILE to this machine and pass --{name}_file=FILE)") from None
    for number, row in enumerate(rows):
        yield f"{task.hub} {task.split} row {number}", row


def answer(model: LanguageModel, questions: list[Question], tokenizer: Tokenizer, config: EvalConfig,
           job: Job) -> dict[str, float]:
    """How often the correct choice is the likeliest (acc), and that with the likeliest by character (acc_norm), each
    with its standard error; the same on every rank."""
    rows = [row for question in questions for row in encode_question(question, tokenizer, model.config.block_size)]
    scores = iter(log_likelihoods(model, rows, config.batch_size, job))
    right = right_by_character = 0
    for question in questions:
        score = np.array([next(scores) for _ in question.choices])
        right += int(score.argmax() == question.correct)
        right_by_character += int((score / [len(choice) for choice in question.choices]).argmax() == question.correct)
    count, result = len(questions), {}
    for key, number in (("acc", right), ("acc_norm", right_by_character)):
        share = number / count
        result |= {key: share, f"{key}_stderr": math.sqrt(share * (1 - share) / max(1, count - 1))}
    return result | {"questions": count}


def encode_question(question: Question, tokenizer: Tokenizer, block_size: int) -> list[Row]:
    """A row for each choice, cut on the left to what the model can read. Raises ValueError for a choice beyond that.

    A choice stands behind a space, and its tokens are those that the whole has more than the context: so that a space
    is encoded with the word behind it, one at the context's end counts as the choice's."""
    context = question.context.rstrip()
    blank = question.context[len(context):] + " "
    head, rows = [*tokenizer.opening(), *tokenizer.encode(context).tolist()], []
    for choice in question.choices:
        whole = [*tokenizer.opening(), *tokenizer.encode(context + blank + choice).tolist()]
        tail = whole[len(head):]
        if not 0 < len(tail) <= block_size:
            raise ValueError(f"{question.where}: this answer has {len(tail)} tokens, but the model reads 1 to "
                             f"{block_size}: {choice[:60]!r}")
        rows.append(((head + tail)[-(block_size + 1):], len(tail)))
    return rows


def log_likelihoods(model: LanguageModel, rows: list[Row], batch_size: int, job: Job) -> list[float]:
    """ln p(answer | question) of each row, on every rank. A batch has rows of like length, and ranks take turns."""
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    batches = [by_length[i:i + batch_size] for i in range(0, len(rows), batch_size)][job.rank::job.world_size]
    found: dict[int, float] = {}
    for batch in tqdm(batches, desc="answers", disable=job.rank > 0 or not sys.stderr.isatty()):
        found |= zip(batch, score(model, [rows[i] for i in batch], job))
    for theirs in distributed.gather(found, job):
        found |= theirs
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def score(model: LanguageModel, rows: list[Row], job: Job) -> list[float]:
    """ln p(answer | question) of each row of a batch. Padding stands behind a row, where nothing looks at it."""
    B, T = len(rows), max(len(ids) for ids, _ in rows) - 1
    x, y = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -1)
    for i, (ids, num_answer) in enumerate(rows):
        x[i, :len(ids) - 1] = torch.tensor(ids[:-1])
        y[i, len(ids) - 1 - num_answer:len(ids) - 1] = torch.tensor(ids[-num_answer:])
    x, y = x.to(job.device), y.to(job.device)
    with job.autocast():
        logits = model(x)[0]  # (B, T, V)
    at = y >= 0
    losses = F.cross_entropy(logits[at].float(), y[at], reduction="none")
    return [-loss for loss in losses.new_zeros(B).index_add_(0, at.nonzero()[:, 0], losses).tolist()]


if __name__ == "__main__":
    run_script(main)
