"""sampling.py against transformers' logits processors and naive filters; the draw; the table of candidates."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_weights import make_hub_cache
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from flatgpt.models.sampling import Sampler, Stage, draw, table
from model import GPT

NOTHING = torch.empty(1, 0, dtype=torch.long)  # no token was seen


def stages_of(logits: list | torch.Tensor, seen: torch.Tensor = NOTHING, **options) -> list[Stage]:
    return list(Sampler(**options).stages(torch.as_tensor(logits), seen))


def probs_of(logits: list | torch.Tensor, seen: torch.Tensor = NOTHING, **options) -> torch.Tensor:
    return stages_of(logits, seen, **options)[-1].probs()


def processors(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None,
               repetition_penalty: float) -> LogitsProcessorList:
    """Those that transformers' generate makes of these options, in its order."""
    made = [logits_process.RepetitionPenaltyLogitsProcessor(repetition_penalty),
            logits_process.TemperatureLogitsWarper(temperature)]
    made += [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    made += [logits_process.TopPLogitsWarper(top_p)] if top_p else []
    made += [logits_process.MinPLogitsWarper(min_p)] if min_p else []
    return LogitsProcessorList(made)


def is_at_a_border(logits: torch.Tensor, seen: torch.Tensor, options: dict) -> bool:
    """Whether rounding decides which tokens stay: a mass is close to top_p, or a ratio to min_p."""
    wide = logits.double()
    before_top_p = processors(**options | {"top_p": None, "min_p": None})(seen, wide).softmax(1)
    ordered = before_top_p.sort(descending=True).values
    before = ordered.cumsum(1) - ordered
    ratio = ordered / ordered[:, :1]
    return any(limit and ((values - limit).abs() < 1e-5).any()
               for values, limit in ((before, options["top_p"]), (ratio, options["min_p"])))


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.1, 1.0, 5.0]), temperature=st.floats(0.05, 5.0),
       top_k=st.none() | st.integers(1, 70), top_p=st.none() | st.floats(0.01, 1.0),
       min_p=st.none() | st.floats(0.001, 1.0), repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
       num_seen=st.integers(1, 90))
def test_filters_leave_what_transformers_processors_leave(seed, spread, num_seen, **options):
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 60, generator=draws) * spread
    seen = torch.randint(0, 60, (3, num_seen), generator=draws)
    assume(not is_at_a_border(logits, seen, options))
    wanted = processors(**options)(seen, logits).softmax(1)
    probs = probs_of(logits, seen, **options)
    assert torch.equal(probs == 0, wanted == 0)
    torch.testing.assert_close(probs, wanted, atol=1e-6, rtol=1e-4)


def test_a_penalised_greedy_continuation_is_transformers(tmp_path):
    theirs = make_hub_cache(tmp_path, vocab_size=50)
    ours = GPT.from_pretrained(str(next(tmp_path.rglob("config.json")).parent))
    idx = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    wanted = theirs.generate(idx, max_new_tokens=25, do_sample=False, repetition_penalty=1.5, pad_token_id=0,
                             eos_token_id=None)
    assert torch.equal(ours.generate(idx, 25, temperature=0, repetition_penalty=1.5), wanted)
    assert not torch.equal(ours.generate(idx, 25, temperature=0), wanted)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 0.7, 1.0]), top_k=st.none() | st.integers(1, 30),
       top_p=st.none() | st.floats(0.1, 1.0), min_p=st.none() | st.floats(0.01, 1.0),
       repetition_penalty=st.sampled_from([1.0, 1.5]))
def test_there_is_a_stage_for_each_filter_that_is_on_and_none_brings_back_what_is_gone(seed, **options):
    draws = torch.Generator().manual_seed(seed)
    stages = stages_of(torch.randn(2, 30, generator=draws), torch.randint(0, 30, (2, 5), generator=draws), **options)
    off = {"temperature": 1.0, "top_k": 30, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    filters = ["temperature", "top_k", "top_p", "min_p"][:1 if options["temperature"] == 0 else None]
    assert [stage.name for stage in stages] == ["model", *(
        name for name in ["repetition_penalty", *filters] if options[name] not in (None, off[name]))]
    probs = torch.stack([stage.probs() for stage in stages])
    torch.testing.assert_close(probs.sum(dim=2), torch.ones(len(stages), 2))
    assert not ((probs[1:] > 0) & (probs[:-1] == 0)).any()


def test_drawn_tokens_follow_the_probabilities_and_never_one_of_probability_0():
    probs = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]])
    drawn = draw(probs.expand(100_000, 6), torch.Generator().manual_seed(0))
    assert drawn.shape == (100_000, 1)
    shares = torch.bincount(drawn.flatten(), minlength=6) / 100_000
    assert torch.equal(shares == 0, probs[0] == 0)
    torch.testing.assert_close(shares, probs[0], atol=0.01, rtol=0)
    certain = torch.zeros(1, 6).index_fill(1, torch.tensor([5]), 1.0)
    assert draw(certain, torch.Generator()).item() == 5


@pytest.mark.parametrize("largest", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers_draw_what_has_probability(monkeypatch, largest):
    monkeypatch.setattr("torch.rand", lambda *shape, dtype, **options: torch.full(shape, largest, dtype=dtype))
    probs = torch.tensor([[0.0, 0.1, 0.7, 0.2, 0.0]])
    assert draw(probs).item() == (1 if largest == 0 else 3)


def test_a_draw_takes_one_random_number_whatever_the_filters():
    logits, seen = torch.randn(4, 100), torch.randint(0, 100, (4, 3))
    plain = torch.Generator().manual_seed(1)
    torch.rand(4, 1, dtype=torch.float64, generator=plain)
    for options in ({}, {"temperature": 0}, {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 2.0}):
        draws = torch.Generator().manual_seed(1)
        Sampler(**options, generator=draws)(logits, seen)
        assert torch.equal(draws.get_state(), plain.get_state())


LOGITS = st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=40)


