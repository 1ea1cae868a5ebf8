"""Tokenizers: GPT-2's, characters, bytes, a BPE trained on the text at hand, and those of others, behind one interface.

Owns text <-> ids and the two files that hold a tokenizer, tokenizer.json and tokenizer_config.json, in Hugging Face's
format whatever the kind, so that `transformers.AutoTokenizer` gives the same ids. Ids, for vocabulary size V:

    gpt2    OpenAI's 50,257 tokens; 50256 is the end of text
    char    the sorted characters of the training text, 0 ... V-1; no end of text
    byte    the UTF-8 bytes 0 ... 255; 256 is the end of text
    bpe     0 is the end of text, then the 256 bytes, then the merges in the order they were learned

Invariant of these: for text that a tokenizer knows, decode(encode(text)) == text, and text never turns into the
end-of-text token, not even text that spells it. The tokenizers of others have gaps in their ids, lower-case or drop
what they read, put tokens ahead of it: what holds of all is that ids lie below `vocab_size`, the highest id + 1; that
they are a function of the text, whatever truncation, padding or dropout a file asks for; and that text for which a
tokenizer has nothing, not even a token for the unknown, is a ValueError that names it.

Example: `byte` encodes "é\n" to [195, 169, 10].
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from flatgpt.files import HUB_ID, fetch_snapshot, read_json, write_json
from flatgpt.run_folder import follow_link, newest_checkpoint

EOT = "<|endoftext|>"
KINDS = ("gpt2", "char", "byte", "bpe")
TOKENIZER_FILES = ["tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "additional_chat_templates/*.jinja", "config.json", "generation_config.json",
                   ]  # of a hub repository
GPT2_VOCAB_SIZE = 50257
PIECE_CHARACTERS = 1 << 20
NEAR_CHARACTERS = 256  # on each side of a cut: what the tokens there can depend on
CONTEXT_TOKENS = 8  # how many tokens before it the text of a token can depend on
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how SentencePiece spells a byte that is no whole character
WORD_END = re.compile(r"\S[ \n]")
WORD_CHARACTERS = 2000
# So many letters, digits, signs or blanks, as GPT-2's pattern tells them apart.
ONE_KIND = re.compile(rf"(?:[^\W\d_]{{{WORD_CHARACTERS}}}|\d{{{WORD_CHARACTERS}}}|(?:[^\w\s]|_){{{WORD_CHARACTERS}}}"
                      rf"|\s{{{WORD_CHARACTERS}}})")
MAX_BLANKS = 999_998  # in a row that tiktoken's regular expression comes through
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json and generation_config.json

ADDED_TOKEN = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")  # how files describe a token

# What travels of a tokenizer_config.json: nothing that names a file, a class or code, and nothing that changes ids.
# Keys that end in _token, and have a token's text, do so too.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
KEPT = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens", "padding_side",
        "truncation_side", "add_bos_token", "add_eos_token", "split_special_tokens", "clean_up_tokenization_spaces",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
# What transformers takes for granted of a tokenizer_class, so that files leave it out.
GRANTED = {"LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"},
           "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)}
# clean_up_tokenization_spaces takes blanks out of decoded text, one kind after the other, each wherever it is found.
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
CLEANED_ENDS = " 'nvr"  # what all but the whole of one of them can end in
GPT2_FILES = {  # URL that tiktoken reads -> the name it keeps the file under, the SHA-1 of the URL
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe":
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json":
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


class UnknownText(ValueError):
    """Text that a tokenizer has nothing for: `unknown` are its characters, or its words where those have no parts."""

    def __init__(self, unknown: list[str], about: str):
        shown = " ".join(repr(text[:40]) for text in unknown[:10])
        super().__init__(f"the tokenizer has no token for {shown}{' ...' if len(unknown) > 10 else ''}{about}")
        self.unknown = unknown


class Tokenizer:
    """Any tokenizer that a tokenizer.json describes. `eot_id` is the end-of-text id, or None; `config` is what its
    tokenizer_config.json says of special tokens and the chat template; `token_ids` what the config.json and
    generation_config.json beside it said of the ids in TOKEN_IDS."""

    kind = "bpe"
    _about = ""  # what there is to say of text that is not known
    token_ids: Mapping[str, Mapping[str, Any]]

    def __init__(self, hf: HFTokenizer, eot_id: int | None = None, config: Mapping[str, Any] | None = None):
        hf.encode_special_tokens = True  # text that spells a special token is text
        hf.no_truncation()
        hf.no_padding()
        if isinstance(hf.model, models.BPE):
            hf.model.dropout = None
        self.hf, self.eot_id = hf, eot_id
        self.config = config or dict.fromkeys(GRANTED["GPT2Tokenizer"] if eot_id is not None else (),
                                              hf.id_to_token(eot_id or 0))
        ids = {key: self._id_of(self.config.get(key.removesuffix("_id"))) for key in TOKEN_IDS}
        if ids["pad_token_id"] is None:
            del ids["pad_token_id"]
        self.token_ids = {"config.json": ids, "generation_config.json": ids}

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.hf.token_to_id(token)

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1: there may be gaps."""
        return max(self.hf.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def unk_id(self) -> int | None:
        """The id that stands for all text that is not known, or None where there is none."""
        if isinstance(self.hf.model, models.Unigram):
            return json.loads(self.hf.to_str())["model"]["unk_id"]
        return self._id_of(self.hf.model.unk_token)

    @property
    def start_id(self) -> int:
        """What an empty prompt starts from where the tokenizer puts nothing ahead of texts: the end-of-text token
        where there is one, else a newline (or, in a vocabulary without, token 0)."""
        if self.eot_id is not None:
            return self.eot_id
        try:
            return int(self.encode("\n")[0])
        except (ValueError, IndexError):
            return 0

    # Text -> ids

    def encode(self, text: str) -> np.ndarray:
        """Text of any length -> ids, uint32. Raises UnknownText, a ValueError."""
        return np.concatenate([self._encode_piece(piece) for piece in cut_text(text, self._resume)])

    def _encode_piece(self, text: str) -> np.ndarray:
        if self._may_drop and self._lacking(text):
            raise UnknownText(self._name_unknown(text), self._about)
        try:
            encoding = self.hf.encode_batch_fast([text], add_special_tokens=False)[0]  # a quarter faster than `encode`
        except Exception as error:  # tokenizers raises nothing more specific
            if unknown := self._name_unknown(text):
                raise UnknownText(unknown, self._about) from None
            raise ValueError(f"the tokenizer cannot encode this text: {error}") from None
        return np.array(encoding.ids, dtype=np.uint32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids that transformers feeds its `generate`: behind those that the tokenizer puts ahead of every text, and
        with special tokens where the text spells them. Two things differ. Tokens that the tokenizer puts behind a text,
        as BERT's [SEP] and T5's </s>, are left out, because they say that it is over. And a prompt without any id, an
        empty one mostly, starts from `start_id`. Raises UnknownText."""
        self.hf.encode_special_tokens = bool(self.config.get("split_special_tokens"))
        try:
            ids = [*self.opening(), *Tokenizer._encode_piece(self, text).tolist()]
        finally:
            self.hf.encode_special_tokens = True
        return np.array(ids or [self.start_id], dtype=np.uint32)

    def opening(self) -> list[int]:
        """The ids that this tokenizer is meant to put ahead of every text: Llama's <s>; GPT-2 and our own have none."""
        probe = HFTokenizer(models.WordLevel({"x": 0}, "x"))
        if self.hf.post_processor:
            probe.post_processor = self.hf.post_processor
        encoding = probe.encode("x")
        return encoding.ids[:encoding.special_tokens_mask.index(0)]

    @cached_property
    def _may_drop(self) -> bool:
        """Whether text can vanish: a BPE without unknown token leaves out what is not in its alphabet."""
        model, vocab = self.hf.model, self.hf.get_vocab()
        if not isinstance(model, models.BPE) or model.unk_token is not None:
            return False
        is_plain = not (model.continuing_subword_prefix or model.end_of_word_suffix)
        stages = f"{self.hf.normalizer}{self.hf.pre_tokenizer}"
        has_bytes = "ByteLevel" in stages and {*_byte_alphabet()} <= vocab.keys()
        falls_back = model.byte_fallback and {f"<0x{byte:02X}>" for byte in range(256)} <= vocab.keys()
        return not (is_plain and (has_bytes or falls_back))

    def _lacking(self, text: str) -> list[str]:
        """What there is no token for, of the parts that the model is given."""
        added = [re.escape(added.content) for added in self.hf.get_added_tokens_decoder().values()
                 if not (added.special and self.hf.encode_special_tokens)]
        between = re.split("|".join(sorted(added, key=len, reverse=True)), text) if added else [text]
        parts = dict.fromkeys(part for text in between for part in self._parts(text))
        return [part for part in parts if part and not self._knows(part)]

    def _parts(self, text: str) -> list[str]:
        """A text as the model is given it: normalised and split."""
        text = self.hf.normalizer.normalize_str(text) if self.hf.normalizer else text
        splitter = self.hf.pre_tokenizer
        return [part for part, _ in splitter.pre_tokenize_str(text)] if splitter else [text]

    def _knows(self, part: str) -> bool:
        try:
            tokens = self.hf.model.tokenize(part)
        except Exception:  # tokenizers raises nothing more specific
            return False
        # A BPE counts bytes, and only those that it has kept.
        return not self._may_drop or (bool(tokens) and tokens[-1].offsets[1] == len(part.encode()))

    def _name_unknown(self, text: str) -> list[str]:
        """What is to be named of a text: characters, where they are what a vocabulary is made of."""
        lacking = self._lacking(text)
        if isinstance(self.hf.model, models.WordLevel | models.WordPiece):
            return lacking
        unknown = {character for part in lacking for character in part if not self._knows(character)}
        return [character for character in sorted(set(text))
                if unknown & {*"".join(self._lacking(character))}] or lacking

    def _resume(self, text: str, place: int) -> int | None:
        """Where the next piece of a long text begins if one ends at `place`, before a space or line break; None if it
        must not be cut there. The ids are those of the text as a whole."""
        if not WORD_END.match(text, place - 1):
            return None
        if self._splits_like_gpt2:
            return place
        if text[place] != " " or self._spans_words:
            return None
        # No token reaches over the blank. What is put at the start of a text, or looks beyond a word, shows here: the
        # blank that SentencePiece puts there stands for that which the next piece then begins behind.
        left, near = max(0, place - NEAR_CHARACTERS), place + NEAR_CHARACTERS
        whole, before = self._encode_piece(text[left:near]).tolist(), self._encode_piece(text[left:place]).tolist()
        return next((start for start in (place, place + 1)
                     if before + self._encode_piece(text[start:near]).tolist() == whole), None)

    @cached_property
    def _splits_like_gpt2(self) -> bool:
        """Whether words are what they are to GPT-2, and nothing else looks at the text."""
        added = self.hf.get_added_tokens_decoder().values()
        return (self.hf.normalizer is None and all(token.special for token in added)
                and str(self.hf.pre_tokenizer) == str(pre_tokenizers.ByteLevel(add_prefix_space=False)))

    @cached_property
    def _spans_words(self) -> bool:
        """Whether a token may hold a blank behind something else: not where texts are split into words first."""
        part = next((part for part in self._parts("x x") if part.lower().count("x") == 2), None)
        blank = part and re.escape(part.lower().split("x")[1])
        return part is not None and any(re.search(rf"[^\s{blank}]{blank}", token) for token in self.hf.get_vocab())

    # Ids -> text

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, as transformers has it; the end-of-text token reads as it is spelled, <|endoftext|>, and bytes
        that are no UTF-8 read U+FFFD."""
        return self._clean(self.hf.decode([int(i) for i in ids], skip_special_tokens=False))

    def decode_stream(self, ids: Iterable[int], context: Iterable[int] = ()) -> Iterator[str]:
        """Ids one by one -> pieces of text, which joined are what `decode` gives of them behind the ids of `context`, a
        prompt; no character is cut in two. What ids to come may change is held back: a part of a character, and a run
        of byte tokens, which reads U+FFFD as a whole when any part of it is no UTF-8."""
        held = [int(i) for i in context]
        out = self.decode(held)  # of the text of what is held
        for i in ids:
            held.append(i)
            if i in self._byte_tokens:
                yield ""
                continue
            text = self.hf.decode(held, skip_special_tokens=False)
            settled = self._clean(text.rstrip(CLEANED_ENDS) if self._cleans else text)
            settled = settled.removesuffix("\ufffd")
            if len(settled) <= len(out):
                yield ""
            else:
                yield _behind(out, settled)
                out = settled
            if len(held) > 2 * CONTEXT_TOKENS:  # so that a long text takes no longer by the token
                text, recent = self._clean(text), held[-CONTEXT_TOKENS:]
                num_left = len(known := self.decode(recent)) - (len(text) - len(out))
                if num_left >= 0 and text.startswith(out):
                    held, out = recent, known[:num_left]
        yield _behind(out, self.decode(held))

    @cached_property
    def _cleans(self) -> bool:
        """Whether decoded text loses blanks. transformers spares a BPE, unless a config insists."""
        wanted, insists = (bool(self.config.get(key)) for key in KEPT[-2:])
        return wanted and (insists or not isinstance(self.hf.model, models.BPE))

    def _clean(self, text: str) -> str:
        if not self._cleans:
            return text
        return reduce(lambda text, pattern: text.replace(pattern, pattern.strip()), CLEANED, text)

    @cached_property
    def _byte_tokens(self) -> set[int]:
        if "ByteFallback" not in str(self.hf.decoder):
            return set()
        return {i for token, i in self.hf.get_vocab().items() if BYTE_TOKEN.fullmatch(token)}

    def byte_lengths(self) -> dict[int, int]:
        """Id -> how many bytes of text it stands for, a part of a character included, and the blank that the token
        itself does not spell; special tokens, the end of text among them, and the unknown stand for none. Over a text
        of byte-level tokens, or of characters, they add up to its UTF-8 bytes.
        """
        vocab, added = self.hf.get_vocab(with_added_tokens=True), self.hf.get_added_tokens_decoder()
        nothing = {self.eot_id, self.unk_id, *(i for i, token in added.items() if token.special)}
        if "ByteLevel" in str(self.hf.decoder):  # spelled in GPT-2's alphabet, a character a byte
            lengths = {i: len(token.encode() if i in added else token) for token, i in vocab.items()}
        else:  # as they read between two others
            plain = sorted({*vocab.values()} - nothing - self._byte_tokens)
            other = [next((i for i in plain if self.hf.decode([i])), 0)]
            texts = self.hf.decode_batch([other + [i] + other for i in vocab.values()], skip_special_tokens=False)
            known = len(self.hf.decode(other + other).encode())
            lengths = {i: 1 if i in self._byte_tokens else len(text.encode()) - known
                       for i, text in zip(vocab.values(), texts)}
        return {i: 0 if i in nothing else length for i, length in lengths.items()}

    def spell(self, token: int) -> str:
        """A token as people tell it from others: of byte-level ones the text, or the bytes where they are no whole
        characters, of others what the vocabulary calls them, '▁the', '##ing' or '<0xE2>'; quoted."""
        piece = self.hf.id_to_token(token)
        if piece is None:
            return f"no token {token}"
        if "ByteLevel" not in str(self.hf.decoder):
            return repr(piece)
        text = self.decode([token])
        if "\ufffd" in text and set(piece) <= set(alphabet := _byte_alphabet()):
            return repr(bytes(map(alphabet.index, piece)))
        return repr(text)

    def merges(self) -> list[tuple[int, int, int]]:
        """(left, right, what they make), ids, of every merge rule of a BPE in the order it was learned; else []."""
        rules = json.loads(self.hf.to_str())["model"].get("merges", [])
        return [tuple(map(self.hf.token_to_id, (left, right, left + right))) for left, right in rules]

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder that exists."""
        folder = Path(folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                  # Else transformers 4 adds token_type_ids, whose embeddings GPT-2 takes from the token table.
                  "model_input_names": ["input_ids", "attention_mask"], **self.config}
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        (folder / "tokenizer.json").write_text(self.hf.to_str(), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", config)


def _behind(before: str, text: str) -> str:
    """What a text has more than the one before it. (They differ before that where a prompt ends within a character.)"""
    if text.startswith(before):
        return text[len(before):]
    return text[sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text))):]


