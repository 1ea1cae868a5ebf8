"""generate.py against the definition of generation: a window that is read whole for every token."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import make_model

from flatgpt.models.generate import Decoder
from flatgpt.models.sampling import Sampler
from model import GPT, Block


def naive_greedy(model: GPT, idx: torch.Tensor, count: int) -> torch.Tensor:
    """The definition: a window that starts as the prompt's last block_size tokens; when it is full, its last half."""
    limit, window = model.config.block_size, idx[:, -model.config.block_size:]
    for _ in range(count):
        token = model(window)[0][:, -1].argmax(1, keepdim=True)
        idx, window = torch.cat([idx, token], 1), torch.cat([window, token], 1)
        if window.size(1) > limit:
            window = window[:, -(limit // 2):]
    return idx


@pytest.mark.parametrize("prompt_tokens", [1, 5, 16, 40])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_the_definition_past_block_size_too(prompt_tokens, use_cache):
    model = make_model()
    idx = torch.randint(37, (3, prompt_tokens))
    out = model.generate(idx, 45, temperature=0, use_cache=use_cache)
    assert torch.equal(out, naive_greedy(model, idx, 45))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), prompt_tokens=st.integers(1, 20), top_k=st.sampled_from([None, 3, 40]),
       top_p=st.sampled_from([None, 0.7]))
def test_cached_and_uncached_sampling_draw_the_same_tokens(seed, prompt_tokens, top_k, top_p):
    model = make_model(seed % 3)
    idx = torch.randint(37, (2, prompt_tokens))
    with_cache, without = (model.generate(idx, 30, 0.9, top_k, use_cache, top_p=top_p,
                                          generator=torch.Generator().manual_seed(seed)) for use_cache in (True, False))
    assert torch.equal(with_cache, without)


WINDOWS = {"pos": "rope", "n_layer": 3, "sliding_window": 5, "window_pattern": "SL"}


def test_a_layer_with_a_sliding_window_keeps_no_more_than_it_sees():
    cache = make_model(**WINDOWS).make_cache(2, 45)
    assert [tuple(kept.shape) for kept in cache.k] == [(2, 2, slots, 4) for slots in (5, 45, 5)]
    short = make_model(**WINDOWS).make_cache(2, 4)
    assert [kept.size(2) for kept in short.v] == [4, 4, 4]


@pytest.mark.parametrize("parts", [[12], [1] * 12, [3, 1, 1, 7], [7, 4, 1]])
@pytest.mark.parametrize("pos", ["rope", "alibi"])
def test_a_prompt_read_in_parts_past_the_window_gives_the_same_output(parts, pos):
    model = make_model(**WINDOWS | {"pos": pos}).eval()
    idx = torch.randint(37, (2, 12))
    cache = model.make_cache(2, 20)
    with torch.no_grad():
        read = [model.hidden_states(part, cache) for part in idx.split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(read, 1), model.hidden_states(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_prompt_is_continued_again_though_new_tokens_took_its_slots(monkeypatch, fixed_shapes):
    monkeypatch.setattr("torch.compile", lambda function: function)
    model, idx = make_model(**WINDOWS), torch.randint(37, (2, 7))
    model.compile_decoding = fixed_shapes
    cache = model.make_cache(2, 7 + 30)
    expected = torch.stack(list(model.stream(idx, 30, seeded(), use_cache=False)), dim=1)
    for _ in range(3):
        assert torch.equal(torch.stack(list(model.stream(idx, 30, seeded(), cache=cache)), dim=1), expected)


def seeded() -> Sampler:
    return Sampler(generator=torch.Generator().manual_seed(1))


def test_a_prompt_is_read_once_however_often_it_is_continued(monkeypatch):
    model, read = make_model(), []
    hidden = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda idx, cache=None: read.append(idx.size(1)) or hidden(idx, cache))
    idx = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    cache = model.make_cache(2, 5 + 48)
    for new_tokens, reads in ((6, [5, 1, 1, 1, 1, 1]), (6, [1, 1, 1, 1, 1])):  # then as much as was said before
        expected = torch.stack(list(model.stream(idx, new_tokens, seeded())), dim=1)
        read.clear()
        tokens = model.stream(idx, new_tokens, seeded(), cache=cache)
        assert torch.equal(torch.stack(list(tokens), dim=1), expected)
        assert read == reads
    far = 3 * model.config.block_size  # past the window the prompt's place is taken, and it has to be read again
    for _ in range(2):
        expected = torch.stack(list(model.stream(idx, far, seeded())), dim=1)
        tokens = model.stream(idx, far, seeded(), cache=cache)
        assert torch.equal(torch.stack(list(tokens), dim=1), expected)


def test_stream_yields_what_generate_returns_and_leaves_the_mode_alone():
    model = make_model(dropout=0.5).train()
    idx = torch.randint(37, (2, 4))
    streamed = torch.stack(list(model.stream(idx, 9, Sampler(temperature=0))), dim=1)
    assert torch.equal(torch.cat([idx, streamed], 1), model.generate(idx, 9, temperature=0))
    assert model.training


def test_a_prompt_read_in_parts_through_the_cache_gives_the_same_output():
    model = make_model().eval()
    idx = torch.randint(37, (2, 12))
    cache = model.make_cache(2, 12)
    with torch.no_grad():
        parts = [model.hidden_states(part, cache) for part in idx.split([5, 4, 3], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden_states(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt_tokens", [1, 12, 40])
def test_decoding_with_fixed_shapes_gives_the_same_tokens_past_block_size_too(monkeypatch, prompt_tokens):
    compiled = []
    monkeypatch.setattr("torch.compile", lambda function: compiled.append(function) or function)
    model = make_model()
    idx = torch.randint(37, (2, prompt_tokens))
    expected = model.generate(idx, 40, temperature=0)
    assert not compiled
    model.compile_decoding = True
    assert torch.equal(model.generate(idx, 40, temperature=0), expected)
    assert compiled == [Block.forward]


def test_decoding_goes_on_without_a_compiler(monkeypatch):
    def fail(*args):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch.compile", lambda function: fail)
    model, idx = make_model(), torch.randint(37, (1, 3))
    expected = model.generate(idx, 5, temperature=0)
    model.compile_decoding = True
    with pytest.warns(UserWarning, match="no compiler here"):
        assert torch.equal(model.generate(idx, 5, temperature=0), expected)


def test_a_cache_that_is_done_with_gives_its_memory_back_at_once(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function: function)
    model, idx = make_model(), torch.randint(37, (1, 3))
    model.compile_decoding = True
    gc.disable()
    try:
        cache = model.make_cache(1, 10)
        list(model.stream(idx, 5, Sampler(), cache=cache))
        assert cache.decoder is not None
        seen = weakref.ref(cache), weakref.ref(cache.decoder)
        del cache
        assert [thing() for thing in seen] == [None, None]
    finally:
        gc.enable()


def test_a_full_cache_takes_no_more():
    model = make_model().eval()
    cache = model.make_cache(1, 100)
    with torch.no_grad():
        model.hidden_states(torch.zeros(1, 15, dtype=torch.long), cache)
        decoder = Decoder(model, cache)
        decoder.step(torch.zeros(1, 1, dtype=torch.long))
        with pytest.raises(ValueError, match="the cache is full: it has room for 16 positions"):
            decoder.step(torch.zeros(1, 1, dtype=torch.long))


def test_generating_from_nothing_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        make_model().generate(torch.empty(1, 0, dtype=torch.long), 1)
