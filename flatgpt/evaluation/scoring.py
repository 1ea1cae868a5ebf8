"""ln p(answer | question): what multiple choice and the harness's tasks are judged by.

Owns how rows of tokens are batched and shared by the ranks. It reads no text: questions.py and harness.py encode it.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from flatgpt.models.language_model import LanguageModel
from flatgpt.training import distributed
from flatgpt.training.distributed import Job

Row = tuple[list[int], int]  # the ids of a question and an answer, and how many of the last of them are the answer's


class Likelihood(NamedTuple):
    log_prob: float  # ln p(answer | question)
    is_greedy: bool  # whether each token of the answer is the likeliest there


def cut_row(question: list[int], answer: list[int], block_size: int) -> Row:
    """A row of both, cut on the left to what a model can read: its last token is only predicted."""
    return (question + answer)[-(block_size + 1):], len(answer)


def log_likelihoods(model: LanguageModel, rows: list[Row], batch_size: int, job: Job) -> list[Likelihood]:
    """That of each row's answer, on every rank. A batch has rows of like length, and ranks take turns."""
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    batches = [by_length[i:i + batch_size] for i in range(0, len(rows), batch_size)][job.rank::job.world_size]
    found: dict[int, Likelihood] = {}
    for batch in tqdm(batches, desc="answers", disable=job.rank > 0 or not sys.stderr.isatty()):
        found |= zip(batch, _score(model, [rows[i] for i in batch], job))
    for theirs in distributed.gather(found, job):
        found |= theirs
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def _score(model: LanguageModel, rows: list[Row], job: Job) -> list[Likelihood]:
    """Of the rows of a batch. Padding stands behind a row, where nothing looks at it."""
    B, T = len(rows), max(len(ids) for ids, _ in rows) - 1
    x, y = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -1)
    for i, (ids, num_answer) in enumerate(rows):
        x[i, :len(ids) - 1] = torch.tensor(ids[:-1])
        y[i, len(ids) - 1 - num_answer:len(ids) - 1] = torch.tensor(ids[-num_answer:])
    x, y = x.to(job.device), y.to(job.device)
    with job.autocast():
        logits = model(x)[0]  # (B, T, V)
    at = y >= 0
    logits, row = logits[at].float(), at.nonzero()[:, 0]
    losses = F.cross_entropy(logits, y[at], reduction="none")
    sums = losses.new_zeros(B).index_add_(0, row, losses)
    misses = losses.new_zeros(B).index_add_(0, row, (logits.argmax(dim=-1) != y[at]).float())
    return [Likelihood(-loss, missed == 0) for loss, missed in zip(sums.tolist(), misses.tolist())]
