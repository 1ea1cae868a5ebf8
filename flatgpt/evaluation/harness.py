"""The tasks of EleutherAI's lm-evaluation-harness, over any model of ours.

Owns how the harness reads a model: `HarnessModel` encodes texts, cuts them to block_size and judges them as the
harness's own model "hf" does, so that the scores are those of its command line. Tasks, prompts, metrics and standard
errors are the harness's, called as a library. It is imported when one of its tasks is asked for.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.evaluation.scoring import cut_row, log_likelihoods
from flatgpt.files import one_line
from flatgpt.models.language_model import LanguageModel
from flatgpt.models.sampling import Sampler
from flatgpt.options import closest
from flatgpt.training import distributed
from flatgpt.training.distributed import Job

MAX_NEW_TOKENS = 256  # where a task does not say, as with "hf"
TOP_K = 50  # transformers' own, where a task that draws does not say
# Bootstrapped standard errors are the same from one process, which takes no cores from a run on this machine, and
# leaves no workers behind when it is killed.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
UNDERSTOOD = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")  # of a task's generation_kwargs


class HarnessModel(TemplateLM):
    """A model of ours as the harness asks it. The ranks share the requests by themselves: to the harness they are one.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, batch_size: int, job: Job):
        super().__init__()
        self._model, self._text, self._batch_size, self._job = model, tokenizer, batch_size, job
        self._opening = tokenizer.opening()
        bos = tokenizer.config.get("bos_token")
        self._bos_id = None if bos is None else tokenizer.hf.token_to_id(bos)
        self._special = {i for i, token in tokenizer.hf.get_added_tokens_decoder().items() if token.special}

    @property
    def max_length(self) -> int:
        return self._model.config.block_size

    @property
    def eot_token_id(self) -> int:
        return self._text.start_id if self._text.eot_id is None else self._text.eot_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it. A tokenizer without an end of text has none: there it
        is what an empty prompt starts from."""
        return self.eot_token_id if self._bos_id is None else self._bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, behind those that the tokenizer puts ahead of every text; not where the harness wants none
        or the text begins with them itself. Raises ValueError."""
        ids = self._text.encode_prompt(string).tolist()[len(self._opening):] if string else []
        begins = self._bos_id is not None and string.startswith(self._text.decode([self._bos_id]))
        return ids if add_special_tokens is False or begins else [*self._opening, *ids]

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]],
                              **_: Any) -> list[tuple[float, bool]]:
        """Of (texts, context, continuation). Raises ValueError for a continuation that the model cannot read."""
        for texts, _context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"an answer has {len(continuation)} tokens, but the model reads 1 to "
                                 f"{self.max_length}: {texts and texts[1][:60]!r}")
        rows = [cut_row(context, continuation, self.max_length) for _, context, continuation in requests]
        return [tuple(found) for found in log_likelihoods(self._model, rows, self._batch_size, self._job)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows of `max_length` that lie side by side."""
        windows = [[(None, *make_disjoint_window(window)) for window in get_rolling_token_windows(
            self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1)]
            for request in requests]
        found = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [sum(next(found)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes behind each text. The ranks take turns."""
        mine = range(self._job.rank, len(requests), self._job.world_size)
        bar = tqdm(mine, desc="texts", disable=self._job.rank > 0 or not sys.stderr.isatty())
        written = {i: self._write(*requests[i].args) for i in bar}
        for theirs in distributed.gather(written, self._job):
            written |= theirs
        return [written[i] for i in range(len(requests))]

    def _write(self, context: str, asked: Mapping[str, Any]) -> str:
        """Up to the first of the texts that end it, or the end of text. Raises ValueError for what cannot be done."""
        settings = normalize_gen_kwargs(dict(asked), MAX_NEW_TOKENS)
        if unknown := [f"{key}={value}" for key, value in settings.items()
                       if key not in UNDERSTOOD and value not in (None, False, 1)]:
            raise ValueError(f"the task wants text written with {', '.join(unknown)}, which is not offered here")
        if settings["max_gen_toks"] >= self.max_length:
            raise ValueError(f"the task wants {settings['max_gen_toks']} new tokens behind a text, but the model reads "
                             f"{self.max_length}: a task file can ask for less (generation_kwargs: max_gen_toks)")
        until = handle_stop_sequences(settings["until"], self._text.decode([self.eot_token_id]))
        sampler = Sampler(temperature=0) if not settings["do_sample"] else Sampler(
            settings["temperature"], settings.get("top_k", TOP_K), settings.get("top_p"))
        ids = (self.tok_encode(context) or [self.prefix_token_id])[settings["max_gen_toks"] - self.max_length:]
        idx, new, text = torch.tensor([ids], device=self._job.device), [], ""
        with self._job.autocast():
            for token in self._model.stream(idx, settings["max_gen_toks"], sampler):
                if (i := int(token)) == self._text.eot_id:
                    break
                new += [i] if i not in self._special else []
                text = self._text.decode(new)
                if any(stop and stop in text for stop in until):
                    break
        return postprocess_generated_text(text, until, None)


def find_tasks(names: list[str], include_path: str) -> dict[str, list[Any]]:
    """The harness's own task or group by each name, with its data, or the tasks that a tag stands for. Those in the
    YAML files of `include_path` come first. Raises ValueError for a name that is not known, OSError for a task whose
    files or data cannot be had."""
    if include_path and not Path(include_path).is_dir():
        raise FileNotFoundError(f"there is no folder {include_path} of task files")
    manager = TaskManager(include_path=include_path or None, include_defaults=False)
    if not set(names) <= {*manager.all_tasks}:  # to read the harness's 14,000 takes half a minute
        manager = TaskManager(include_path=include_path or None)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        place = f"neither {include_path} nor lm-evaluation-harness" if include_path else "lm-evaluation-harness"
        hints = [hint for name in unknown if (hint := closest(name, ["hellaswag", *manager.all_tasks]))]
        raise ValueError(f"there is no task {', '.join(map(repr, unknown))}; {' '.join(hints) or place} "
                         + ("" if hints else "has it" if include_path else "does not have it"))
    found = {}
    for name in names:
        try:
            with quiet():
                loaded = manager.load([name])
        except Exception as error:  # of many kinds: no network, a missing file, one that says too little
            advice = "" if include_path else (" (without network: load it on a machine that has one, and copy its "
                                              "Hugging Face cache, HF_HOME)")
            raise OSError(f"the task {name} could not be loaded: {one_line(error)}{advice}") from None
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise ValueError(f"{name} runs code that a model has written: lm_eval itself has "
                                 "--confirm_run_unsafe_code for that")
        found[name] = [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]
    return found


def score_task(tasks: list[Any], limit: int, model: LanguageModel, tokenizer: Tokenizer, batch_size: int,
               job: Job) -> dict[str, Any]:
    """What the harness finds for tasks of `find_tasks`, on their first `limit` questions (0 = all), as tasks.score_own
    returns it; the same on every rank. Raises ValueError."""
    loaded = TaskManager(include_defaults=False).load(tasks)
    for task in loaded["tasks"].values():  # the seeds and defaults of the harness's command line
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    with quiet():
        found = lm_eval.evaluate(HarnessModel(model, tokenizer, batch_size, job), loaded, limit=limit or None,
                                 log_samples=False)
    scores = {name: {_metric(key): value for key, value in result.items() if _is_number(value) and "," in key}
              for name, result in found["results"].items()}
    for name, counts in found["n-samples"].items():
        scores[name]["questions"] = counts["effective"]
    lower = {name: [metric for metric, is_better in better.items() if is_better is False]
             for name, better in found["higher_is_better"].items()}
    return {"scores": scores, "versions": {name: found["versions"][name] for name in loaded["tasks"]},
            "lower_is_better": sorted({metric for metrics in lower.values() for metric in metrics}),
            "harness": lm_eval.__version__}


def _metric(key: str) -> str:
    """acc,none -> acc; exact_match,strict-match, which has a filter, stays as it is, as does its standard error."""
    return key.removesuffix(",none")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the harness prints goes to standard error, and on no terminal nowhere: the output is eval.py's own."""
    with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else io.StringIO()), (
            contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())):
        yield
