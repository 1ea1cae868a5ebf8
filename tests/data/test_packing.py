"""packing.py: every token is a target once, windows are filled with whole documents, the order is a function of the
position."""

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_order import SEEDS, cut_into, quick, split_of

from flatgpt.data import packing
from flatgpt.data.loader import BatchPlan
from flatgpt.data.order import MixedOrder
from flatgpt.data.packing import PackedOrder, best_fit

DOCUMENTS = st.lists(st.lists(st.integers(1, 30), max_size=8), min_size=1, max_size=4).filter(
    lambda documents: sum(map(sum, documents)) >= 12)  # lengths, by shard


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 40)
    monkeypatch.setattr(packing, "POOL_BLOCKS", 2)


def order_of(documents: list[list[int]], block_size: int = 8, seed: int = 0) -> PackedOrder:
    """Documents of these lengths. The tokens count through all shards, so that each says where it stands."""
    edges = [np.array([0, *np.cumsum(lengths)], dtype=np.uint32) for lengths in documents]
    return PackedOrder(split_of([sum(lengths) for lengths in documents]), edges, block_size, seed)


def pieces_of(order: PackedOrder, first_seq: int, count: int) -> list[list[int]]:
    """The tokens of the pieces in these windows; the filler is left out."""
    inputs, targets, positions, _ = order.batch(first_seq, count)
    begins = np.flatnonzero(positions.ravel() == 0)
    pieces = np.split(np.stack([inputs.ravel(), targets.ravel()]), begins[1:], axis=1)
    return [piece[0].tolist() for piece in pieces if piece[1, 0] >= 0]


@quick
@given(documents=DOCUMENTS, block_size=st.integers(1, 12), world_size=st.sampled_from([1, 2, 3]),
       per_rank=st.integers(1, 5), seed=SEEDS)
def test_every_token_is_a_target_once_an_epoch_on_any_number_of_ranks(documents, block_size, world_size, per_rank,
                                                                      seed):
    order = order_of(documents, block_size, seed)
    epoch, num_tokens = order.epoch_seqs(), sum(map(sum, documents))
    plan = BatchPlan(world_size * per_rank, per_rank, 1, world_size)
    steps = -(-2 * epoch // plan.seqs_per_step)
    read = [order.batch(plan.first_seq(step * plan.seqs_per_step, rank), per_rank)
            for step in range(steps) for rank in range(world_size)]
    inputs, targets = (np.concatenate(rows)[:2 * epoch] for rows in list(zip(*read))[:2])
    for rows in (slice(0, epoch), slice(epoch, 2 * epoch)):
        is_real = targets[rows] >= 0
        assert sorted(targets[rows][is_real].tolist()) == list(range(num_tokens))
        assert (targets[rows][is_real] == (inputs[rows][is_real] + 1) % num_tokens).all()
        assert (inputs[rows][~is_real] == 0).all()


@quick
@given(documents=DOCUMENTS, block_size=st.integers(1, 12))
def test_windows_hold_whole_documents_or_pieces_of_those_that_are_longer(documents, block_size):
    order, begin, wanted = order_of(documents, block_size), 0, []
    for lengths in documents:
        for length in lengths:
            document = list(range(begin, begin + length))
            wanted += [document[i:i + block_size] for i in range(0, length, block_size)]
            begin += length
    assert sorted(pieces_of(order, 0, order.epoch_seqs())) == wanted


@quick
@given(documents=DOCUMENTS, first=st.integers(0, 100), count=st.integers(1, 40),
       cuts=st.lists(st.integers(0, 1000), max_size=5))
def test_batches_are_the_same_however_they_are_asked_for(documents, first, count, cuts):
    whole = order_of(documents).batch(first, count)
    order = order_of(documents)
    parts = [order.batch(first + start, size) for start, size in reversed(cut_into(count, cuts))]
    for rows, pieces in zip(whole[:3], list(zip(*parts[::-1]))[:3]):
        assert np.array_equal(np.concatenate(pieces), rows)


@quick
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_best_fit_places_each_piece_once_and_as_one_by_one(counts):
    """Against the plain way: piece after piece, each into the fullest window with room for it."""
    counts = np.array([0, *counts])
    T, rooms = len(counts) - 1, []
    for length in np.repeat(np.arange(T + 1), counts)[::-1].tolist():
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else T) - length)
    found = best_fit(counts)
    placed = np.bincount([length for lengths, number in found for length in lengths * number], minlength=T + 1)
    assert placed.tolist() == counts.tolist()
    assert sorted(T - sum(lengths) for lengths, number in found for _ in range(number)) == sorted(rooms)