class GPT2Tokenizer(Tokenizer):
    """GPT-2's tokenizer, encoded by tiktoken, which is several times faster than tokenizers."""

    kind, vocab_size, unk_id = "gpt2", GPT2_VOCAB_SIZE, None
    config = GRANTED["GPT2Tokenizer"]

    def __init__(self) -> None:
        """Raises OSError, saying which files to put where, when GPT-2's ranks can be neither found nor downloaded."""
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            files = ", ".join(f"{url} as {name}" for url, name in GPT2_FILES.items())
            raise OSError(f"GPT-2's tokenizer could not be downloaded ({type(error).__name__}); without network, put "
                          f"these files in one folder and set TIKTOKEN_CACHE_DIR to it: {files}") from None
        self.eot_id = self._encoding.eot_token
        ids = {"bos_token_id": self.eot_id, "eos_token_id": self.eot_id}
        self.token_ids = {"config.json": ids, "generation_config.json": ids}

    @cached_property
    def hf(self) -> HFTokenizer:  # made when it is asked for: whoever only encodes can do without
        ranks = self._encoding._mergeable_ranks
        alphabet = _byte_alphabet()
        spell = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
        vocab = {spell[token]: rank for token, rank in ranks.items()} | {EOT: self._encoding.eot_token}
        merges = [(spell[left], spell[right]) for left, right in _recover_merges(ranks)]
        hf = _byte_level(models.BPE(vocab=vocab, merges=merges), EOT)
        hf.encode_special_tokens = True
        return hf

    def _resume(self, text: str, place: int) -> int:
        return place

    def _encode_piece(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # tiktoken gives up
            blanks = max(re.finditer(r"\s+", text), key=lambda found: len(found[0]), default=None)
            if blanks is None or len(blanks[0]) <= MAX_BLANKS:
                raise
            middle = sum(blanks.span()) // 2
            return np.concatenate([self._encode_piece(text[:middle]), self._encode_piece(text[middle:])])


class CharTokenizer(Tokenizer):
    kind = "char"

    def __init__(self, characters: list[str]):
        """`characters` in the order of their ids."""
        hf = HFTokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}))
        hf.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        hf.decoder = decoders.Fuse()
        super().__init__(hf)
        self._about = f": its {self.vocab_size} characters are those of the text it was made from"
        self._ids = np.full(0x110000, -1, dtype=np.int32)  # code point -> id
        self._ids[[ord(character) for character in characters]] = np.arange(len(characters))

    _resume = GPT2Tokenizer._resume

    def _encode_piece(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self._ids[code_points]
        if (ids < 0).any():
            raise UnknownText(sorted({chr(c) for c in code_points[ids < 0]}), self._about)
        return ids.astype(np.uint32)


class ByteTokenizer(Tokenizer):
    kind = "byte"

    def __init__(self) -> None:
        super().__init__(_byte_level(models.BPE(vocab=_byte_vocab(), merges=[]), EOT, use_regex=False), 256)

    _resume = GPT2Tokenizer._resume

    def _encode_piece(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)


def cut_text(text: str, resume: Callable[[str, int], int | None] = lambda text, place: place) -> Iterator[str]:
    """A long text in pieces of one to two million characters, so that encoding it takes no more memory than its ids.

    Cut before a space or line break that follows something else, where a word of GPT-2's pattern always ends and its
    surroundings say nothing of how it is split: the ids are those of the text as a whole. (Text without such a place
    is cut anyhow.) `resume` says where the next piece begins behind a cut, or None for a place that will not do; where
    none does, the rest of the text is one piece."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        end = start + 2 * PIECE_CHARACTERS
        places = (found.start() + 1 for found in WORD_END.finditer(text, start + PIECE_CHARACTERS, end))
        cuts = ((place, resume(text, place)) for place in itertools.chain(itertools.islice(places, 20), [end]))
        place, resumed = next((cut for cut in cuts if cut[1] is not None), (None, None))
        if resumed is None:
            break
        yield text[start:place]
        start = resumed
    yield text[start:] if start else text


def cut_words(text: str) -> Iterator[str]:
    """A text in pieces, cut in words without end, that is behind each WORD_CHARACTERS of one kind: BPE's training takes
    the square of a word's length. A text of words comes back as it is."""
    start = 0
    for end in range(WORD_CHARACTERS, len(text), WORD_CHARACTERS):
        if ONE_KIND.match(text, end - WORD_CHARACTERS):
            yield text[start:end]
            start = end
    yield text[start:] if start else text


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, learned from texts. Raises ValueError below 257 tokens."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} is too small for bpe: 256 bytes and the end of text take 257")
    hf = _byte_level(models.BPE())
    hf.train_from_iterator(itertools.chain.from_iterable(map(cut_words, texts)), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=_byte_alphabet(), show_progress=False))
    return Tokenizer(hf, hf.token_to_id(EOT))


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of one of KINDS, or that of a folder, a run or a hub repository; `char` and `bpe` learn from texts,
    `vocab_size` is bpe's. Raises as `load_tokenizer` and `files.fetch_snapshot` do."""
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer(sorted({character for text in texts for character in set(text)}))
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    check_kind(kind)
    folder = follow_link(Path(kind))
    if not folder.is_dir():
        folder = fetch_snapshot(kind, TOKENIZER_FILES)
    return load_tokenizer(newest_checkpoint(folder) or folder)