@settings(deadline=None, max_examples=150)
@example(logits=[0.0, 1.0, 4.2190857335113324e-26], temperature=0.5, top_k=2, top_p=None)
@given(logits=LOGITS, temperature=st.sampled_from([1e-4, 0.5, 1.0, 3.0]), top_k=st.none() | st.integers(1, 45),
       top_p=st.none() | st.floats(0.01, 1.0))
def test_filters_keep_exactly_the_right_set_and_sum_to_one(logits, temperature, top_k, top_p):
    probs = probs_of([logits], temperature=temperature, top_k=top_k, top_p=top_p)[0]
    scaled = torch.tensor(logits) / temperature
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    kept, mass = [], 0.0
    p = dict(zip(order, scaled[order].softmax(0).tolist()))
    for i in order:
        if top_p is not None and mass >= top_p - 1e-6 and kept:
            break
        kept.append(i)
        mass += p[i]
    wanted = torch.zeros(len(logits))
    wanted[kept] = scaled[kept].softmax(0)
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    if top_p is None or abs(mass - top_p) > 1e-5:  # at the very border rounding decides
        extra = [i for i in probs.nonzero().flatten().tolist() if i not in kept]
        assert all(p[i] < 1e-5 for i in extra)
        torch.testing.assert_close(probs, wanted, atol=2e-5, rtol=1e-4)


def test_filters_break_ties_by_the_lower_id_and_zero_temperature_is_greedy():
    tied = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    assert probs_of(tied, top_k=2).tolist() == [[0, 0.5, 0.5, 0]]
    assert probs_of(tied, top_p=0.25).tolist() == [[0, 1, 0, 0]]
    assert probs_of(tied, temperature=0).tolist() == [[0, 1, 0, 0]]
    nearly_tied = torch.tensor([[0.0, 1.0, 4e-26]])
    assert probs_of(nearly_tied, top_k=2).nonzero()[:, 1].tolist() == [1, 2]


    assert probs_of(tied, min_p=0.0).tolist() == probs_of(tied).tolist()
    assert probs_of(tied, min_p=1.0).tolist() == [[0, *[pytest.approx(1 / 3)] * 3]]  # a share alone: ties stay


@pytest.mark.parametrize("temperature", [1e-300, 1e-37, 1e-5])
def test_a_tiny_temperature_is_greedy_and_overflows_nothing(temperature):
    logits = torch.tensor([[3e38, -3e38, 3e38, 0.0], [1.0, 1.5, -1.0, 1.25]])
    probs = probs_of(logits, temperature=temperature, top_p=0.9, min_p=0.1)
    assert probs.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize(("penalty", "wanted"), [(1e-300, [0, 0, 1]), (1e-38, [0, 0, 1]), (1e38, [0, 0.5, 0.5]),
                                                 (1e300, [0, 0.5, 0.5])])
def test_the_largest_and_smallest_penalties_overflow_nothing(penalty, wanted):
    logits, seen = torch.tensor([[-200.0, 0.0, 300.0]]), torch.tensor([[0, 1, 2, 2]])
    for filters in ({}, {"top_k": 2, "top_p": 0.9}):
        assert probs_of(logits, seen, repetition_penalty=penalty, **filters).tolist() == [wanted]


@pytest.mark.parametrize(("key", "values"), [
    ("temperature", [-1, math.inf, math.nan]), ("top_k", [-1, 0]), ("top_p", [-1, 0, 1.5, math.nan]),
    ("min_p", [-1, 1.5, math.nan]), ("repetition_penalty", [-1, 0, math.inf, math.nan])])
def test_values_without_a_meaning_are_refused_by_name(key, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{key}={value} must be"):
            Sampler(**{key: value})


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match="temperature=-1 must be 0 or more; min_p=2 must be from 0"):
        Sampler(temperature=-1, min_p=2)


def test_the_table_has_a_row_for_each_candidate_and_a_column_for_each_stage():
    logits = [[math.log(share) for share in (0.4, 0.3, 0.2, 0.06, 0.04)]]
    stages = stages_of(logits, top_k=3, min_p=0.7)
    assert table(stages, torch.tensor([[1]]), 2, "abcde".__getitem__).splitlines() == [
        "            model    top_k    min_p",
        "  a        40.00%   44.44%   57.14%",
        "> b        30.00%   33.33%   42.86%",
        "  others   30.00%   22.22%        -"]


def test_the_table_shows_what_was_drawn_from_below_and_what_a_penalty_lifts():
    logits = [[math.log(share) for share in (0.4, 0.3, 0.2, 0.06, 0.04)]]
    stages = stages_of(logits, torch.tensor([[0, 1]]), repetition_penalty=20.0)
    lines = table(stages, torch.tensor([[4]]), 2, "abcde".__getitem__).splitlines()
    assert [line[:3] for line in lines[1:]] == ["  a", "  b", "  c", "  d", "> e", "  o"]
    every = table(stages, torch.tensor([[0]]), 100, "abcde".__getitem__).splitlines()
    assert len(every) == 1 + 5 + 1
    assert every[-1].split() == ["others", "-", "-"]
