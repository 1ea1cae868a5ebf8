"""Text <-> ids through a tokenizer.json of any kind: the `Tokenizer` that all kinds share.

Owns encoding, decoding, streaming and saving, on top of the Hugging Face `tokenizers` library. Where a tokenizer works
as GPT-2's does, `gigatoken` encodes, which gives the same ids many times faster. tokenizer.py makes and loads
tokenizers; tokenizer_config.py reads the settings beside them.

Invariants: ids lie below `vocab_size`, which is the highest id + 1; there may be gaps. Ids are a function of the text,
whatever truncation, padding or dropout a file asks for. Text that spells a special token is text, except in a prompt.
Text without a token, not even one for unknown text, raises a ValueError that names it. A long text is encoded in
pieces, and its ids are those of the text as a whole.
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
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from flatgpt.data.tokenizer_config import CLASS_DEFAULTS, CLEAN_UP, TOKEN_IDS
from flatgpt.files import write_json

PIECE_CHARACTERS = 1 << 20
REMEMBERED_CHARACTERS = 1 << 28  # of text, after which gigatoken is made anew: it keeps every word that it has met
OVERLAP_CHARACTERS = 256  # on each side of a cut: the tokens there may depend on as many characters
CONTEXT_TOKENS = 8  # the text of a token may depend on as many tokens before it
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how SentencePiece spells a byte that is no whole character
WORD_END = re.compile(r"\S[ \n]")
# clean_up_tokenization_spaces removes the blanks of these from decoded text, one pattern after the other.
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
CLEANED_ENDS = " 'nvr"  # characters that an unfinished one of them can end in


class UnknownText(ValueError):
    """A tokenizer has no token for a text: `unknown` lists the characters, or the words if those cannot be split."""

    def __init__(self, unknown: list[str], hint: str):
        shown = " ".join(repr(text[:40]) for text in unknown[:10])
        super().__init__(f"the tokenizer has no token for {shown}{' ...' if len(unknown) > 10 else ''}{hint}")
        self.unknown = unknown


class Tokenizer:
    """Any tokenizer that a tokenizer.json describes. `eot_id` is the end-of-text id, or None. `config` holds special
    tokens and the chat template, as tokenizer_config.json has them; `token_ids` the ids in TOKEN_IDS by file, those for
    config.json and those for generation_config.json, with its SAMPLING options."""

    kind = "bpe"
    _unknown_hint = ""  # ends the message on unknown text
    _cuts_anywhere = False  # whether a long text may be cut anywhere
    token_ids: Mapping[str, Mapping[str, Any]]

    def __init__(self, hf: HFTokenizer, eot_id: int | None = None, config: Mapping[str, Any] | None = None):
        hf.encode_special_tokens = True  # text that spells a special token is text
        hf.no_truncation()
        hf.no_padding()
        if isinstance(hf.model, models.BPE):
            hf.model.dropout = None
        self.hf, self.eot_id = hf, eot_id
        self._gigatoken, self._num_met = None, 0  # made with the first text; characters that it has met
        self.config = config or dict.fromkeys(CLASS_DEFAULTS["GPT2Tokenizer"] if eot_id is not None else (),
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
        """The id that stands for all unknown text, or None."""
        if isinstance(self.hf.model, models.Unigram):
            return json.loads(self.hf.to_str())["model"]["unk_id"]
        return self._id_of(self.hf.model.unk_token)

    @property
    def start_id(self) -> int:
        """The id that an empty prompt starts from if the tokenizer puts nothing ahead of texts: the end-of-text token,
        else a newline, else token 0."""
        if self.eot_id is not None:
            return self.eot_id
        try:
            return int(self.encode("\n")[0])
        except (ValueError, IndexError):
            return 0

    # Text -> ids

    def encode(self, text: str) -> np.ndarray:
        """Text of any length -> ids, uint32. Raises UnknownText, a ValueError."""
        return np.concatenate([self._encode_piece(piece) for piece in cut_text(text, self._next_start)])

    def _encode_piece(self, text: str) -> np.ndarray:
        if not self._is_like_gpt2:
            return self._encode_by_hf(text)
        self._num_met += len(text)
        if self._gigatoken is None or self._num_met > REMEMBERED_CHARACTERS:
            self._gigatoken, self._num_met = self._make_gigatoken(), len(text)
        return self._gigatoken.encode(text)

    @cached_property
    def _is_like_gpt2(self) -> bool:
        """Whether this is a BPE over all bytes that splits words as GPT-2 does: what gigatoken is tested for."""
        model = self.hf.model
        return (self._splits_like_gpt2 and isinstance(model, models.BPE)
                and not (model.continuing_subword_prefix or model.end_of_word_suffix or model.byte_fallback
                         or model.ignore_merges)
                and {*byte_alphabet()} <= self.hf.get_vocab(with_added_tokens=False).keys())

    def _make_gigatoken(self) -> Any:
        import gigatoken

        settings = json.loads(self.hf.to_str()) | {"added_tokens": []}  # so that text which spells one is text
        return gigatoken.Tokenizer.from_json(json.dumps(settings))

    def _encode_by_hf(self, text: str) -> np.ndarray:
        if self._may_drop and self._unknown_parts(text):
            raise UnknownText(self._unknown_text(text), self._unknown_hint)
        try:
            encoding = self.hf.encode_batch_fast([text], add_special_tokens=False)[0]  # a quarter faster than `encode`
        except Exception as error:  # tokenizers raises nothing more specific
            if unknown := self._unknown_text(text):
                raise UnknownText(unknown, self._unknown_hint) from None
            raise ValueError(f"the tokenizer cannot encode this text: {error}") from None
        return np.array(encoding.ids, dtype=np.uint32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids that transformers gives its `generate`: the tokens that the tokenizer puts ahead of every text come
        first, and text that spells a special token becomes that token. Two things differ. Tokens that the tokenizer
        puts behind a text, such as BERT's [SEP] and T5's </s>, are left out, because they end it. A prompt without any
        id, mostly an empty one, starts from `start_id`. Raises UnknownText."""
        self.hf.encode_special_tokens = bool(self.config.get("split_special_tokens"))
        try:
            ids = [*self.opening(), *self._encode_by_hf(text).tolist()]
        finally:
            self.hf.encode_special_tokens = True
        return np.array(ids or [self.start_id], dtype=np.uint32)

    def opening(self) -> list[int]:
        """The ids that this tokenizer puts ahead of every text: Llama's <s>; GPT-2's and our own have none."""
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
        has_bytes = "ByteLevel" in stages and {*byte_alphabet()} <= vocab.keys()
        falls_back = model.byte_fallback and {f"<0x{byte:02X}>" for byte in range(256)} <= vocab.keys()
        return not (is_plain and (has_bytes or falls_back))

    def _unknown_parts(self, text: str) -> list[str]:
        """The parts of a text, as the model gets them, that have no token."""
        added = [re.escape(added.content) for added in self.hf.get_added_tokens_decoder().values()
                 if not (added.special and self.hf.encode_special_tokens)]
        between = re.split("|".join(sorted(added, key=len, reverse=True)), text) if added else [text]
        parts = dict.fromkeys(part for text in between for part in self._pre_tokenize(text))
        return [part for part in parts if part and not self._knows(part)]

    def _pre_tokenize(self, text: str) -> list[str]:
        """The parts of a text that the model gets: normalised and split."""
        text = self.hf.normalizer.normalize_str(text) if self.hf.normalizer else text
        splitter = self.hf.pre_tokenizer
        return [part for part, _ in splitter.pre_tokenize_str(text)] if splitter else [text]

    def _knows(self, part: str) -> bool:
        try:
            tokens = self.hf.model.tokenize(part)
        except Exception:  # tokenizers raises nothing more specific
            return False
        # The offsets of a BPE count bytes, and only those that it kept.
        return not self._may_drop or (bool(tokens) and tokens[-1].offsets[1] == len(part.encode()))

    def _unknown_text(self, text: str) -> list[str]:
        """The text to name in UnknownText: characters if the vocabulary is made of them, else parts."""
        unknown_parts = self._unknown_parts(text)
        if isinstance(self.hf.model, models.WordLevel | models.WordPiece):
            return unknown_parts
        unknown = {character for part in unknown_parts for character in part if not self._knows(character)}
        return [character for character in sorted(set(text))
                if unknown & {*"".join(self._unknown_parts(character))}] or unknown_parts

    def _next_start(self, text: str, place: int) -> int | None:
        """Where the next piece of a long text begins if one ends at `place`, before a space or line break. None if a
        cut there would change the ids."""
        if self._cuts_anywhere:
            return place
        if not WORD_END.match(text, place - 1):
            return None
        if self._splits_like_gpt2:
            return place
        if text[place] != " " or self._spans_words:
            return None
        # No token spans the blank. Encoding the surroundings shows what a tokenizer adds at the start of a text: where
        # that is SentencePiece's blank, the next piece begins behind its own blank.
        left, near = max(0, place - OVERLAP_CHARACTERS), place + OVERLAP_CHARACTERS
        whole, before = self._encode_piece(text[left:near]).tolist(), self._encode_piece(text[left:place]).tolist()
        return next((start for start in (place, place + 1)
                     if before + self._encode_piece(text[start:near]).tolist() == whole), None)

    @cached_property
    def _splits_like_gpt2(self) -> bool:
        """Whether this tokenizer splits words as GPT-2 does, and nothing else changes the text."""
        added = self.hf.get_added_tokens_decoder().values()
        return (self.hf.normalizer is None and all(token.special for token in added)
                and str(self.hf.pre_tokenizer) == str(pre_tokenizers.ByteLevel(add_prefix_space=False)))

    @cached_property
    def _spans_words(self) -> bool:
        """Whether a token may hold a blank behind something else: not where texts are split into words first."""
        part = next((part for part in self._pre_tokenize("x x") if part.lower().count("x") == 2), None)
        blank = part and re.escape(part.lower().split("x")[1])
        return part is not None and any(re.search(rf"[^\s{blank}]{blank}", token) for token in self.hf.get_vocab())

    # Ids -> text

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, as transformers decodes them. The end-of-text token reads <|endoftext|>, and bytes that are no
        UTF-8 read U+FFFD."""
        return self._clean(self.hf.decode([int(i) for i in ids], skip_special_tokens=False))

    def decode_stream(self, ids: Iterable[int], context: Iterable[int] = ()) -> Iterator[str]:
        """Ids one by one -> pieces of text. Joined they are the text that `decode` gives for the ids behind those of
        `context`, a prompt. Text that later ids may change is held back: a part of a character, and a run of byte
        tokens, which reads U+FFFD as a whole if any part of it is no UTF-8."""
        held = [int(i) for i in context]
        out = self.decode(held)  # the part of the held text that was given
        for i in ids:
            held.append(i)
            if i in self._byte_tokens:
                yield ""
                continue
            text = self.hf.decode(held, skip_special_tokens=False)
            settled = self._clean(text.rstrip(CLEANED_ENDS) if self._cleans else text).removesuffix("\ufffd")
            yield _new_text(out, settled) if len(settled) > len(out) else ""
            out = max(out, settled, key=len)
            if len(held) > 2 * CONTEXT_TOKENS:  # so that a long text takes no longer by the token
                text, recent = self._clean(text), held[-CONTEXT_TOKENS:]
                num_left = len(known := self.decode(recent)) - (len(text) - len(out))
                if num_left >= 0 and text.startswith(out):
                    held, out = recent, known[:num_left]
        yield _new_text(out, self.decode(held))

    @cached_property
    def _cleans(self) -> bool:
        """Whether decoded text loses blanks. transformers does so to a BPE only if a config insists."""
        wanted, insists = (bool(self.config.get(key)) for key in CLEAN_UP)
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
        """Id -> how many bytes of text it stands for. Parts of characters count, and so does a blank that the token
        does not spell itself; special tokens and the unknown token stand for none. Over a text of byte-level tokens, or
        of characters, they add up to its UTF-8 bytes."""
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

    def piece(self, token: int) -> str | bytes | None:
        """What a token is by itself, None for an id without token. A byte-level token is its text, or its bytes if
        those are no whole characters; any other is what the vocabulary calls it, such as '▁the', '##ing' or '<0xE2>'.
        """
        piece = self.hf.id_to_token(token)
        if piece is None or "ByteLevel" not in str(self.hf.decoder):
            return piece
        text = self.decode([token])
        if "\ufffd" in text and set(piece) <= set(alphabet := byte_alphabet()):
            return bytes(map(alphabet.index, piece))
        return text

    def spell(self, token: int) -> str:
        """A token's quoted name for people: its `piece`."""
        piece = self.piece(token)
        return f"no token {token}" if piece is None else repr(piece)

    def merges(self) -> list[tuple[int, int, int]]:
        """The merge rules of a BPE in the order they were learned, as ids (left, right, merged); [] for others."""
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


