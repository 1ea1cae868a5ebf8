"""splits.py: shares are kept, and a split depends on nothing but a document's text."""

import hashlib
import itertools

import hypothesis
import numpy as np
import pytest
from corpus import FAULT, part_of
from hypothesis import example, given
from hypothesis import strategies as st

from flatgpt.data import splits
from flatgpt.data.splits import SPLITS, SplitRule, digest_of, draw, plan_splits

quick = hypothesis.settings(max_examples=60, deadline=None)


def splits_of(texts: list[str], rule: SplitRule) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in texts:
        for split, part in rule.split(text, digest_of(text.encode())):
            found[split].append(part)
    return found


def test_a_document_is_drawn_by_its_sha256():
    digest = hashlib.sha256("ü".encode()).digest()
    assert digest_of("ü".encode()) == digest[:16]
    assert draw(digest_of("ü".encode())) == pytest.approx(int(digest.hex()[:16], 16) / 16**16)
    draws = [draw(digest_of(f"{i}".encode())) for i in range(4000)]
    assert np.histogram(draws, 10, (0, 1))[0].min() > 320  # of 400; 4 standard deviations are 76


@quick
@example(count=4, val=0.375, test=0.375, seed=0)  # both would be two
@example(count=2, val=0.9, test=0.05, seed=0)
@given(count=st.integers(2, 60), val=st.floats(0.001, 0.45), test=st.floats(0, 0.45), seed=st.integers(0, 99))
def test_a_small_source_has_the_shares_asked_for_and_something_to_train_on(count, val, test, seed):
    texts = [f"{seed} {i}" for i in range(count)]
    found = splits_of(texts, plan_splits([part_of(texts)], "text", val, test))
    asked = [max(1, round(val * count)), max(1, round(test * count)) if test else 0]
    num_val, num_test, num_train = (len(found[split]) for split in ("val", "test", "train"))
    assert num_train >= 1
    assert [num_val, num_test] == asked if sum(asked) < count else num_train == 1
    assert sorted(itertools.chain(*found.values())) == sorted(texts)


@quick
@given(order=st.randoms(use_true_random=False), cut=st.integers(0, 40), few=st.sampled_from([10, 1000]))
def test_neither_the_order_nor_the_files_nor_empty_and_broken_documents_matter(order, cut, few):
    texts = [f"document {i}" for i in range(40)]
    shuffled = [*texts, "", "document 3"]
    order.shuffle(shuffled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "FEW_DOCUMENTS", few)
        rules = [plan_splits(parts, "text", 0.2, 0.1) for parts in (
            [part_of(texts)], [part_of(shuffled[:cut]), FAULT, part_of(shuffled[cut:])])]
    assert rules[0] == rules[1]
    assert rules[0].val_below == pytest.approx(0.2, abs=0.2)
    assert (rules[0].val_below == 0.2) == (few == 10)


@pytest.mark.parametrize("limit", [("FEW_DOCUMENTS", 50), ("FEW_CHARACTERS", 50 * len("document 0000"))])
def test_of_a_large_source_no_more_than_the_beginning_is_read(monkeypatch, limit):
    monkeypatch.setattr(splits, *limit)
    texts = [f"document {i:04d}" for i in range(3000)]
    count = itertools.count()
    rule = plan_splits([part_of(texts, read=lambda: next(count))], "text", 0.1, 0.05)
    assert rule == SplitRule(0.1, 0.05, 0.1, 0.1 + 0.05)
    assert next(count) == 50
    found = splits_of(texts, rule)
    assert [len(found[split]) for split in SPLITS] == pytest.approx([2550, 150, 300], abs=60)


def test_one_long_document_before_others_is_no_source_of_one(monkeypatch):
    monkeypatch.setattr(splits, "FEW_CHARACTERS", 1000)
    assert not plan_splits([part_of(["long " * 1000, "short"])], "text", 0.1, 0.0).by_position
    assert plan_splits([part_of(["long " * 1000, "", "long " * 1000])], "text", 0.1, 0.0).by_position


@quick
@given(text=st.text(min_size=1), val=st.floats(0.01, 0.49), test=st.floats(0, 0.49))
def test_a_source_of_one_document_is_cut_by_position(text, val, test):
    rule = plan_splits([part_of([text])], "text", val, test)
    cut = rule.split(text, digest_of(text.encode()))
    assert "".join(part for _, part in cut) == text
    assert [split for split, _ in cut] == [split for split in SPLITS if split in dict(cut)]
    assert all(part for _, part in cut)
    for split, share in (("val", val), ("test", test)):
        assert len(dict(cut).get(split, "")) == pytest.approx(share * len(text), abs=1)


@pytest.mark.parametrize(("parts", "words"), [
    ([], "the source is empty"), ([part_of(["", ""])], "the source is empty"),
    ([FAULT, part_of([""])], "bad:1 is broken")])
def test_a_source_without_text_is_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        plan_splits(parts, "text", 0.1, 0.0)


