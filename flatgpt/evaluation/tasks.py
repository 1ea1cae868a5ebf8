"""A task by its name: our own HellaSwag, or one of lm-evaluation-harness's.

`hellaswag` is always our own (questions.py), which needs no harness and gives its numbers; every other name is the
harness's, which is optional to install.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.evaluation import questions
from flatgpt.models.language_model import LanguageModel
from flatgpt.run_folder import stderr_of
from flatgpt.training.distributed import Job

HARNESS = "lm_eval==0.4.13"  # which the tests compare with
# Model, tokenizer, batch size, job -> see `score_own`.
Score = Callable[[LanguageModel, Tokenizer, int, Job], dict[str, Any]]


def load_tasks(names: list[str], files: dict[str, str], include_path: str, limit: int) -> dict[str, Score]:
    """What scores a model on each task, with its questions loaded: the first `limit`, 0 = all. `files` has those of our
    own tasks that lie in a file. Raises ValueError for a name that nobody knows, or for the harness's if that is not
    installed; and OSError."""
    theirs, found = [name for name in names if name not in questions.TASKS], {}
    if theirs:
        try:
            from flatgpt.evaluation import harness
        except ImportError as error:
            raise ValueError(f"{', '.join(theirs)}: tasks besides {', '.join(questions.TASKS)} are "
                             f"lm-evaluation-harness's, which cannot be imported here ({error}): "
                             f"pip install {HARNESS}") from None
        found = {name: partial(harness.score_task, tasks, limit)
                 for name, tasks in harness.find_tasks(theirs, include_path).items()}
    for name in set(names) - {*theirs}:
        asked = questions.load_questions(name, files.get(name, ""))
        found[name] = partial(score_own, name, asked[:limit or None])
    return {name: found[name] for name in names}


def score_own(name: str, asked: list[questions.Question], model: LanguageModel, tokenizer: Tokenizer, batch_size: int,
              job: Job) -> dict[str, Any]:
    """`scores`: task, or each task of a group -> metric -> number, with NAME_stderr beside it and how many `questions`
    it is of; `versions` of the tasks, and those metrics that are better where they are `lower_is_better`."""
    return {"scores": {name: questions.answer(model, asked, tokenizer, batch_size, job)},
            "versions": {name: questions.TASKS[name].version}, "lower_is_better": []}


def describe(scores: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A line for each task: arc_easy: acc 0.3100 +- 0.0100 (2,376 questions)."""
    for task, metrics in scores.items():
        parts = []
        for metric, value in metrics.items():
            if metric != "questions" and "_stderr" not in metric:
                stderr = metrics.get(stderr_of(metric))
                parts.append(f"{metric} {value:.4f}" + ("" if stderr is None else f" +- {stderr:.4f}"))
        count = f" ({metrics['questions']:,} questions)" if "questions" in metrics else ""
        yield f"{task}: {', '.join(parts) or 'no score'}{count}"
