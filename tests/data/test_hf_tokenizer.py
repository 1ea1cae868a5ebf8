"""A zoo of tokenizers as other people make them, against transformers and against themselves."""

import itertools
import json
import string
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from flatgpt.data import hf_tokenizer
from flatgpt.data.hf_tokenizer import Tokenizer, UnknownText
from flatgpt.data.tokenizer import load_tokenizer

few = hypothesis.settings(max_examples=15, deadline=None,
                          suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
TEXTS = ["the words of a text, and the spaces in between; walking, talking and being there",
         "It wasn't the worst of times, he 's .\n\n It said: do n't 1234 567!\tnaïve café\r\n",
         "日本語 and Ελλάδα 🎉"] * 5
LETTERS = string.ascii_letters + string.digits + " .,!?'\n"
PIECES = ["the", " words", "walking", " .", " n't", " 's", "  ", "\n", " \n", "é", "日本", "🎉", "👩‍👩‍👧", "\ufffd",
          "ÿ", "x", "<s>", "</s>", "[SEP]", "[PAD]", "<0x41>", "▁", "##ing", "two words", " ' ", "\u0301", "\x01"]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


def template(before: str, after: str, hf: HFTokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=[
        (token, hf.token_to_id(token)) for token in (before, after) if token])


def byte_fallback(vocab: dict[str, int]) -> dict[str, int]:
    """A trained vocabulary behind three special tokens and the bytes, as SentencePiece numbers them."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    rest = sorted(vocab.keys() - {*first}, key=vocab.get)
    return {token: i for i, token in enumerate([*first, *rest])}


def llama(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> HFTokenizer:
    """Of Llama 1 and 2: SentencePiece's BPE, blanks spelled "▁", one put ahead of each text."""
    trained = HFTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    hf = HFTokenizer(models.BPE(byte_fallback(model["vocab"]), [tuple(rule) for rule in model["merges"]],
                                unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    hf.pre_tokenizer = pre_tokenizer
    if pre_tokenizer is None:
        hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    hf.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                    decoders.Strip(" ", 1, 0)])
    hf.add_special_tokens(["<unk>", "<s>", "</s>"])
    hf.post_processor = template("<s>", "", hf)
    return hf


def llama3() -> HFTokenizer:
    """Of Llama 3: bytes, words split by a pattern of its own, special tokens behind the vocabulary."""
    hf = HFTokenizer(models.BPE(ignore_merges=True))
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"),
                             "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    hf.add_special_tokens(["<s>", "</s>", "<|reserved|>"])
    hf.add_tokens([AddedToken("two words", normalized=False)])
    hf.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<s>", "", hf)])
    return hf


def gpt2_like() -> HFTokenizer:
    hf = HFTokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return hf


def with_prefix_space() -> HFTokenizer:
    hf = gpt2_like()
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return hf


def t5() -> HFTokenizer:
    """Unigram that puts </s> behind a text."""
    hf = HFTokenizer(models.Unigram())
    hf.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Metaspace()
    hf.train_from_iterator(TEXTS, trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    hf.post_processor = template("", "</s>", hf)
    return hf


def unigram_bytes() -> HFTokenizer:
    """Unigram over whole texts, which falls back to bytes."""
    scores = {**dict.fromkeys(byte_fallback({}), -9.0), **dict.fromkeys("▁abcdehinostw", -4.0),
              **dict.fromkeys(("▁the", "ing", "▁a"), -2.0)}
    hf = HFTokenizer(models.Unigram(list(scores.items()), unk_id=0, byte_fallback=True))
    hf.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    hf.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)])
    hf.add_special_tokens(["<unk>", "<s>", "</s>"])
    return hf


def bert() -> HFTokenizer:
    hf = HFTokenizer(models.WordPiece(unk_token="[UNK]"))
    hf.normalizer, hf.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    hf.decoder = decoders.WordPiece()
    hf.train_from_iterator(TEXTS, trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    hf.post_processor = template("[CLS]", "[SEP]", hf)
    return hf


def words() -> HFTokenizer:
    """WordLevel without a decoder: words are joined by blanks."""
    hf = HFTokenizer(models.WordLevel(unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False))
    return hf


def clip() -> HFTokenizer:
    """BPE that spells the ends of words."""
    hf = HFTokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    hf.normalizer, hf.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    hf.decoder = decoders.BPEDecoder("</w>")
    hf.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False))
    return hf


