"""tokenizer.py against tiktoken, transformers, and the text itself."""

import json
import pickle
import random
from pathlib import Path

import hypothesis
import pytest
import requests
import tiktoken
import transformers
from corpus import POINTER
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, processors

from flatgpt.data import hf_tokenizer
from flatgpt.data.tokenizer import (
    EOT,
    GPT2_FILES,
    KINDS,
    WORD_CHARACTERS,
    GPT2Tokenizer,
    Tokenizer,
    cut_words,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)

quick = hypothesis.settings(max_examples=50, deadline=None,
                            suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
TEXT = ("It was the best of times, it wasn't the worst. Stop ! Do n't , he 's .\n\n  \tspend £3.14 on a naïve café\r\n"
        "日本語 and 中文, Ελλάδα, עברית, 🎉🎊 👩‍👩‍👧 \u0000 <|endoftext|> the end of the text \n") * 3
EDGES = ("", " ", "\n", "  lead", "trail \n\n", "a\r\nb", "don't", "the  the", "1234567", "🎉", "naïve 日本語")
LIKE_GPT2 = train_bpe([TEXT * 20], 400)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2_tokenizer")
    return make_tokenizer(request.param, [TEXT], 400)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(tokenizer.kind)
    tokenizer.save(folder, model_max_length=64)
    return folder


@pytest.fixture(scope="module")
def theirs(saved):
    (saved / "config.json").write_text('{"model_type": "gpt2"}')  # as in a checkpoint, whatever the tokenizer
    return transformers.AutoTokenizer.from_pretrained(saved)


def texts(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Texts that the tokenizer knows."""
    return st.text(sorted(set(TEXT))) if tokenizer.kind == "char" else st.text() | st.sampled_from(EDGES)


@quick
@given(st.data())
def test_decoded_text_is_the_encoded_text(tokenizer, data):
    text = data.draw(texts(tokenizer))
    ids = tokenizer.encode(text)
    assert ids.dtype == "uint32"
    assert (ids < tokenizer.vocab_size).all()
    assert tokenizer.decode(ids) == text


@quick
@given(st.data())
def test_the_bytes_that_tokens_stand_for_add_up_to_the_texts(tokenizer, data):
    text, lengths = data.draw(texts(tokenizer)), tokenizer.byte_lengths()
    assert sum(lengths[i] for i in tokenizer.encode(text).tolist()) == len(text.encode())
    assert len(lengths) == tokenizer.vocab_size
    assert lengths.get(tokenizer.eot_id, 0) == 0
    assert tokenizer.opening() == []


def test_bytes_of_a_tokenizer_like_llamas():
    """Blanks spelled "▁", bytes spelled out, special tokens, and one of its own ahead of every text."""
    hf = HFTokenizer(models.BPE(vocab={"a": 0, "▁": 1, "▁a": 2, "<0xC3>": 3, "<0xA9>": 4}, merges=[("▁", "a")],
                                byte_fallback=True))
    hf.normalizer = normalizers.Replace(" ", "▁")
    hf.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    hf.add_special_tokens(["<s>"])
    hf.add_tokens(["né"])
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    tokenizer = Tokenizer(hf)
    assert tokenizer.byte_lengths() == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1, 5: 0, 6: 3}
    assert tokenizer.encode("a aé").tolist() == [0, 2, 3, 4]
    assert tokenizer.opening() == [5]


def test_text_that_spells_end_of_text_is_text(tokenizer):
    text = f"the{EOT}end{EOT}"
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == text
    if tokenizer.kind == "char":
        assert tokenizer.eot_id is None
        assert tokenizer.encode_prompt(text).tolist() == ids
    else:
        prompt = tokenizer.encode_prompt(text).tolist()
        end = [tokenizer.eot_id]
        assert prompt == [*tokenizer.encode("the"), *end, *tokenizer.encode("end"), *end]
        assert tokenizer.decode(prompt) == text


# Saved


@quick
@given(st.data())
def test_transformers_gives_the_same_ids_and_text(tokenizer, theirs, data):
    drawn = data.draw(texts(tokenizer))
    for text in (drawn, drawn + TEXT):
        text = text.replace(EOT, "")  # transformers takes it for the end of text
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids) == text


def test_transformers_knows_the_end_of_text_and_the_sizes(tokenizer, theirs):
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot_id
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.model_max_length == 64
    if tokenizer.eot_id is not None:
        assert theirs(EOT)["input_ids"] == [tokenizer.eot_id]


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, saved):
    loaded = load_tokenizer(saved)
    assert (loaded.eot_id, loaded.vocab_size) == (tokenizer.eot_id, tokenizer.vocab_size)
    assert loaded.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()  # TEXT spells the end of text
    assert loaded.encode_prompt(TEXT).tolist() == tokenizer.encode_prompt(TEXT).tolist()
    assert loaded.decode(loaded.encode_prompt(TEXT)) == TEXT
    if tokenizer.kind in ("char", "byte"):
        assert type(loaded) is type(tokenizer)


def test_gpt2s_own_file_which_leaves_the_models_type_out_loads(gpt2_tokenizer, tmp_path):
    gpt2_tokenizer.save(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    del file["model"]["type"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert load_tokenizer(tmp_path).encode(TEXT).tolist() == gpt2_tokenizer.encode(TEXT).tolist()


def test_a_bpe_without_merges_is_not_taken_for_bytes(tmp_path):
    bpe = train_bpe([TEXT], 257)
    bpe.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("ab").tolist() == bpe.encode("ab").tolist() != [97, 98]
    assert load_tokenizer(tmp_path).eot_id == bpe.eot_id == 0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "Nonsense"}}', '{"model": null}',
                                     '{"model": {"type": "BPE"}}', '{"model": {"type": "WordLevel"}}'])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


# Streamed


def test_streamed_pieces_cut_no_character_and_join_to_the_text(tokenizer):
    ids = iter(tokenizer.encode(TEXT).tolist())
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == TEXT
    assert len(pieces) > len(TEXT) / 10  # as it is written, not all at the end


@quick
@given(st.data())
def test_streams_of_tokens_that_span_characters_join_to_the_text(tokenizer, data):
    text = data.draw(texts(tokenizer) if tokenizer.kind == "char" else st.text("頚騚日\ufffdé🎉a "))
    assert "".join(tokenizer.decode_stream(tokenizer.encode(text).tolist())) == text


def test_whole_characters_are_streamed_at_once(tokenizer):
    ids = tokenizer.encode("the end of the text").tolist()
    stream = tokenizer.decode_stream(iter(ids))
    assert [next(stream) for _ in ids] == [tokenizer.decode([i]) for i in ids]


def test_bytes_that_are_no_text_do_not_stop_the_stream():
    ids = iter(b"ab" + b"\x80" * 99 + b"cd")
    stream = make_tokenizer("byte", [], 0).decode_stream(ids)
    assert [next(stream) for _ in range(3)][:2] == ["a", "b"]
    rest = list(ids)
    assert len(rest) > 90  # what follows is not waited for
    assert "".join(make_tokenizer("byte", [], 0).decode_stream(rest)).endswith("\ufffdcd")


def test_a_character_that_was_not_finished_is_not_lost():
    assert "".join(make_tokenizer("byte", [], 0).decode_stream(b"a\xf0\x9f")) == "a\ufffd"


# Kinds


@quick
@given(st.text() | st.sampled_from([TEXT, *EDGES]))
def test_gpt2_ids_are_tiktokens(gpt2_tokenizer, text):
    wanted = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert gpt2_tokenizer.encode(text).tolist() == wanted
    assert gpt2_tokenizer.hf.encode(text).ids == wanted  # the merges that tokenizer.json will hold
    assert (gpt2_tokenizer.vocab_size, gpt2_tokenizer.eot_id) == (50257, 50256)


def test_gpt2_knows_each_kind_of_character_as_tiktoken_does(gpt2_tokenizer):
    """Letters, digits, blanks and signs, alone, in a row, and behind and before each other."""
    points = [*range(0xd800), *range(0xe000, 0x3fffe, 7), *range(0x40000, 0x110000, 997)]
    text = "".join(f"a{chr(c)}b {chr(c)} {chr(c)}{chr(c)}1'{chr(c)}  {chr(c)}\n" for c in points)
    assert gpt2_tokenizer.encode(text).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)


@pytest.mark.parametrize("change", [
    lambda model: {}, lambda model: {"merges": random.Random(0).sample(model["merges"], len(model["merges"]))},
    lambda model: {"merges": model["merges"][::3]}, lambda model: {"merges": []},
    lambda model: {"vocab": {token: 3 * i for token, i in model["vocab"].items()}}])
@quick
@given(text=st.text() | st.sampled_from([TEXT, *EDGES]) | st.text("ab \n'\u2028é", max_size=40))
def test_a_bpe_like_gpt2s_gives_the_ids_that_tokenizers_gives(change, text):
    settings = json.loads(LIKE_GPT2.hf.to_str())
    settings["model"] |= change(settings["model"])
    tokenizer = Tokenizer(HFTokenizer.from_str(json.dumps(settings)), 0)
    assert tokenizer._is_like_gpt2
    assert tokenizer.encode(text).tolist() == tokenizer.hf.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("change", [{"ignore_merges": True}, {"byte_fallback": True}, {"end_of_word_suffix": "x"}])
def test_a_bpe_of_another_kind_is_encoded_by_tokenizers(change):
    settings = json.loads(LIKE_GPT2.hf.to_str())
    settings["model"] |= change
    assert not Tokenizer(HFTokenizer.from_str(json.dumps(settings)), 0)._is_like_gpt2


def test_the_fast_encoder_does_not_keep_every_word_for_ever(monkeypatch):
    monkeypatch.setattr(hf_tokenizer, "REMEMBERED_CHARACTERS", 2 * len(TEXT))
    tokenizer, encoders = Tokenizer(LIKE_GPT2.hf, 0), set()
    for _ in range(5):
        assert tokenizer.encode(TEXT).tolist() == LIKE_GPT2.hf.encode(TEXT).ids
        encoders.add(tokenizer._gigatoken)
    assert len(encoders) == 3


@given(st.text())
def test_byte_ids_are_the_utf8_bytes(text):
    assert make_tokenizer("byte", [], 0).encode(text).tolist() == list(text.encode())


@given(st.lists(st.text(), min_size=1))
def test_char_ids_count_the_sorted_characters(documents):
    text = "".join(documents)
    characters = sorted(set(text))
    tokenizer = make_tokenizer("char", documents, 0)
    assert tokenizer.vocab_size == len(characters)
    assert tokenizer.encode(text).tolist() == [characters.index(c) for c in text]


def test_a_character_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="no token for 'c' 'é': its 2 characters"):
        make_tokenizer("char", ["ab"], 0).encode("abécab")


def test_bpe_ids_are_end_of_text_then_bytes_then_merges_as_learned():
    tokenizer = train_bpe(["xyxyxyxy"] * 9, 259)
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (0, 259)
    assert tokenizer.encode("xyxy").tolist() == [258]
    assert tokenizer.encode("xy").tolist() == [257]
    single_bytes = make_tokenizer("byte", [], 0).hf.get_vocab().keys() - {EOT}
    assert {tokenizer.hf.token_to_id(token) for token in single_bytes} == set(range(1, 257))


@pytest.mark.parametrize("vocab_size", [257, 300, 100000])
def test_a_bpe_vocabulary_is_no_larger_than_asked_for(vocab_size):
    learned = train_bpe([TEXT], vocab_size).vocab_size
    assert learned == vocab_size if vocab_size <= 300 else 300 < learned < vocab_size


def test_a_bpe_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=256 .* 257"):
        train_bpe([TEXT], 256)


def test_bpe_training_is_deterministic(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        train_bpe([TEXT, *EDGES], 400).save(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


@pytest.mark.parametrize("word", ["ab", "aé", "12", "-=", "_", "一二三丁", " \t", "\n", "ǅ", "x²"])
def test_a_word_without_end_is_cut_for_the_training_and_characters_stay_whole(word):
    for text in (word * 9000, f"to be, {word * 9000} or not\n", "a " * 999 + word * 5000):
        pieces = list(cut_words(text))
        assert "".join(pieces) == text
        words = [end - begin for piece in pieces
                 for _, (begin, end) in train_bpe([], 257).hf.pre_tokenizer.pre_tokenize_str(piece)]
        assert len(pieces) > 2
        assert max(words) <= 2 * WORD_CHARACTERS


@pytest.mark.parametrize("text", ["", "a" * 1999, "to be or not to be, " * 2000, "一二，三丁。" * 3000, "ab12" * 5000,
                                  "int x = 0;\n    " * 1000, f"{'=' * 1500}\n" * 9])
def test_a_text_of_words_is_left_whole_for_the_training(text):
    assert list(cut_words(text)) == [text]


def test_gpt2_comes_through_a_million_blanks(gpt2_tokenizer):
    for blank in (" ", "\n", "\u3000"):
        text = f"to be{blank * 1_000_100}or not"
        assert gpt2_tokenizer.decode(gpt2_tokenizer.encode(text)) == text
    few = f"to be{' ' * 3000}or not"
    assert gpt2_tokenizer.encode(few).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(few)


def test_gpt2s_missing_files_are_named_when_there_is_no_network(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(OSError, match="TIKTOKEN_CACHE_DIR") as caught:
        GPT2Tokenizer()
    for url, (name, _) in GPT2_FILES.items():
        assert f"{url} as {name}" in str(caught.value)


def test_vocab_and_merges_of_an_older_gpt2_give_the_ids_that_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    learned = train_bpe([TEXT * 20], 300)
    description = json.loads(learned.hf.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(description["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in description["merges"]))
    ours, theirs = load_tokenizer(tmp_path), transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    assert ours.eot_id == theirs.eos_token_id == 0
    for text in (TEXT.replace(EOT, ""), " the  end", EOT[:5], "é\n\n"):
        assert ours.encode(text).tolist() == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == text
    for name, settings, kind in (("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}, "Qwen2Tokenizer"),
                                 ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
                                  "GPT2Tokenizer with add_bos_token"),
                                 ("config.json", {"model_type": "qwen2"}, "qwen2")):
        (tmp_path / name).write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=rf"this is {kind}: transformers converts it"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
    for content, message in ((b"a b c d\n", r"merges\.txt are not a tokenizer"), (POINTER, "a Git LFS pointer")):
        (tmp_path / "merges.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"has no merges\.txt"):
        load_tokenizer(tmp_path)


def test_a_data_set_of_nanogpts_is_a_tokenizer(tmp_path):
    characters = ["b", "a", " "]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": dict(enumerate(characters)),
                                                      "stoi": {c: i for i, c in enumerate(characters)}}))
    assert make_tokenizer(str(tmp_path), [], 0).encode("a b").tolist() == [1, 2, 0]


def test_a_tokenizer_comes_from_a_folder_a_run_or_the_hubs_cache(tmp_path, monkeypatch):
    learned = train_bpe([TEXT * 20], 300)
    run = tmp_path / "run" / "checkpoints" / "latest"
    hub = tmp_path / "cache" / "models--owner--name"
    for folder in (tmp_path / "folder", run, hub / "snapshots" / "abc"):
        folder.mkdir(parents=True)
        learned.save(folder)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in (f"{tmp_path}/folder", f"{tmp_path}/run", "owner/name"):
        assert make_tokenizer(source, [], 0).hf.get_vocab() == learned.hf.get_vocab()
    with pytest.raises(OSError, match="could not get owner/other from the hub"):
        make_tokenizer("owner/other", [], 0)


def test_an_empty_prompt_starts_from_the_end_of_text_a_newline_or_token_0():
    for kind, text, start in (("byte", "", 256), ("bpe", "ab", 0), ("char", "b\na", 0), ("char", "\tb\na", 1),
                              ("char", "ab", 0)):
        assert make_tokenizer(kind, [text], 300).start_id == start


# Long texts, in pieces


WORDS = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=5) | st.sampled_from(
    ["don't", "'s", "1234", "é", "🎉", "...", "日本", "ſ", "<|e"])
GAPS = st.sampled_from([" ", "\n", "  ", "\n\n", " \n", "\n  ", " \t", "\n\u00a0 ", " \u3000", "   \n"])


@pytest.fixture(params=["gpt2", "bpe"])
def made(request) -> hf_tokenizer.Tokenizer:
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2_tokenizer")
    return make_tokenizer("bpe", ["the words of a text, and  spaces\n\n in  between; don't 1234 日本 🎉\n"] * 3, 400)


@quick
@given(text=st.lists(st.tuples(WORDS, GAPS), min_size=20).map(lambda pairs: "".join(map("".join, pairs))))
def test_a_text_encoded_in_pieces_has_the_ids_of_the_whole(made, text):
    whole = made.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_tokenizer, "PIECE_CHARACTERS", 16)  # a word and a gap are shorter
        pieces = list(hf_tokenizer.cut_text(text))
        assert len(pieces) >= len(text) / 32
        assert made.encode(text).tolist() == whole.tolist()
    assert "".join(pieces) == text
    assert made.decode(whole) == text


@quick
@given(text=st.text("ab \n\t", max_size=200), size=st.integers(1, 20))
def test_pieces_are_neither_long_nor_lost(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_tokenizer, "PIECE_CHARACTERS", size)
        pieces = list(hf_tokenizer.cut_text(text))
    assert "".join(pieces) == text
    assert all(size <= len(piece) <= 2 * size for piece in pieces[:-1])
    assert len(pieces[-1]) <= 2 * size
    assert all(pieces) or text == ""


def test_a_text_of_a_single_word_is_cut_all_the_same(made, monkeypatch):
    monkeypatch.setattr(hf_tokenizer, "PIECE_CHARACTERS", 10)
    assert made.decode(made.encode("x" * 1005)) == "x" * 1005
