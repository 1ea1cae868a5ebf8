"""Tokenizers: GPT-2's, characters, bytes, a BPE trained on the text at hand, and any that a folder or the hub holds.

Owns how each kind is made, and how one is found and loaded; hf_tokenizer.py holds what a tokenizer does. Each is saved
as tokenizer.json and tokenizer_config.json in Hugging Face's format, so that `transformers.AutoTokenizer` gives the
same ids. Ids, for vocabulary size V:

    gpt2    OpenAI's 50,257 tokens; 50256 is the end of text
    char    the sorted characters of the training text, 0 ... V-1; no end of text
    byte    the UTF-8 bytes 0 ... 255; 256 is the end of text
    bpe     0 is the end of text, then the 256 bytes, then the merges in the order they were learned

Invariant of these kinds: for text that a tokenizer knows, decode(encode(text)) == text, and text never turns into the
end-of-text token, not even text that spells it. Tokenizers of other people need not keep this: they may lower-case text
or drop parts of it.

Example: `byte` encodes "é\n" to [195, 169, 10].
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from flatgpt.data.hf_tokenizer import Tokenizer, UnknownText, byte_alphabet
from flatgpt.data.nanogpt import characters_of, read_meta
from flatgpt.data.tokenizer_config import EOT, read_config, read_token_ids
from flatgpt.files import HUB_ID, fetch_snapshot, read_json, refuse_pointer
from flatgpt.run_folder import follow_link, newest_checkpoint

KINDS = ("gpt2", "char", "byte", "bpe")
TOKENIZER_FILES = [  # of a hub repository
    "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "config.json", "generation_config.json"]
GPT2_VOCAB_SIZE = 50257
WORD_CHARACTERS = 2000
# As many letters, digits, signs or blanks in a row, as GPT-2's pattern tells them apart.
ONE_KIND = re.compile(rf"(?:[^\W\d_]{{{WORD_CHARACTERS}}}|\d{{{WORD_CHARACTERS}}}|(?:[^\w\s]|_){{{WORD_CHARACTERS}}}"
                      rf"|\s{{{WORD_CHARACTERS}}})")
GPT2_FILES = {  # URL -> the name that tiktoken keeps the file under, the SHA-1 of the URL; and the file's SHA-256
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe": (
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json": (
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's tokenizer, of OpenAI's own files, which tiktoken downloads and keeps."""

    kind = "gpt2"

    def __init__(self) -> None:
        """Raises OSError, saying which files to put where, when GPT-2's files can be neither found nor downloaded."""
        from tiktoken.load import read_file_cached

        try:
            rules, vocab = (read_file_cached(url, sha256).decode() for url, (_, sha256) in GPT2_FILES.items())
        except (OSError, ValueError) as error:
            files = ", ".join(f"{url} as {name}" for url, (name, _) in GPT2_FILES.items())
            raise OSError(f"GPT-2's tokenizer could not be downloaded ({type(error).__name__}); without network, put "
                          f"these files in one folder and set TIKTOKEN_CACHE_DIR to it: {files}") from None
        merges = [tuple(rule.split(" ")) for rule in rules.split("\n")[1:-1]]  # below a line with the version
        hf = _byte_level(models.BPE(vocab=json.loads(vocab), merges=merges), EOT)
        super().__init__(hf, hf.token_to_id(EOT))


class CharTokenizer(Tokenizer):
    kind, _cuts_anywhere = "char", True

    def __init__(self, characters: list[str]):
        """`characters` in the order of their ids."""
        hf = HFTokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}))
        hf.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        hf.decoder = decoders.Fuse()
        super().__init__(hf)
        self._unknown_hint = f": its {self.vocab_size} characters are those of the text it was made from"
        self._ids = np.full(0x110000, -1, dtype=np.int32)  # code point -> id
        self._ids[[ord(character) for character in characters]] = np.arange(len(characters))

    def _encode_piece(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self._ids[code_points]
        if (ids < 0).any():
            raise UnknownText(sorted({chr(c) for c in code_points[ids < 0]}), self._unknown_hint)
        return ids.astype(np.uint32)


class ByteTokenizer(Tokenizer):
    kind, _cuts_anywhere = "byte", True

    def __init__(self) -> None:
        vocab = {character: byte for byte, character in enumerate(byte_alphabet())} | {EOT: 256}
        super().__init__(_byte_level(models.BPE(vocab=vocab, merges=[]), EOT, use_regex=False), 256)

    def _encode_piece(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)


def cut_words(text: str) -> Iterator[str]:
    """A text in pieces, cut behind each WORD_CHARACTERS of one kind, because the time that BPE's training takes grows
    with the square of a word's length. A text of shorter words comes back whole."""
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
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=byte_alphabet(), show_progress=False))
    return Tokenizer(hf, hf.token_to_id(EOT))


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of one of KINDS, or that of a folder, a run or a hub repository; `char` and `bpe` learn from texts,
    `vocab_size` is bpe's. Raises as `load_tokenizer` and `files.fetch_snapshot` do."""
    if kind in ("gpt2", "byte"):
        return GPT2Tokenizer() if kind == "gpt2" else ByteTokenizer()
    if kind == "char":
        return CharTokenizer(sorted({character for text in texts for character in set(text)}))
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    check_kind(kind)
    folder = _local_folder(kind) or fetch_snapshot(kind, TOKENIZER_FILES)
    folder = newest_checkpoint(folder) or folder
    if not has_tokenizer(folder) and (characters := characters_of(read_meta(folder))):
        return CharTokenizer(characters)  # of a data set of nanoGPT's
    return load_tokenizer(folder)