ZOO: dict[str, tuple[Callable[[], HFTokenizer], dict]] = {  # name -> what makes it, what its tokenizer_config.json says
    "llama": (llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                      "chat_template": "{{ bos_token }}"}),
    "llama_class": (llama, {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}),
    "llama_legacy_class": (llama, {"tokenizer_class": "LlamaTokenizer", "legacy": True, "pad_token": "<unk>"}),
    "metaspace": (lambda: llama(pre_tokenizers.Metaspace(prepend_scheme="first")), {"eos_token": "</s>"}),
    "llama3": (llama3, {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|reserved|>"],
                        "clean_up_tokenization_spaces": True}),
    "gpt2_like": (gpt2_like, {"eos_token": "</s>", "mask_token": {
        "__type": "AddedToken", "content": "the", "lstrip": False, "rstrip": False, "normalized": False,
        "single_word": False, "special": True}}),
    "gpt2_class": (gpt2_like, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "</s>",
                               "unk_token": "</s>", "add_prefix_space": True}),
    "prefix_space": (with_prefix_space, {"eos_token": "</s>", "split_special_tokens": True}),
    "t5": (t5, {"eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True,
                "extra_special_tokens": ["▁the"]}),
    "unigram_bytes": (unigram_bytes, {"bos_token": "<s>", "add_bos_token": True, "padding_side": "left"}),
    "bert": (bert, {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]", "mask_token": "[MASK]",
                    "unk_token": "[UNK]", "clean_up_tokenization_spaces": True}),
    "words": (words, {"unk_token": "<unk>", "pad_token": "[not there]", "clean_up_tokenization_spaces": True,
                      "chat_template": [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]}),
    "clip": (clip, {"eos_token": "</s>", "pad_token": "</s>", "image_token": "the</w>"})}


def write_folder(folder: Path, hf: HFTokenizer, config: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(hf.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}} | config
    if config["tokenizer_class"] != "PreTrainedTokenizerFast":
        del config["auto_map"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def auto(folder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@pytest.fixture(scope="module", params=ZOO)
def source(request, tmp_path_factory) -> Path:
    make, config = ZOO[request.param]
    return write_folder(tmp_path_factory.mktemp("zoo") / request.param, make(), config)


@pytest.fixture(scope="module")
def ours(source) -> Tokenizer:
    return load_tokenizer(source)


@pytest.fixture(scope="module")
def theirs(source) -> transformers.PreTrainedTokenizerFast:
    change_json(source / "tokenizer_config.json", lambda config: config.pop("auto_map", None))
    return auto(source)


@pytest.fixture(scope="module")
def again(ours, tmp_path_factory) -> transformers.PreTrainedTokenizerFast:
    """What transformers makes of what we save."""
    folder = tmp_path_factory.mktemp("saved")
    ours.save(folder, model_max_length=64)
    assert "auto_map" not in (folder / "tokenizer_config.json").read_text()
    return auto(folder)


def closing(tokenizer: transformers.PreTrainedTokenizerFast) -> list[int]:
    return {"t5": [tokenizer.eos_token_id], "bert": [tokenizer.sep_token_id]}.get(Path(tokenizer.name_or_path).name, [])


@few
@given(text=TEXT)
def test_ids_and_prompts_are_those_of_transformers(ours, theirs, again, text):
    plain = ours.encode(text).tolist()
    prompt = ours.encode_prompt(text).tolist()
    end = closing(theirs)
    for tokenizer in (theirs, again):
        assert plain == tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        wanted = tokenizer(text).input_ids
        assert wanted[len(wanted) - len(end):] == end
        assert prompt == (wanted[:len(wanted) - len(end)] or [ours.start_id])
    assert max(plain + prompt, default=0) < ours.vocab_size == max(theirs.get_vocab().values(), default=0) + 1 - (
        "[not there]" in theirs.get_vocab())


@few
@given(data=st.data())
def test_decoded_text_is_that_of_transformers_also_streamed_and_behind_a_prompt(ours, theirs, again, data):
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=40)
                    | st.lists(st.sampled_from(sorted(ours._byte_tokens) or [0]), max_size=40)
                    | TEXT.map(ours.encode_prompt).map(list))
    ids = [int(i) for i in ids]
    text = ours.decode(ids)
    assert text == theirs.decode(ids) == again.decode(ids)
    assert "".join(ours.decode_stream(ids)) == text
    prompt = ours.encode_prompt(data.draw(TEXT)).tolist()
    before, whole = ours.decode(prompt), ours.decode(prompt + ids)
    if whole.startswith(before):  # it does not where the prompt ends within a character
        assert before + "".join(ours.decode_stream(iter(ids), prompt)) == whole