def check_kind(kind: str) -> None:
    """Raises ValueError for what `make_tokenizer` cannot know."""
    if not (kind in KINDS or follow_link(Path(kind)).is_dir() or HUB_ID.fullmatch(kind)):
        raise ValueError(f"tokenizer={kind!r} is none of {', '.join(KINDS)}, no folder, and no hub id (owner/name)")


def has_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` finds something there."""
    return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()


def no_tokenizer(folder: Path) -> str:
    """That there is none that `load_tokenizer` reads, and what to do about it."""
    others = ", ".join(path.name for path in sorted(folder.glob("*")) if path.suffix in (".model", ".tiktoken")
                       or path.name in ("vocab.txt", "tekken.json"))
    return f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt" + (
        f"; {others} is one of another make, of which transformers writes a tokenizer.json: AutoTokenizer."
        f"from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})" if others else "")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in a folder: tokenizer.json, or vocab.json and merges.txt, as GPT-2's were once written.

    Raises FileNotFoundError when there is none, ValueError when it is broken."""
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise FileNotFoundError(no_tokenizer(folder))
    path = folder / "tokenizer.json"
    hf = _read_tokenizer(path) if path.is_file() else _read_vocab_and_merges(folder)
    if not hf.get_vocab_size():
        raise ValueError(f"{folder} holds a tokenizer without any token")
    for ours in _ours_that_are_faster(hf):
        if ours.hf.to_str() == hf.to_str():
            return ours
    config = _adapt(hf, folder)
    tokenizer = Tokenizer(hf, hf.token_to_id(config["eos_token"]) if "eos_token" in config else None, config)
    ids = tokenizer.token_ids["config.json"]
    for name in tokenizer.token_ids:  # generation_config.json has the last word
        found = _read_if_there(folder / name)
        tokenizer.token_ids[name] = ids = ids | {key: found[key] for key in TOKEN_IDS if key in found}
    return tokenizer


def _ours_that_are_faster(hf: HFTokenizer) -> Iterator[Tokenizer]:
    """Those of our own that `hf` may be."""
    vocab = hf.get_vocab()
    if isinstance(hf.model, models.WordLevel) and all(len(token) == 1 for token in vocab):
        yield CharTokenizer(sorted(vocab, key=vocab.get))
    if isinstance(hf.model, models.BPE) and len(vocab) == 257:
        yield ByteTokenizer()


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_tokenizer(path: Path) -> HFTokenizer:
    try:
        return HFTokenizer.from_str(json.dumps(read_json(path)))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer: {error}") from None


def _read_vocab_and_merges(folder: Path) -> HFTokenizer:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{vocab} and {merges} are no tokenizer: {error}") from None
    return _byte_level(model, EOT if model.token_to_id(EOT) is not None else None)


def _adapt(hf: HFTokenizer, folder: Path) -> dict[str, Any]:
    """What AutoTokenizer reads of a folder beside tokenizer.json: what that says of ids is done to `hf`, and the rest
    given back, as Tokenizer.config. A token is its plain text there; how it is found in texts is `hf`'s to know."""
    found = _read_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in found:
        found |= _read_if_there(folder / "special_tokens_map.json")
    made_by = (found.get("tokenizer_class") or "").removesuffix("Fast")
    _rebuild(hf, made_by, found)
    config = {key: _plain(value) for key, value in found.items()}
    granted = GRANTED.get(made_by or ("" if config.keys() & NAMED else "GPT2Tokenizer"), {})
    config = {key: value for key, value in granted.items() if hf.token_to_id(value) is not None
              or key == "padding_side"} | config
    if hf.padding:
        named = {} if made_by == "GPT2Tokenizer" else {"pad_token": hf.padding["pad_token"]}
        config = {"padding_side": hf.padding["direction"]} | named | config
    if hf.truncation:
        config = {"truncation_side": hf.truncation["direction"]} | config
    special = [*(config.get(key) for key in NAMED), *(token for key in KEPT[:3] for token in _listed(config.get(key)))]
    if "added_tokens_decoder" in found:
        added = [{key: value for key, value in token.items() if key in ADDED_TOKEN}
                 for _, token in sorted(found["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    else:
        numbered = _read_if_there(folder / "added_tokens.json")
        added = [{"content": token, "special": token in special, "normalized": token not in special}
                 for token in sorted(numbered, key=numbered.get)]
    hf.add_tokens([AddedToken(**token) for token in added if hf.token_to_id(token["content"]) is None])
    # Those that have no id get one from AutoTokenizer, beyond the model's.
    hf.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special
                           if token is not None and hf.token_to_id(token) is not None])
    if not config.get("eos_token") and hf.token_to_id(EOT) is not None:
        config["eos_token"] = EOT
    if templates := _read_templates(folder):
        config["chat_template"] = templates
    return {key: value for key, value in config.items() if value is not None and (
        key in (*NAMED, *KEPT, "chat_template") or (key.endswith("_token") and isinstance(value, str)
                                                    and hf.token_to_id(value) is not None))}


def _plain(value: Any) -> Any:
    """Tokens as their text, which files have as objects as well, also in lists and by names."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _listed(tokens: Any) -> list[str]:
    return list(tokens.values()) if isinstance(tokens, dict) else tokens or []


def _rebuild(hf: HFTokenizer, made_by: str, config: Mapping[str, Any]) -> None:
    """Of these two classes transformers 5 takes no more than the vocabulary and the merges from a tokenizer.json."""
    is_byte_level = str(hf.pre_tokenizer).startswith("ByteLevel(")
    if made_by == "GPT2Tokenizer" and is_byte_level:
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    if made_by == "LlamaTokenizer" and isinstance(hf.model, models.BPE) and "ByteLevel" not in str(hf.pre_tokenizer):
        prefixes = config.get("add_prefix_space") in (None, True)
        hf.normalizer = None
        hf.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never" if not prefixes else "always" if config.get("legacy")
                                                    else "first", split=False)
        hf.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                        *([decoders.Strip(" ", 1, 0)] if prefixes else [])])
        hf.model.byte_fallback = hf.model.fuse_unk = True


def _read_templates(folder: Path) -> str | list[dict[str, str]]:
    """The chat templates that have files of their own, as a tokenizer_config.json has them; "" where there are none."""
    paths = {"default": folder / "chat_template.jinja"} | {
        path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
    return texts["default"] if texts.keys() == {"default"} else [
        {"name": name, "template": text} for name, text in texts.items()] or ""


def _byte_level(model: models.BPE, eot: str | None = None, use_regex: bool = True) -> HFTokenizer:
    """A tokenizer over GPT-2's byte alphabet; `use_regex` splits words first, as GPT-2 does."""
    hf = HFTokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    hf.decoder = decoders.ByteLevel()
    if eot is not None:
        hf.add_special_tokens([AddedToken(eot, special=True)])
    return hf


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it is visible, else the next code point from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _byte_vocab() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_byte_alphabet())} | {EOT: 256}


def _recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge rules behind BPE ranks: a token's rule joins the two parts that earlier rules leave of its bytes."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            lowest, at = rank, 0
            for i in range(len(parts) - 1):
                if (joined := ranks.get(parts[i] + parts[i + 1], rank)) < lowest:
                    lowest, at = joined, i
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
