"""pipeline.py: what becomes of a document, the same for any number of workers, and so many on their way at a time."""

import itertools
import multiprocessing
import random
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from corpus import FAULT, part_of
from hypothesis import given
from hypothesis import strategies as st

from flatgpt.data import pipeline
from flatgpt.data.pipeline import Cursor, Encoder, Workers, encode_in_order, refuse
from flatgpt.data.records import Record
from flatgpt.data.splits import SplitRule, plan_splits
from flatgpt.data.tokenizer import EOT, KINDS, make_tokenizer

quick = hypothesis.settings(max_examples=60, deadline=None,
                            suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


# Tokens


ALL_TO_TRAIN = SplitRule(0.1, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_document_stands_behind_one_end_of_text_whatever_it_spells(request, tmp_path, kind):
    texts = [f"one {EOT} two", EOT, f"{EOT}{EOT}three"]
    made = request.getfixturevalue("gpt2_tokenizer") if kind == "gpt2" else make_tokenizer(kind, texts, 300)
    made.save(tmp_path)
    tokens, outcomes = Encoder(kind, tmp_path, "text").encode(list(part_of(texts).read()), ALL_TO_TRAIN)
    assert tokens.dtype == np.uint16
    lengths = [count for outcome in outcomes for split, count in outcome.spans if split == "train"]
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    if made.eot_id is None:
        assert [made.decode(document) for document in documents] == texts
        return
    assert np.count_nonzero(tokens == made.eot_id) == 3
    assert [document[0] for document in documents] == [made.eot_id] * 3
    assert [made.decode(document[1:]) for document in documents] == texts


def test_what_is_empty_or_broken_gives_no_tokens_and_says_so():
    records = [Record("a:1", "text", "ab", 1), Record("a:2", "text", "", 2), Record("a:3", "json", b"{", 3),
               Record("a:4", "utf8", b"\xff", 4)]
    tokens, outcomes = Encoder("byte", Path("unused"), "text").encode(records, ALL_TO_TRAIN)
    assert tokens.tolist() == [256, 97, 98, 256, 0xEF, 0xBF, 0xBD]
    assert [outcome.spans for outcome in outcomes] == [[("train", 3)], [], [], [("train", 4)]]
    assert [outcome.num_bytes for outcome in outcomes] == [2, 0, 0, 3]
    assert [outcome.noted for outcome in outcomes] == [{}, {}, {}, {"replaced_bytes": 1}]
    assert [outcome.fault.partition(" is")[0] for outcome in outcomes] == ["", "", "a:3", ""]


def test_a_fault_is_an_error_unless_it_is_only_counted():
    refuse("a:3 is broken", skip_bad=True)
    with pytest.raises(ValueError, match=r"^a:3 is broken \(--skip_bad=True counts what is broken, and goes on\)$"):
        refuse("a:3 is broken", skip_bad=False)


def test_parts_cut_by_position_each_stand_behind_an_end_of_text():
    rule = SplitRule(0.25, 0.25, 0.25, 0.5, by_position=True)
    tokens, [outcome] = Encoder("byte", Path("unused"), "text").encode([Record("a", "text", "abcd", 1)], rule)
    assert tokens.tolist() == [256, 97, 98, 256, 99, 256, 100]
    assert outcome.spans == [("train", 3), ("test", 2), ("val", 2)]


# Workers


class Immediate:
    """A pool whose work is done at once, by a count of how many records it was given."""

    count = 2

    def __init__(self, encoder: Encoder):
        self.encoder, self.given = encoder, 0

    def submit(self, records: list[Record], rule: SplitRule) -> Future:
        self.given += len(records)
        future: Future = Future()
        future.set_result(self.encoder.encode(records, rule))
        return future


@pytest.mark.parametrize("limits", [{"AHEAD_BYTES": 5000}, {"BATCH_BYTES": 500}])
def test_no_more_is_read_ahead_than_the_limit_allows(monkeypatch, limits):
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 1000)
    for name, value in limits.items():
        monkeypatch.setattr(pipeline, name, value)
    read, pool, taken = itertools.count(), Immediate(Encoder("byte", Path("unused"), "text")), 0
    parts = [part_of(["x" * 100] * 300, str(i), lambda: next(read)) for i in range(4)]
    ahead = []
    for batch in encode_in_order(parts, Cursor(), ALL_TO_TRAIN, pool):
        ahead.append(pool.given - taken)
        taken += len(batch.outcomes)
    assert taken == next(read) == 1200
    # 5,000 bytes and the batch that passes them; or sixteen batches of 500 bytes and the one that passes those.
    assert max(ahead) == (60 if "AHEAD_BYTES" in limits else 85)


def test_a_document_beyond_the_limit_passes_alone(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 10)
    monkeypatch.setattr(pipeline, "AHEAD_BYTES", 100)
    texts = ["a" * 5, "b" * 1000, "c" * 5]
    pool = Immediate(Encoder("byte", Path("unused"), "text"))
    batches = list(encode_in_order([part_of(texts)], Cursor(), ALL_TO_TRAIN, pool))
    assert "".join(map(chr, np.concatenate([batch.tokens for batch in batches]))) == "".join(f"Ā{t}" for t in texts)


@quick
@given(sizes=st.lists(st.integers(0, 6), max_size=6), start=st.integers(0, 40), batch_bytes=st.integers(1, 60))
def test_reading_goes_on_from_any_place(sizes, start, batch_bytes):
    texts = [[f"{part}.{i}" for i in range(size)] for part, size in enumerate(sizes)]
    parts = [part_of(part, str(i)) for i, part in enumerate(texts)]
    cursors = [Cursor(), *(Cursor(part, i + 1) for part, size in enumerate(sizes) for i in range(size))]
    pool = Immediate(Encoder("byte", Path("unused"), "text"))
    start %= len(cursors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BATCH_BYTES", batch_bytes)
        batches = list(encode_in_order(parts, cursors[start], ALL_TO_TRAIN, pool))
    ends = itertools.accumulate(len(batch.outcomes) for batch in batches)
    assert [batch.cursor for batch in batches] == [cursors[start + end] for end in ends]
    expected = "".join(f"Ā{text}" for text in list(itertools.chain(*texts))[start:])
    assert "".join(chr(token) for batch in batches for token in batch.tokens) == expected


def test_processes_give_what_a_thread_gives_in_the_order_of_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 2000)
    texts = [f"document {i} " * random.Random(i).randrange(200) for i in range(300)]
    parts = [part_of(texts[:200]), FAULT, part_of(texts[200:])]
    rule = plan_splits(parts, "text", 0.2, 0.1)
    results = []
    for count in (1, 2):
        with Workers(count, Encoder("byte", tmp_path, "text")) as workers:
            assert len(multiprocessing.active_children()) == (0 if count == 1 else 2)
            results.append(list(encode_in_order(parts, Cursor(), rule, workers)))
    thread, processes = results
    assert len(thread) == len(processes) > 20
    for a, b in zip(thread, processes):
        assert (a.cursor, a.end, a.outcomes) == (b.cursor, b.end, b.outcomes)
        assert np.array_equal(a.tokens, b.tokens)
    outcomes = [outcome for batch in thread for outcome in batch.outcomes]
    assert Counter(bool(outcome.spans) for outcome in outcomes)[False] == texts.count("") + 1
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 10)
    with Workers(2, Encoder("byte", tmp_path, "text")) as workers:
        batches = encode_in_order([part_of(["text " * 10] * 1000)], Cursor(), ALL_TO_TRAIN, workers)
        next(batches)
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(OSError, match=r"a tokenizing process died.*fewer --workers goes on from the last finished"):
            list(batches)