def test_a_document_may_have_more_tokens_than_32_bits_count():
    edges = np.array([0, 3, 5 * 2**30], dtype=np.uint64)
    T = 2**20
    windows = packing.pack(edges.astype(np.int64), T, 0, 1)
    assert packing.count_lengths(edges, T)[T] == 5 * 2**10 - 1
    assert sorted(windows.starts[windows.shards == 0].tolist()) == [0, *range(3, 5 * 2**30, T)]


def test_epochs_and_seeds_differ_in_order():
    documents = [[3, 5, 8, 2, 6, 7, 1, 4] * 12]
    orders = [order_of(documents, seed=seed) for seed in (0, 1)]
    epoch = orders[0].epoch_seqs()
    read = [order.batch(first, epoch).inputs for order in orders for first in (0, epoch)]
    assert len({rows.tobytes() for rows in read}) == 4
    assert len({np.sort(rows, axis=None).tobytes() for rows in read}) == 1


def test_windows_of_one_pool_are_mixed_and_pools_follow_on_each_other():
    order = order_of([[8] * 50])  # blocks of five windows, pools of ten
    shown = order.batch(0, 50).inputs[:, 0] // 8
    for pool in shown.reshape(5, 10):
        blocks = pool // 5
        assert len(set(blocks)) == 2
        assert (np.diff(blocks) != 0).sum() > 1


def test_the_example_of_the_docstring():
    order = order_of([[6, 2, 2]], block_size=4)
    rows = {tuple(x): (y.tolist(), p.tolist()) for x, y, p in zip(*order.batch(0, 3)[:3])}
    assert rows == {(0, 1, 2, 3): ([1, 2, 3, 4], [0, 1, 2, 3]), (4, 5, 6, 7): ([5, 6, 7, 8], [0, 1, 0, 1]),
                    (8, 9, 0, 0): ([9, 0, -1, -1], [0, 1, 0, 1])}


def test_the_order_is_that_of_earlier_versions():
    """A run that an earlier version began goes on with the same batches: change these numbers only knowingly."""
    order = order_of([[5, 9, 3, 12, 7, 1, 20], [6, 6]], seed=1337)
    assert order.batch(0, 12).inputs[:, 0].tolist() == [57, 0, 37, 36, 63, 17, 29, 5, 25, 45, 45, 36]


def test_mixed_data_sets_are_read_as_each_alone():
    orders = [order_of([[5, 9, 3, 12]]), order_of([[4, 4, 6]], seed=1)]
    mixed = MixedOrder(orders, [0.5, 0.5])
    inputs, targets, positions, _ = mixed.batch(3, 20)
    source, own = mixed.sources(3, 20)
    for row, (i, q) in enumerate(zip(source, own)):
        alone = orders[i].batch(int(q), 1)
        assert [rows[row].tolist() for rows in (inputs, targets, positions)] == [rows[0].tolist() for rows in alone[:3]]


def test_padding_of_web_text_is_below_one_in_a_hundred():
    """Lengths as those of web pages: log-normal, half of them below 500 tokens. Each block is packed by itself."""
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(np.log(500), 1.0, 4000)).astype(int).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_TOKENS", 1 << 20)
        order = order_of([lengths[:2000], lengths[2000:]], block_size=1024)
    assert 0 < order.padding < 0.01
    targets = order.batch(0, order.epoch_seqs()).targets
    assert (targets < 0).mean() == pytest.approx(order.padding)


def test_an_id_outside_the_vocabulary_is_named_with_its_place():
    order = order_of([[5, 9], [3]])
    order.split.shards[1][2] = order.split.vocab_size
    with pytest.raises(ValueError, match=r"train_000001.bin: token id 1000000000 at position 2 is outside the vocab"):
        order.batch(0, order.epoch_seqs())
    split = order_of([[5, 9], [3, 8]]).split
    split.shards[1][0] = split.vocab_size  # it is also the target of the last piece of the shard before
    with pytest.raises(ValueError, match=r"train_000001.bin: token id 1000000000 at position 0 is outside the vocab"):
        PackedOrder(split, [np.array([0, 5, 14]), np.array([0, 3, 11])], 8, 0)


def test_a_split_that_does_not_fill_a_window_is_refused():
    assert order_of([[3, 5]], block_size=8).epoch_seqs() == 1
    for documents in ([[], []], [[3, 4]]):
        with pytest.raises(ValueError, match=r"data/counting has [07] tokens, and .* = 8: lower block_size"):
            order_of(documents, block_size=8)


@hypothesis.settings(max_examples=20, deadline=None)
@given(documents=DOCUMENTS)
def test_a_document_of_an_empty_shard_or_none_at_all_is_no_document(documents):
    empty = order_of([[], *documents, []])
    assert sorted(pieces_of(empty, 0, empty.epoch_seqs())) == sorted(
        pieces_of(order_of(documents), 0, order_of(documents).epoch_seqs()))
