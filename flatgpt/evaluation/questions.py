"""Multiple choice of our own: HellaSwag, for machines without lm-evaluation-harness too.

The answer that the model finds likeliest is its own. Texts are formed, encoded and judged as EleutherAI's
lm-evaluation-harness does it (0.4.13, model "hf"), whose numbers are those that people compare.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flatgpt.data import local_files, records
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.evaluation.scoring import Row, cut_row, log_likelihoods
from flatgpt.models.language_model import LanguageModel
from flatgpt.training.distributed import Job


class Question(NamedTuple):
    where: str  # file and line, or data set and row, for messages
    context: str
    choices: list[str]
    correct: int


class Task(NamedTuple):
    hub: str  # data set on the hub
    split: str  # of it
    form: Callable[[dict[str, Any]], tuple[str, list[str], int]]  # a record -> context, choices, which is correct
    version: float  # the harness's, of the task that this one is


def form_hellaswag(record: dict[str, Any]) -> tuple[str, list[str], int]:
    """Zellers et al. 2019, arXiv:1905.07830: which ending follows ctx_a, of whose last sentence ctx_b is the start."""
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return tidy_wikihow(context), [tidy_wikihow(ending) for ending in record["endings"]], int(record["label"])


def tidy_wikihow(text: str) -> str:
    """The text without the marks of WikiHow: [title] becomes the end of a sentence, other brackets are removed."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# To add a task, add a line here, and its NAME_file to eval.py's options.
TASKS = {"hellaswag": Task("Rowan/hellaswag", "validation", form_hellaswag, 1.0)}


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


def answer(model: LanguageModel, questions: list[Question], tokenizer: Tokenizer, batch_size: int,
           job: Job) -> dict[str, float]:
    """How often the correct choice is the likeliest (acc), and that with the likeliest by character (acc_norm), each
    with its standard error; the same on every rank."""
    rows = [row for question in questions for row in encode_question(question, tokenizer, model.config.block_size)]
    scores = iter(log_likelihoods(model, rows, batch_size, job))
    right = right_by_character = 0
    for question in questions:
        score = np.array([next(scores).log_prob for _ in question.choices])
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
        rows.append(cut_row(head, tail, block_size))
    return rows
