"""order.py: the order of sequences against naive enumeration, mixtures against their quotas."""

import hashlib
import itertools
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatgpt.data import order as order_module
from flatgpt.data.loader import DataConfig, plan_batches
from flatgpt.data.order import EvalOrder, MixedOrder, TrainOrder, derive_seed, permute, quotas
from flatgpt.data.shards import Split

quick = hypothesis.settings(max_examples=60, deadline=None)
LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Windows are found in blocks: small ones are quicker here, and their borders are met."""
    monkeypatch.setattr(order_module, "BLOCK_SEQS", 32)


def split_of(lengths: list[int]) -> Split:
    """Shards of these lengths in memory. The tokens count through them all, so that each says where it stands."""
    paths = [Path(f"data/counting/train_{i:06d}.bin") for i in range(len(lengths))]
    return Split(paths, 10**9, np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]))


def cut_into(count: int, cuts: list[int]) -> list[tuple[int, int]]:
    """[0, count) as (first, size) pieces, cut at the places given (modulo count)."""
    edges = sorted({0, count, *(cut % count for cut in cuts)})
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


# The permutation


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 1000))
@quick
def test_permute_is_a_bijection(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


def test_permute_shuffles_anew_for_every_seed_and_epoch():
    places = np.arange(1000)
    orders = [places, *(permute(places, 1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)))]
    correlation = np.corrcoef(orders) - np.eye(5)
    assert np.abs(correlation).max() < 0.15  # of independent orders: 0.03 in the mean


def test_permute_takes_any_number_of_windows():
    windows = permute(np.arange(10**12 - 1000, 10**12), 10**12, 1337, 0)
    assert len(set(windows.tolist())) == 1000
    assert 0 <= windows.min() < 10**11 < 9 * 10**11 < windows.max() < 10**12


def test_the_order_is_that_of_earlier_versions():
    """A run that an earlier version began goes on with the same batches: change these numbers only knowingly."""
    assert permute(np.arange(10), 10, 1337, 0).tolist() == [4, 8, 5, 6, 9, 7, 3, 2, 1, 0]
    assert TrainOrder(split_of([50, 30]), 8, 1337).windows(0, 12) == [
        (0, 36), (0, 12), (1, 4), (1, 12), (0, 4), (1, 20), (0, 28), (0, 20),  # epoch 0 begins at token 4
        (0, 24), (1, 8), (0, 0), (0, 16)]


def test_derived_seeds_are_sha256_of_the_key():
    digest = hashlib.sha256(b"(1337, 'offset', 7)").digest()
    assert derive_seed(1337, "offset", 7) == int.from_bytes(digest[:8], "little") // 2


# Training


@quick
@given(lengths=LENGTHS, block_size=st.integers(1, 8), seed=SEEDS)
def test_every_epoch_reads_every_window_once(lengths, block_size, seed):
    hypothesis.assume(max(lengths) > block_size)
    order, first_seq = TrainOrder(split_of(lengths), block_size, seed), 0
    for epoch in range(3):
        offsets, counts = order.cut(epoch)
        windows = [(shard, start) for shard, (length, offset) in enumerate(zip(lengths, offsets.tolist()))
                   for start in range(offset, length - block_size, block_size)]
        assert counts.sum() == len(windows)
        assert sorted(order.windows(first_seq, len(windows))) == windows
        assert {shard for shard, _ in windows} == {i for i, length in enumerate(lengths) if length > block_size}
        assert (offsets >= 0).all()
        assert (offsets < block_size).all()
        first_seq += len(windows)


def test_epochs_differ_in_offset_and_order():
    order = TrainOrder(split_of([8 * 50]), 8, 1337)
    epochs = [order.windows(49 * epoch, 49) for epoch in range(6)]
    assert len({epoch[0][1] % 8 for epoch in epochs}) > 1
    assert len({tuple(start // 8 for _, start in epoch) for epoch in epochs}) == 6
    assert TrainOrder(split_of([8 * 50]), 8, 1338).windows(0, 49) != epochs[0]


@quick
@given(lengths=LENGTHS, block_size=st.integers(1, 8), first=st.integers(0, 100), count=st.integers(1, 60),
       cuts=st.lists(st.integers(0, 1000), max_size=5))
def test_batches_are_the_same_however_they_are_asked_for(lengths, block_size, first, count, cuts):
    hypothesis.assume(max(lengths) > block_size)
    split = split_of(lengths)
    rows = TrainOrder(split, block_size, 1).rows(first, count)
    order = TrainOrder(split, block_size, 1)
    parts = [order.rows(first + start, size) for start, size in reversed(cut_into(count, cuts))]
    assert np.array_equal(np.concatenate(parts[::-1]), rows)
    windows = order.windows(first, count)
    assert len(windows) == len(rows) == count
    for (shard, start), row in zip(windows, rows):
        assert row.tolist() == split.shards[shard][start:start + block_size + 1].tolist()


@quick
@given(world_size=st.sampled_from([1, 2, 3, 4, 8]), batch_size=st.integers(1, 30), step=st.integers(0, 50),
       seqs=st.sampled_from([24, 48]), seed=st.integers(0, 9))
def test_a_step_trains_on_the_same_windows_on_any_number_of_ranks(world_size, batch_size, step, seqs, seed):
    order = TrainOrder(split_of([300, 150]), 8, seed)
    plan = plan_batches(DataConfig(batch_size=batch_size, total_batch_size=seqs * 8), {}, 8, world_size)
    read = []
    for rank in range(world_size):
        first = plan.first_seq(step * seqs, rank)
        for start in range(0, plan.seqs_per_rank, plan.micro_batch):
            read += order.windows(first + start, plan.micro_batch)
    assert read == order.windows(step * seqs, seqs)


def test_a_train_split_without_a_window_is_refused():
    TrainOrder(split_of([3, 9]), 8, 0)
    with pytest.raises(ValueError, match=r"8 tokens in its longest shard.* block_size \+ 1 = 9"):
        TrainOrder(split_of([3, 8]), 8, 0)


# Evaluation


@quick
@given(lengths=LENGTHS, block_size=st.integers(1, 8))
def test_the_whole_split_has_every_token_but_a_shards_first_as_target_once(lengths, block_size):
    hypothesis.assume(max(lengths) > 1)
    split = split_of(lengths)
    order = EvalOrder(split, block_size)
    x, y, *_ = order.batch(0, len(order))
    real = y >= 0
    assert order.is_whole
    assert x.shape == y.shape == (len(order), block_size)
    assert y[real].tolist() == [token for shard in split.shards for token in shard[1:]]
    assert np.array_equal(x[real], y[real] - 1)
    assert (y[~real] == -1).all()
    assert (x >= 0).all()
    assert real.any(axis=1).all()


@quick
@given(lengths=LENGTHS, num_seqs=st.integers(1, 80), cuts=st.lists(st.integers(0, 1000), max_size=4))
def test_sampled_windows_are_evenly_spaced_however_they_are_asked_for(lengths, num_seqs, cuts):
    hypothesis.assume(max(lengths) > 1)
    split = split_of(lengths)
    whole, order = EvalOrder(split, 4), EvalOrder(split, 4, num_seqs)
    rows = whole.batch(0, len(whole)).inputs.tolist()
    parts = [order.batch(first, size) for first, size in cut_into(len(order), cuts)]
    chosen = [rows.index(row) for part in parts for row in part.inputs.tolist()]
    assert len(chosen) == len(order) == min(num_seqs, len(whole))
    assert order.is_whole == (num_seqs >= len(whole))
    gaps = np.diff([*chosen, len(rows)])
    assert chosen[0] == 0
    assert gaps.min() > 0
    assert gaps.max() - gaps.min() <= 1


@quick
@given(lengths=LENGTHS, block_size=st.integers(1, 8), data=st.data())
def test_strided_windows_have_the_same_targets_with_more_before_them(lengths, block_size, data):
    hypothesis.assume(max(lengths) > 1)
    stride = data.draw(st.integers(1, block_size))
    split = split_of(lengths)
    order = EvalOrder(split, block_size, stride=stride)
    x, y, *_ = order.batch(0, len(order))
    real = y >= 0
    assert y[real].tolist() == [token for shard in split.shards for token in shard[1:]]
    assert np.array_equal(x[real], y[real] - 1)
    assert real.any(axis=1).all()
    seen = np.broadcast_to(np.arange(1, block_size + 1), y.shape)[real]  # tokens of context that a target has
    behind = np.concatenate([np.arange(1, length) for length in lengths if length])  # all that there are
    assert (seen >= np.minimum(behind, block_size - stride + 1)).all()


def test_beyond_the_last_window_is_padding():
    x, y, *_ = EvalOrder(split_of([9]), 4).batch(1, 3)
    assert x.tolist() == [[4, 5, 6, 7], [0] * 4, [0] * 4]
    assert y.tolist() == [[5, 6, 7, 8], [-1] * 4, [-1] * 4]


def test_a_split_without_a_target_is_refused():
    with pytest.raises(ValueError, match="an evaluation takes two tokens, and it has 1;"):
        EvalOrder(split_of([1, 0, 1]), 4)


# Mixtures


WEIGHTS = st.lists(st.integers(1, 1000), min_size=2, max_size=4)


def shares_of(weights: list[int]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def mix(shares: list[float], period: int = order_module.PERIOD, block_size: int = 8) -> MixedOrder:
    """Data sets of different lengths whose tokens say which one they are from, mixed in a period of so many places."""
    orders = []
    for i in range(len(shares)):
        split = split_of([60 + 20 * i, 40])
        split.shards = [tokens + 1000 * i for tokens in split.shards]
        orders.append(TrainOrder(split, block_size, seed=i))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "PERIOD", period)
        return MixedOrder(orders, shares)


@given(weights=WEIGHTS)
def test_quotas_are_whole_numbers_next_to_the_shares_and_fill_the_period(weights):
    shares = shares_of(weights)
    assert sum(quotas(shares)) == order_module.PERIOD
    assert all(abs(quota - share * order_module.PERIOD) < 1 for quota, share in zip(quotas(shares), shares))


def test_what_is_left_over_goes_to_the_largest_remainders():
    assert quotas([0.7, 0.3]) == [7000, 3000]
    assert quotas([1 / 3] * 3) == [3334, 3333, 3333]
    assert quotas([0.11114, 0.55557, 0.33329]) == [1111, 5556, 3333]
    assert quotas([1.0]) == [1]


@quick
@given(weights=WEIGHTS, period=st.integers(2, 300), first=st.integers(0, 1000))
def test_every_stretch_has_each_data_sets_share_and_every_period_its_quota(weights, period, first):
    order = mix(shares_of(weights), period)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "PERIOD", period)
        quota = np.array(quotas(shares_of(weights)))
    source, _ = order.sources(0, 3 * period)
    given_so_far = np.eye(len(weights))[source].cumsum(axis=0)
    assert (np.abs(given_so_far - np.outer(np.arange(1, 3 * period + 1), quota / period)) < 1).all()
    stretch, _ = order.sources(first, period)
    assert np.bincount(stretch, minlength=len(weights)).tolist() == quota.tolist()


@quick
@given(weights=WEIGHTS, period=st.integers(2, 60), cuts=st.lists(st.integers(0, 1000), max_size=5))
def test_each_data_set_counts_its_own_sequences(weights, period, cuts):
    order = mix(shares_of(weights), period)
    pieces = [order.sources(first, size) for first, size in cut_into(4 * period, cuts)]
    source, own = (np.concatenate(column) for column in zip(*pieces))
    for i in range(len(weights)):
        assert own[source == i].tolist() == list(range((source == i).sum()))


def test_the_pattern_worked_by_hand():
    """Of four places three are a's: it is behind by 3/4, 1/2, 1/4, 1 before them, and b by 1/4, 1/2, 3/4, 0."""
    source, own = mix([0.75, 0.25], period=4).sources(0, 8)
    assert source.tolist() == [0, 0, 1, 0] * 2
    assert own.tolist() == [0, 1, 0, 2, 3, 4, 1, 5]