def _new_text(before: str, text: str) -> str:
    """The text that follows `before`. (The two differ earlier if a prompt ends within a character.)"""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text))
    return text[sum(1 for _ in same):]


def cut_text(text: str, next_start: Callable[[str, int], int | None] = lambda text, place: place) -> Iterator[str]:
    """A long text in pieces of one to two million characters, so that encoding it takes no more memory than its ids.

    It is cut before a space or line break that follows something else: a word of GPT-2's pattern always ends there, so
    the ids are those of the text as a whole. (Text without such a place is cut anywhere.) `next_start` gives where the
    piece behind a cut begins, or None if the text must not be cut there; if no place will do, the rest is one piece."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        end = start + 2 * PIECE_CHARACTERS
        places = (found.start() + 1 for found in WORD_END.finditer(text, start + PIECE_CHARACTERS, end))
        cuts = ((place, next_start(text, place)) for place in itertools.chain(itertools.islice(places, 20), [end]))
        place, begin = next((cut for cut in cuts if cut[1] is not None), (None, None))
        if begin is None:
            break
        yield text[start:place]
        start = begin
    yield text[start:] if start else text


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it is visible, else the next code point from 256 on."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    hidden = iter([character for character in characters if ord(character) > 255])
    return [chr(byte) if chr(byte) in characters else next(hidden) for byte in range(256)]