def test_special_tokens_and_templates_come_back(theirs, again):
    for key in ("special_tokens_map", "all_special_tokens", "all_special_ids", "chat_template", "padding_side",
                "truncation_side", "split_special_tokens", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again, key) == getattr(theirs, key), key
    assert len(again) == len(theirs)
    assert again.model_max_length == 64
    assert again.model_input_names == ["input_ids", "attention_mask"]
    assert again.added_tokens_decoder == theirs.added_tokens_decoder


def test_what_is_stored_of_truncation_padding_and_dropout_changes_no_ids(source, ours, tmp_path_factory):
    text = " ".join(TEXTS)
    hf = HFTokenizer.from_file(str(source / "tokenizer.json"))
    hf.enable_truncation(3, direction="left")
    hf.enable_padding(direction="left", pad_id=7, pad_token="<stored>", length=50)
    if isinstance(hf.model, models.BPE):
        hf.model.dropout = 0.5
    folder = write_folder(tmp_path_factory.mktemp("stored") / "folder", hf,
                          json.loads((source / "tokenizer_config.json").read_text()))
    stored = load_tokenizer(folder)
    assert stored.encode(text).tolist() == ours.encode(text).tolist()
    assert stored.encode_prompt(text).tolist() == ours.encode_prompt(text).tolist()
    pad_token = auto(folder).pad_token
    stored.save(folder)
    again = auto(folder)
    assert again(text, add_special_tokens=False, split_special_tokens=True).input_ids == ours.encode(text).tolist()
    assert again.pad_token == pad_token


@few
@given(text=st.lists(TEXT, min_size=3).map(" ".join), size=st.integers(4, 40))
def test_a_text_in_pieces_has_the_ids_of_the_whole(ours, text, size):
    whole = ours.encode(text).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_tokenizer, "PIECE_CHARACTERS", size)
        assert ours.encode(text).tolist() == whole


def test_long_texts_are_cut(ours, monkeypatch):
    text = "the words of a text and " * 100
    monkeypatch.setattr(hf_tokenizer, "PIECE_CHARACTERS", 100)
    pieces = list(hf_tokenizer.cut_text(text, ours._next_start))
    assert len(pieces) > 10
    assert ours.encode(text).tolist() == [i for piece in pieces for i in ours._encode_piece(piece).tolist()]


@few
@given(text=st.text(LETTERS, max_size=40))
def test_bytes_of_tokens_are_those_of_the_text_behind_others(ours, text):
    """But for the first and the last, which may lack a blank."""
    lengths = ours.byte_lengths()
    ids = [i for i in ours.encode("the" + text).tolist() if i not in (ours.unk_id, ours.eot_id)]
    if len(ids) > 1 and not ours._cleans and "WordPiece" not in str(ours.hf.decoder):
        texts = [ours.hf.decode(part).encode() for part in (ids[:1] + ids[-1:], ids)]
        assert sum(lengths[i] for i in ids[1:-1]) == len(texts[1]) - len(texts[0])
    assert lengths.keys() == {*ours.hf.get_vocab().values()}


def test_every_token_is_spelled_in_its_own_way(ours):
    if "ByteLevel" not in str(ours.hf.decoder):
        spelled = [ours.spell(i) for i in ours.hf.get_vocab().values()]
        assert len({*spelled}) == len(spelled)