def test_a_mixed_batch_is_made_of_the_data_sets_own_rows():
    order = mix([0.5, 0.3, 0.2], period=10)
    x, y, *_ = order.batch(3, 40)
    source, own = order.sources(3, 40)
    assert set(source) == {0, 1, 2}
    for i, q, inputs, targets in zip(source, own, x, y):
        row = order.orders[i].rows(int(q), 1)[0]
        assert inputs.tolist() == row[:-1].tolist()
        assert targets.tolist() == row[1:].tolist()
        assert set(row // 1000) == {i}


@quick
@given(weights=WEIGHTS, world_size=st.sampled_from([1, 2, 3, 4, 8]), batch_size=st.integers(1, 30),
       step=st.integers(0, 20))
def test_a_step_of_a_mixture_is_the_same_on_any_number_of_ranks(weights, world_size, batch_size, step):
    order = mix(shares_of(weights), period=50)
    plan = plan_batches(DataConfig(batch_size=batch_size, total_batch_size=24 * 8), {}, 8, world_size)
    parts = [order.batch(plan.first_seq(24 * step, rank), plan.seqs_per_rank) for rank in range(world_size)]
    for whole, read in zip(order.batch(24 * step, 24)[:2], zip(*parts)):
        assert np.array_equal(np.concatenate(read), whole)


def test_a_mixture_of_one_is_the_plain_order():
    order = TrainOrder(split_of([300, 150]), 8, 1337)
    x, y, *_ = MixedOrder([order], [1.0]).batch(17, 200)
    assert np.array_equal(x, order.rows(17, 200)[:, :-1])
    assert np.array_equal(y, order.rows(17, 200)[:, 1:])


def test_the_order_of_a_mixture_is_that_of_earlier_versions():
    """As for one data set: change these numbers only knowingly."""
    order = mix([0.7, 0.3])
    assert order.sources(0, 10)[0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert order.sources(10_000, 10)[0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert order.sources(9_997, 6)[1].tolist() == [6998, 2999, 6999, 7000, 3000, 7001]