def check_kind(kind: str) -> None:
    """Raises ValueError for a kind that `make_tokenizer` cannot know."""
    if not (kind in KINDS or _local_folder(kind) or HUB_ID.fullmatch(kind)):
        raise ValueError(f"tokenizer={kind!r} is not one of {', '.join(KINDS)}, not a folder, and not a hub id "
                         "(owner/name)")


def _local_folder(kind: str) -> Path | None:
    """The folder on this disk that a path names, or that of the tokenizer.json that it names."""
    path = follow_link(Path(kind))
    if path.name == "tokenizer.json" and path.is_file():
        return path.parent
    return path if path.is_dir() else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file that `load_tokenizer` reads."""
    return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()


def no_tokenizer(folder: Path) -> str:
    """The message for a folder without a tokenizer that `load_tokenizer` reads, with the way out."""
    others = ", ".join(path.name for path in sorted(folder.glob("*")) if path.suffix in (".model", ".tiktoken")
                       or path.name in ("vocab.txt", "tekken.json"))
    return f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt" + (
        f"; {others} has another format: {_conversion(folder)}" if others else "")


def _conversion(folder: Path) -> str:
    return (f"transformers converts it to a tokenizer.json: AutoTokenizer.from_pretrained({str(folder)!r})."
            f"save_pretrained({str(folder)!r})")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder: its tokenizer.json, or vocab.json and merges.txt, as GPT-2's were once written.

    Raises FileNotFoundError if there is none, ValueError if it is broken."""
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise FileNotFoundError(no_tokenizer(folder))
    path = folder / "tokenizer.json"
    hf = _read_tokenizer(path) if path.is_file() else _read_vocab_and_merges(folder)
    if not hf.get_vocab_size():
        raise ValueError(f"{folder} holds a tokenizer without any token")
    if (ours := _faster_kind(hf)) and ours.hf.to_str() == hf.to_str():
        return ours
    config = read_config(folder, hf)
    tokenizer = Tokenizer(hf, hf.token_to_id(config["eos_token"]) if "eos_token" in config else None, config)
    tokenizer.token_ids = read_token_ids(folder, tokenizer.token_ids["config.json"])
    return tokenizer


def _faster_kind(hf: HFTokenizer) -> Tokenizer | None:
    """The kind of our own, with a faster encoder, that `hf` may be."""
    vocab = hf.get_vocab()
    if isinstance(hf.model, models.WordLevel) and all(len(token) == 1 for token in vocab):
        return CharTokenizer(sorted(vocab, key=vocab.get))
    return ByteTokenizer() if len(vocab) == 257 else None


def _read_tokenizer(path: Path) -> HFTokenizer:
    description = json.dumps(read_json(path))
    try:
        return HFTokenizer.from_str(description)
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer: {error}") from None


def _read_vocab_and_merges(folder: Path) -> HFTokenizer:
    """GPT-2's own kind. Raises ValueError for another, which these two files do not tell: it splits words otherwise."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    settings, model = (read_json(path) if (path := folder / name).is_file() else {}
                       for name in ("tokenizer_config.json", "config.json"))
    kind = str(settings.get("tokenizer_class") or model.get("model_type") or "gpt2")
    kind += " with add_bos_token" if settings.get("add_bos_token") else ""
    if kind not in ("gpt2", "flatgpt", "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise ValueError(f"{folder} has vocab.json and merges.txt, which alone are GPT-2's tokenizer, and this is "
                         f"{kind}: {_conversion(folder)}")
    for path in (vocab, merges):
        if not path.is_file():
            raise ValueError(f"{folder} has no {path.name}: a tokenizer is a tokenizer.json, or vocab.json and "
                             "merges.txt")
        refuse_pointer(path)
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{vocab} and {merges} are not a tokenizer: {error}") from None
    return _byte_level(model, EOT if model.token_to_id(EOT) is not None else None)


def _byte_level(model: models.BPE, eot: str | None = None, use_regex: bool = True) -> HFTokenizer:
    """A tokenizer over GPT-2's byte alphabet; `use_regex` splits words first, as GPT-2 does."""
    hf = HFTokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    hf.decoder = decoders.ByteLevel()
    if eot is not None:
        hf.add_special_tokens([AddedToken(eot, special=True)])
    return hf
