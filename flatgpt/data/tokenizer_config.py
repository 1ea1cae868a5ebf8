"""What AutoTokenizer reads of a folder beside the vocabulary: special tokens, chat templates, and a class's own rules.

Owns tokenizer_config.json, special_tokens_map.json, added_tokens.json and the chat templates, as other people write
them, and the ids that config.json and generation_config.json give. It reads no vocabulary and encodes no text.

Invariant: what `read_config` returns and what it changes in the tokenizer are what transformers makes of the same
folder, and nothing in it names a file, a class or code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from flatgpt.files import read_json

EOT = "<|endoftext|>"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json and generation_config.json
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of generation_config.json
ADDED_TOKEN_KEYS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
# What is kept of a tokenizer_config.json: nothing that names a file, a class or code, and nothing that changes ids.
# Other keys that end in _token are kept as well if their value is a token.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_LISTS = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")
CLEAN_UP = ("clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
KEPT_KEYS = (*SPECIAL_TOKENS, *TOKEN_LISTS, *CLEAN_UP, "padding_side", "truncation_side", "add_bos_token",
             "add_eos_token", "split_special_tokens", "chat_template")
# The defaults of a tokenizer_class in transformers, which files leave out.
CLASS_DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)}


def read_config(folder: Path, hf: HFTokenizer) -> dict[str, Any]:
    """The settings of a folder's tokenizer, as Tokenizer.config has them: each token is its plain text. What the files
    say of ids and of added tokens is applied to `hf`."""
    found = _read_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in found:
        found |= _read_if_there(folder / "special_tokens_map.json")
    made_by = (found.get("tokenizer_class") or "").removesuffix("Fast")
    _rebuild_as_class(hf, made_by, found)
    config = {key: _plain(value) for key, value in found.items()}
    defaults = CLASS_DEFAULTS.get(made_by or ("" if config.keys() & SPECIAL_TOKENS else "GPT2Tokenizer"), {})
    config = {key: value for key, value in defaults.items() if hf.token_to_id(value) is not None
              or key == "padding_side"} | config
    if hf.padding:
        named = {} if made_by == "GPT2Tokenizer" else {"pad_token": hf.padding["pad_token"]}
        config = {"padding_side": hf.padding["direction"]} | named | config
    if hf.truncation:
        config = {"truncation_side": hf.truncation["direction"]} | config
    special = [config.get(key) for key in SPECIAL_TOKENS]
    for tokens in map(config.get, TOKEN_LISTS):
        special += tokens.values() if isinstance(tokens, dict) else tokens or []
    if "added_tokens_decoder" in found:
        added = [{key: value for key, value in token.items() if key in ADDED_TOKEN_KEYS}
                 for _, token in sorted(found["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    else:
        numbered = _read_if_there(folder / "added_tokens.json")
        added = [{"content": token, "special": token in special, "normalized": token not in special}
                 for token in sorted(numbered, key=numbered.get)]
    hf.add_tokens([AddedToken(**token) for token in added if hf.token_to_id(token["content"]) is None])
    # AutoTokenizer gives special tokens without an id one beyond the vocabulary; those are left out here.
    hf.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special
                           if token is not None and hf.token_to_id(token) is not None])
    if not config.get("eos_token") and hf.token_to_id(EOT) is not None:
        config["eos_token"] = EOT
    if templates := _read_templates(folder):
        config["chat_template"] = templates
    return {key: value for key, value in config.items() if value is not None and (
        key in KEPT_KEYS or (key.endswith("_token") and isinstance(value, str) and hf.token_to_id(value) is not None))}


def read_token_ids(folder: Path, own: Mapping[str, int | None]) -> dict[str, Mapping[str, Any]]:
    """File -> the ids in TOKEN_IDS that it gives. config.json overrides the tokenizer's `own` ids, and
    generation_config.json, of which the SAMPLING options are kept as well, overrides both."""
    ids, by_file = own, {}
    for name, keys in (("config.json", TOKEN_IDS), ("generation_config.json", TOKEN_IDS + SAMPLING)):
        found = _read_if_there(folder / name)
        by_file[name] = ids = {**ids, **{key: found[key] for key in keys if key in found}}
    return by_file


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _plain(value: Any) -> Any:
    """Each token as its text: files may have objects instead, also in lists and by name."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _rebuild_as_class(hf: HFTokenizer, made_by: str, config: Mapping[str, Any]) -> None:
    """Build the other stages anew: for these two classes transformers 5 takes only the vocabulary and the merges from a
    tokenizer.json."""
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
    """The chat templates in files of their own, in the form that a tokenizer_config.json has; "" if there are none."""
    paths = {"default": folder / "chat_template.jinja"} | {
        path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
    return texts["default"] if texts.keys() == {"default"} else [
        {"name": name, "template": text} for name, text in texts.items()] or ""