def test_texts_of_tokens_that_reach_over_words_are_not_cut(monkeypatch):
    hf = HFTokenizer(models.BPE())
    hf.train_from_iterator(["of the words of the text"] * 5, trainers.BpeTrainer(vocab_size=40, show_progress=False))
    tokenizer, text = Tokenizer(hf), "of the words of the text of the words " * 40
    whole = tokenizer.encode(text).tolist()
    assert any(" " in token.strip() for token in hf.get_vocab())
    monkeypatch.setattr(hf_tokenizer, "PIECE_CHARACTERS", 16)
    assert tokenizer.encode(text).tolist() == whole


def test_a_long_stream_takes_no_longer_by_the_token(ours, monkeypatch):
    """Also where nothing is text: what is decoded at a time stays short."""
    longest = 0
    decode = HFTokenizer.decode

    class Counted:
        def __getattr__(self, name):
            return getattr(ours.hf, name)

        def decode(self, ids, **options):
            nonlocal longest
            longest = max(longest, len(ids))
            return decode(ours.hf, ids, **options)

    ids = [ours.vocab_size - 1 - i % 7 for i in range(400)]
    if "ByteLevel" in str(ours.hf.decoder):
        ids += [ours.hf.token_to_id("Ģ")] * 400  # the byte 0x80
    text, stream = ours.decode(ids), Tokenizer.__new__(Tokenizer)
    vars(stream).update(vars(ours), hf=Counted(), _byte_tokens=ours._byte_tokens, _cleans=ours._cleans)
    pieces = list(itertools.islice(stream.decode_stream(ids), len(ids)))
    assert longest < 40
    assert text.startswith("".join(pieces))
    assert len(text) - len("".join(pieces)) < 10


# Gaps


@pytest.mark.parametrize("highest", [1000, 65535, 65536, 99999, 2**32 - 2])
def test_a_vocabulary_with_gaps_ends_at_its_highest_id(tmp_path, highest):
    folder = write_folder(tmp_path / "gaps", gpt2_like(), {"eos_token": "</s>"})

    def renumber(file: dict) -> None:
        file["model"]["vocab"]["</s>"] = file["added_tokens"][0]["id"] = highest

    change_json(folder / "tokenizer.json", renumber)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (highest + 1, highest)
    assert tokenizer.encode_prompt("the</s>").tolist()[-1] == highest
    assert auto(folder)("the</s>").input_ids == tokenizer.encode_prompt("the</s>").tolist()
    assert tokenizer.spell(500) == "no token 500"
    assert tokenizer.byte_lengths()[highest] == 0


# Text that there is no token for


def without_unknown(model: models.Model, pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    hf = HFTokenizer(model)
    hf.pre_tokenizer = pre_tokenizer
    return Tokenizer(hf)


@pytest.mark.parametrize(("tokenizer", "text", "unknown"), [
    (lambda: without_unknown(models.WordLevel({"a": 0, "the": 1}), pre_tokenizers.Whitespace()), "the end a",
     ["end"]),
    (lambda: without_unknown(models.WordPiece({"a": 0, "##b": 1}), pre_tokenizers.Whitespace()), "ab ac", ["ac"]),
    (lambda: without_unknown(models.Unigram([("a", -1.0), ("b", -2.0)]), None), "abécab日", ["c", "é", "日"]),
    (lambda: without_unknown(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), None), "aébé", ["é"]),
    (lambda: without_unknown(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), pre_tokenizers.Whitespace()),
     "ab é 日", ["é", "日"]),
    (lambda: without_unknown(models.BPE({"a": 0, "Ã": 1}, []), pre_tokenizers.ByteLevel(add_prefix_space=False)),
     "aé", ["é"]),  # an alphabet that lacks bytes
    (lambda: without_unknown(models.BPE({"a": 0, "<0xC3>": 1}, [], byte_fallback=True), None), "aé", ["é"])])
def test_text_that_cannot_be_encoded_is_named(tokenizer, text, unknown):
    made = tokenizer()
    for encode in (made.encode, made.encode_prompt):
        with pytest.raises(UnknownText, match=f"no token for {' '.join(map(repr, unknown))}$") as caught:
            encode(text)
        assert caught.value.unknown == unknown


