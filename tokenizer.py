"""Tokenizers: GPT-2's, characters, bytes, and a BPE trained on the text at hand, behind one interface.

Owns text <-> ids and the two files that hold a tokenizer, tokenizer.json and tokenizer_config.json, in Hugging Face's
format whatever the kind, so that `transformers.AutoTokenizer` gives the same ids. Ids, for vocabulary size V:

    gpt2    OpenAI's 50,257 tokens; 50256 is the end of text
    char    the sorted characters of the training text, 0 ... V-1; no end of text
    byte    the UTF-8 bytes 0 ... 255; 256 is the end of text
    bpe     0 is the end of text, then the 256 bytes, then the merges in the order they were learned

Invariant: for text that a tokenizer knows, decode(encode(text)) == text, and text never turns into the end-of-text
token, not even text that spells it.

Example: `byte` encodes "é\n" to [195, 169, 10].
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from files import HUB_ID, fetch_snapshot, follow_link, newest_checkpoint, read_json, write_json

EOT = "<|endoftext|>"
KINDS = ("gpt2", "char", "byte", "bpe")
TOKENIZER_FILES = ["tokenizer*.json", "vocab.json", "merges.txt"]  # of a hub repository
GPT2_VOCAB_SIZE = 50257
PIECE_CHARACTERS = 1 << 20
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece spells a byte that is no whole character
WORD_END = re.compile(r"\S[ \n]")
WORD_CHARACTERS = 2000
# So many letters, digits, signs or blanks, as GPT-2's pattern tells them apart.
ONE_KIND = re.compile(rf"(?:[^\W\d_]{{{WORD_CHARACTERS}}}|\d{{{WORD_CHARACTERS}}}|(?:[^\w\s]|_){{{WORD_CHARACTERS}}}"
                      rf"|\s{{{WORD_CHARACTERS}}})")
MAX_BLANKS = 999_998  # in a row that tiktoken's regular expression comes through
GPT2_FILES = {  # URL that tiktoken reads -> the name it keeps the file under, the SHA-1 of the URL
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe":
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json":
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


class Tokenizer:
    """Any tokenizer that a tokenizer.json describes. `eot_id` is the end-of-text id, or None."""

    kind = "bpe"

    def __init__(self, hf: HFTokenizer, eot_id: int | None = None):
        hf.encode_special_tokens = True  # text that spells a special token is text
        self.hf, self.eot_id = hf, eot_id

    @property
    def vocab_size(self) -> int:
        return self.hf.get_vocab_size(with_added_tokens=True)

    @property
    def start_id(self) -> int:
        """What an empty prompt starts from: the end-of-text token where there is one, else a newline (or, in a
        vocabulary without, token 0)."""
        if self.eot_id is not None:
            return self.eot_id
        try:
            return int(self.encode("\n")[0])
        except ValueError:
            return 0

    def encode(self, text: str) -> np.ndarray:
        """Text of any length -> ids, uint32. Raises ValueError naming characters that the vocabulary lacks."""
        return np.concatenate([self._encode_piece(piece) for piece in cut_text(text)])

    def _encode_piece(self, text: str) -> np.ndarray:
        encoding = self.hf.encode_batch_fast([text], add_special_tokens=False)[0]  # a quarter faster than `encode`
        return np.array(encoding.ids, dtype=np.uint32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """As `encode`, but <|endoftext|> in the text is the end-of-text token, as people write it in prompts."""
        if self.eot_id is None:
            return self.encode(text)
        parts = [self.encode(part) for part in text.split(EOT)]
        for i in range(1, len(parts)):
            parts[i] = np.concatenate([np.array([self.eot_id], dtype=np.uint32), parts[i]])
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; the end-of-text token reads <|endoftext|>, bytes that are no UTF-8 read U+FFFD."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Ids one by one -> pieces of text, no character cut in two; joined they are `decode(ids)`."""
        held: list[int] = []  # ids since the text last ended with a whole character
        shown = 0  # characters of theirs that are out
        for i in ids:
            held.append(i)
            text = self.decode(held)
            settled = len(text) - text.endswith("\ufffd")  # how an unfinished character reads
            yield text[shown:settled]
            shown = settled
            if settled == len(text):
                held, shown = [], 0
        yield self.decode(held)[shown:]

    def byte_lengths(self) -> dict[int, int]:
        """Id -> how many bytes of text it stands for, a part of a character included; special tokens, the end of text
        among them, stand for none. Over a text of byte-level tokens, or of characters, they add up to its UTF-8 bytes.
        """
        decoder, added = str(self.hf.decoder), self.hf.get_added_tokens_decoder()

        def length(token: str, i: int) -> int:
            if i == self.eot_id or i in added:
                return 0 if i == self.eot_id or added[i].special else len(token.encode())
            if "ByteLevel" in decoder:  # spelled in GPT-2's alphabet, a character a byte
                return len(token)
            if "ByteFallback" in decoder and BYTE_TOKEN.fullmatch(token):
                return 1
            return len((token.replace("▁", " ") if "▁" in decoder else token).encode())

        return {i: length(token, i) for token, i in self.hf.get_vocab(with_added_tokens=True).items()}

    def opening(self) -> list[int]:
        """The ids that this tokenizer is meant to put ahead of every text: Llama's <s>; GPT-2 and our own have none."""
        return self.hf.encode("", add_special_tokens=True).ids

    def spell(self, token: int) -> str:
        """A token as people tell it from others: its text quoted, or its bytes where they are no whole characters."""
        text = self.decode([token])
        piece = self.hf.id_to_token(token) if "\ufffd" in text else None
        if piece and set(piece) <= set(alphabet := _byte_alphabet()):
            return repr(bytes(map(alphabet.index, piece)))
        return repr(text)

    def merges(self) -> list[tuple[int, int, int]]:
        """(left, right, what they make), ids, of every merge rule of a BPE in the order it was learned; else []."""
        rules = json.loads(self.hf.to_str())["model"].get("merges", [])
        return [tuple(map(self.hf.token_to_id, (left, right, left + right))) for left, right in rules]

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder that exists."""
        folder = Path(folder)
        config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                        # Else transformers 4 adds token_type_ids, whose embeddings GPT-2 takes from the token table.
                        "model_input_names": ["input_ids", "attention_mask"]}
        if self.eot_id is not None:
            eot = self.hf.id_to_token(self.eot_id)
            config |= {"bos_token": eot, "eos_token": eot, "unk_token": eot}
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        (folder / "tokenizer.json").write_text(self.hf.to_str(), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", config)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's tokenizer, encoded by tiktoken, which is several times faster than tokenizers."""

    kind = "gpt2"

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
        self._ids = np.full(0x110000, -1, dtype=np.int32)  # code point -> id
        self._ids[[ord(character) for character in characters]] = np.arange(len(characters))

    def _encode_piece(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self._ids[code_points]
        if (ids < 0).any():
            unknown = sorted({chr(c) for c in code_points[ids < 0]})
            raise ValueError(f"the char tokenizer does not know {' '.join(repr(c) for c in unknown[:10])}"
                             f"{' ...' if len(unknown) > 10 else ''}: its {self.vocab_size} characters are those of "
                             "the text it was made from")
        return ids.astype(np.uint32)


class ByteTokenizer(Tokenizer):
    kind = "byte"

    def __init__(self) -> None:
        super().__init__(_byte_level(models.BPE(vocab=_byte_vocab(), merges=[]), EOT, use_regex=False), 256)

    def _encode_piece(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)


def cut_text(text: str) -> Iterator[str]:
    """A long text in pieces of one to two million characters, so that encoding it takes no more memory than its ids.

    Cut before a space or line break that follows something else, where a word of GPT-2's pattern always ends and its
    surroundings say nothing of how it is split: the ids are those of the text as a whole. (Text without such a place
    is cut anyhow.)"""
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        end = start + 2 * PIECE_CHARACTERS
        if place := WORD_END.search(text, start + PIECE_CHARACTERS, end):
            end = place.start() + 1
        yield text[start:end]
        start = end
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


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in a folder: tokenizer.json, or vocab.json and merges.txt, as GPT-2's were once written.

    Raises FileNotFoundError when there is none, ValueError when it is broken."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not has_tokenizer(folder):
        raise FileNotFoundError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")
    if not path.is_file():
        return _load_vocab_and_merges(folder)
    description = read_json(path)
    try:
        hf = HFTokenizer.from_str(json.dumps(description))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    # Ours that encode faster than tokenizers does, known by their vocabulary. (As tokenizers writes it: a file of
    # somebody else's, GPT-2's on the hub for one, may leave the model's type out.)
    model = json.loads(hf.to_str())["model"]
    vocab = model["vocab"]
    if model["type"] == "WordLevel" and all(len(token) == 1 for token in vocab):
        characters = sorted(vocab, key=vocab.get)
        if vocab == {character: i for i, character in enumerate(characters)}:
            return CharTokenizer(characters)
    if vocab == _byte_vocab():
        return ByteTokenizer()
    return Tokenizer(hf, _find_eot(hf, folder))


def _load_vocab_and_merges(folder: Path) -> Tokenizer:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{vocab} and {merges} are no tokenizer: {error}") from None
    hf = _byte_level(model, EOT if model.token_to_id(EOT) is not None else None)
    return Tokenizer(hf, _find_eot(hf, folder))


def _find_eot(hf: HFTokenizer, folder: Path) -> int | None:
    config_path = folder / "tokenizer_config.json"
    eos = read_json(config_path).get("eos_token") if config_path.is_file() else None
    if isinstance(eos, dict):  # an older way of writing it
        eos = eos.get("content")
    return hf.token_to_id(eos or EOT)


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