def test_what_a_normaliser_takes_out_is_no_text_that_is_missing():
    tokenizer = without_unknown(models.BPE({character: i for i, character in enumerate("abé")}, []), None)
    tokenizer.hf.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(),
                                                    normalizers.Replace(Regex(r"\p{Cc}"), "")])
    tokenizer.hf.add_tokens(["日本"])
    assert tokenizer.encode("A\x01B\x02e\u0301日本").tolist() == [0, 1, 2, 3]
    with pytest.raises(UnknownText, match=r"no token for ' ' '日' '本'$"):
        tokenizer.encode("e\u0301日 本")


@pytest.mark.parametrize("make", [gpt2_like, llama3, llama])
def test_whole_alphabets_are_not_looked_through(make):
    assert not Tokenizer(make())._may_drop


def test_unknown_tokens_are_known_by_their_id(ours):
    if ours.unk_id is not None:
        assert ours.hf.id_to_token(ours.unk_id) in ("<unk>", "[UNK]")
        assert ours.byte_lengths()[ours.unk_id] == 0


# Where a folder says what


SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False,
                                             "single_word": False}, "unk_token": "<unk>",
           "additional_special_tokens": ["▁the"]}


def write_special_tokens_map(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL))


def write_added_tokens_decoder(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", lambda config: config.update(
        bos_token="<s>", eos_token="</s>", added_tokens_decoder={
            "2": {"content": "</s>", "special": True}, "1000": {"content": "<later>", "special": True}}))


def write_added_tokens(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<other>": 1001, "<later>": 1000}')


def write_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    change_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template="another"))


def write_templates(folder: Path) -> None:
    write_template(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")


@pytest.mark.parametrize("write", [write_special_tokens_map, write_added_tokens_decoder, write_added_tokens,
                                   write_template, write_templates])
def test_what_transformers_finds_in_other_files_comes_back(tmp_path, write):
    folder = write_folder(tmp_path / "source", llama(), {"auto_map": None})
    change_json(folder / "tokenizer_config.json", lambda config: config.pop("auto_map"))
    write(folder)
    ours, theirs = load_tokenizer(folder), auto(folder)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    again = auto(tmp_path / "saved")
    for key in ("special_tokens_map", "all_special_tokens", "chat_template", "added_tokens_decoder"):
        assert getattr(again, key) == getattr(theirs, key), key
    for text in ("the</s>words", "<later> the <other>"):
        assert again(text).input_ids == theirs(text).input_ids == ours.encode_prompt(text).tolist()
    assert ours.eot_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


def test_saving_what_was_saved_changes_nothing(ours, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    ours.save(tmp_path / "a", 64)
    load_tokenizer(tmp_path / "a").save(tmp_path / "b", 64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("name", "content", "words"), [
    ("tokenizer.model", "", r"neither .* tokenizer\.model has another format.*save_pretrained"),
    ("vocab.txt", "", r"neither .* vocab\.txt has another format.*save_pretrained"),
    ("vocab.json", "{}", r"has no merges\.txt"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "without any token"),
    ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": []}}', "without any token"),
    ("tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}', "without any token"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 5000000000}, "merges": []}}', "is not a tokenizer")])
def test_a_folder_without_a_tokenizer_that_can_be_read_says_so(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=words):
        load_tokenizer(tmp_path)


# On the command line


TINY = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--dtype=float32",
        "--gradient_accumulation_steps=1", "--max_iters=2", "--eval_interval=2", "--eval_iters=1", "--decay_lr=False")


def write_alphabet(folder: str, **unknown: str) -> None:
    """Words of a and b, and a token for the unknown where one is given."""
    hf = HFTokenizer(models.WordLevel({"a": 0, "b": 1} | dict.fromkeys(unknown.values(), 2), **unknown))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    write_folder(Path(folder), hf, {"eos_token": "b"} if unknown else {})


def test_text_without_tokens_is_refused_by_file_and_line_or_dropped_and_counted(cli, refused):
    write_alphabet("words")
    Path("texts").mkdir()
    Path("texts", "a.jsonl").write_text('{"text": "a b a"}\n' * 20 + '{"text": "a\\nc b"}\n' + '{"text": "b a"}\n')
    Path("texts", "b.txt").write_text("a b\nb b\nb d a e")
    line = refused("prepare_data", "--input=texts/b.txt", "--name=one", "--tokenizer=words")
    assert "texts/b.txt, line 3: the tokenizer has no token for 'd' (--skip_bad=True counts" in line
    line = refused("prepare_data", "--input=texts", "--name=all", "--tokenizer=words")
    assert "texts/a.jsonl:21: the tokenizer has no token for 'c'" in line
    made = cli("prepare_data", "--input=texts", "--name=all", "--tokenizer=words", "--skip_bad=True")
    assert made.code == 0, made.err
    first, *files, note = made.out.strip().splitlines()
    assert "21 documents" in first
    assert "2 broken records" in first
    assert files[0].startswith("dropped, because broken: a.jsonl 1, b.txt 1 (the first: texts/a.jsonl:21")
    assert note == "note: nothing separates the documents, because the tokenizer has no end-of-text token"
    assert cli("prepare_data", "--verify=data/all").code == 0


def test_unknown_tokens_are_counted(cli):
    write_alphabet("words", unk_token="?")
    Path("texts.jsonl").write_text('{"text": "a b c d"}\n' * 10)
    made = cli("prepare_data", "--input=texts.jsonl", "--tokenizer=words", "--name=made")
    assert made.code == 0, made.err
    assert "tokens for text that the tokenizer does not know: texts.jsonl 20" in made.out
    assert "nothing separates" not in made.out
    assert json.loads(Path("data/made/dataset.json").read_text())["unknown_tokens"] == 20


def test_tokens_ids_and_templates_travel_from_a_model_to_an_export(cli):
    config = ZOO["llama3"][1] | {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write_folder(Path("source"), llama3(), config)
    change_json(folder / "tokenizer_config.json", lambda config: config.pop("auto_map"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    theirs = auto(folder)
    ids = {"bos_token_id": theirs.bos_token_id, "eos_token_id": [theirs.eos_token_id, 5], "pad_token_id": 7}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(theirs), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, **ids)).save_pretrained(folder)
    change_json(folder / "config.json", lambda config: config.update(eos_token_id=theirs.eos_token_id))
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8}
    change_json(folder / "generation_config.json", lambda config: config.update(sampling))
    Path("text.txt").write_text(" ".join(TEXTS * 3))
    for command in (("prepare_data", "--input=text.txt", "--name=made", "--tokenizer=source"),
                    ("train", "--init_from=source", "--dataset=made", "--out_dir=out/run", *TINY[5:]),
                    ("train", "--init_from=source", "--dataset=made", "--out_dir=out/run", *TINY[5:], "--max_iters=4"),
                    ("train", "--dataset=made", "--out_dir=out/scratch", *TINY),
                    ("export", "--run=out/run", "--to=export")):
        assert (done := cli(*command)).code == 0, done.err
    for made in ("out/run/checkpoints/step_00000002", "out/run/checkpoints/step_00000004",
                 "out/scratch/checkpoints/step_00000002", "export"):
        again = auto(Path(made))
        assert (again.special_tokens_map, again.chat_template) == (theirs.special_tokens_map, "{{ messages }}")
        assert again("the words</s>").input_ids == theirs("the words</s>").input_ids
        found = {name: json.loads(Path(made, name).read_text()) for name in ("config.json", "generation_config.json")}
        wanted = ids if "scratch" not in made else {"bos_token_id": theirs.bos_token_id}
        assert found["generation_config.json"].items() >= (wanted | ({} if "scratch" in made else sampling)).items()
        assert found["config.json"].items() >= (wanted | {"eos_token_id": theirs.eos_token_id}).items()
    prompt = ["--prompt=the words", "--num_samples=1", "--max_new_tokens=5", "--temperature=0"]
    written = cli("sample", "--init_from=export", *prompt).out.split("\n", 1)[1].split("\n---------------")[0]
    model = transformers.AutoModelForCausalLM.from_pretrained("export")
    inputs = theirs("the words", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert "<s>" + written == theirs.decode(out[0])
