"""Models in files: Hugging Face's folders and hub ids, nanoGPT's ckpt.pt.

Owns how `(GPTConfig, state dict)` of model.py gets into files and out of them; families.py has the names and options
of each kind of model. Nothing it loads can run code: safetensors hold numbers only, and ckpt.pt goes through torch's
weights-only unpickler.

A file is mapped into memory, and its tensors keep their own number type until a parameter is made of them, one at a
time. So loading takes the memory of the parameters that are kept, and of one that is on its way, and no second copy.

A parameter's way, taking the first MLP matrix of GPT-2 small:

    Hugging Face   transformer.h.0.mlp.c_fc.weight            (768, 3072)  Conv1D: x @ W
    OpenAI's file              h.0.mlp.c_fc.weight            (768, 3072)
    nanoGPT        _orig_mod.transformer.h.0.mlp.c_fc.weight  (3072, 768)  nn.Linear: x @ W.T
    here                       h.0.mlp.c_fc.weight            (3072, 768)

A model that no family fits is written under our own names, and only flatGPT reads it.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flatgpt.data.tokenizer import TOKENIZER_FILES, Tokenizer
from flatgpt.files import HUB_ID, broken, fetch_snapshot, read_json, reading_values, refuse_pointer, write_json
from flatgpt.models.baselines import build_empty
from flatgpt.models.families import FAMILIES, State, family_of, without_prefixes
from flatgpt.options import check_options
from flatgpt.pickles import STAND_INS
from flatgpt.run_folder import best_checkpoint, follow_link, newest_checkpoint
from model import GPTConfig, LanguageModel

GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
              "gpt2-xl": (48, 25, 1600)}  # n_layer, n_head, n_embd
HUB_ALIASES = {name: f"openai-community/{name}" for name in GPT2_SIZES}
WEIGHT_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]  # of a hub repository
OWN_NAMES = {"rope_scaling": "rope_scaling_type"}  # in our own config.json: transformers, which reads that for the
# tokenizer, takes a rope_scaling for a table of rotations
TABLES = ("wte.weight", "lm_head.weight")  # a row a token: padded here, not in files
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")  # of transformers' Qwen2Tokenizer
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # others hold parts of a number, without scale


def open_pretrained(source: str, **overrides: Any) -> tuple[LanguageModel, State]:
    """The model at any source that `resolve` knows, on the meta device, and what its parameters are made of (see `fill`
    and `make_parameter`). `overrides` replace fields of the configuration. Raises ValueError or OSError."""
    path = resolve(source)
    config, state = load_nanogpt(path) if path.is_file() else load_huggingface(path)
    for key, value in overrides.items():
        setattr(config, key, value)
    return build_empty(config), state


def fill(model: LanguageModel, state: State, device: torch.device | str = "cpu") -> None:
    """Make the parameters of a model on the meta device, each on `device` before the next. Empties `state`."""
    made = {name: make_parameter(state.pop(name), p.shape).to(device) for name, p in model.named_parameters()}
    model.load_state_dict(made, assign=True)


def resolve(source: str, hub_files: Sequence[str] = (*WEIGHT_FILES, *TOKENIZER_FILES)) -> Path:
    """Where a model lies: a nanoGPT .pt file, or a folder with config.json (a run folder means its best checkpoint,
    a hub id its snapshot in the local cache, downloaded when it is not there yet)."""
    path = follow_link(Path(source))
    if path.is_file():
        return path
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else best_checkpoint(path) or newest_checkpoint(path)
        if folder and not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json: it is not a complete checkpoint; copy it again, or "
                                    "choose another with --init_from")
        if folder:
            return folder.resolve()  # the checkpoint itself: a run that is under way moves the link
        if (path / "ckpt.pt").is_file():  # nanoGPT's out_dir
            return path / "ckpt.pt"
        if (path / "checkpoints").is_dir():
            raise FileNotFoundError(f"{source} holds a run that has saved no checkpoint yet")
        raise FileNotFoundError(f"{source} holds no model: no config.json, no checkpoints/, no ckpt.pt")
    repo_id = HUB_ALIASES.get(source, source)
    if not HUB_ID.fullmatch(repo_id) or source.endswith(".pt"):
        raise FileNotFoundError(f"no model at {source!r}: neither a file, a folder, a hub id (owner/name) nor one of "
                                f"{', '.join(HUB_ALIASES)}")
    return fetch_snapshot(repo_id, [*hub_files])


def read_shape(source: str) -> GPTConfig:
    """The shape of the model at any source that `resolve` knows, without its weights: GPT-2's own sizes are known, and
    of a hub repository only config.json is fetched. Raises ValueError or OSError."""
    if source in GPT2_SIZES and not Path(source).exists():
        n_layer, n_head, n_embd = GPT2_SIZES[source]
        return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True, mlp="gelu_tanh")
    path = resolve(source, ["config.json"])
    with reading_values(path if path.is_file() else path / "config.json"):
        return _nanogpt_config(path, read_nanogpt(path)) if path.is_file() else _read_config(path)[0]


def full_name(source: str) -> str:
    """A source as it reads from any folder: with the whole path of what lies on this disk, and a hub id as it is."""
    return str(Path(source).absolute()) if follow_link(Path(source)).exists() else HUB_ALIASES.get(source, source)


def load_huggingface(folder: Path) -> tuple[GPTConfig, State]:
    """A Hugging Face folder of one of FAMILIES, or one of our own: config.json and model.safetensors (one file, or
    shards with an index). Raises ValueError for a model of another type, or with a part that model.py does not have."""
    with reading_values(folder / "config.json"):
        config, kind = _read_config(folder)
        state = _read_safetensors(folder)
        return config, _finish(config, FAMILIES[kind].read_state(config, state) if kind in FAMILIES else state, folder)


def _read_config(folder: Path) -> tuple[GPTConfig, str]:
    """What a folder's config.json says: the shape, and the type of the model. Raises as load_huggingface."""
    path = folder / "config.json"
    settings = read_json(path)
    kind = settings.get("model_type")
    if kind == "flatgpt":
        return _make_config(path, {field.name: settings[key] for field in fields(GPTConfig)
                                   for key in (field.name, OWN_NAMES.get(field.name)) if key in settings}), kind
    if kind not in FAMILIES:
        *names, last = FAMILIES
        raise ValueError(f"{folder}: model_type is {kind!r}, and only {', '.join(names)} and {last} can be loaded")
    values, faults = FAMILIES[kind].read_config(settings)
    if faults:
        raise ValueError(f"{path} asks for features that flatGPT does not have: {', '.join(faults)}")
    return _make_config(path, values), kind


def _make_config(path: Path, values: dict) -> GPTConfig:
    """A valid configuration from a file's values. Raises ValueError naming the file and the value that is none."""
    for key, value in values.items():
        kind = (int, float) if isinstance(getattr(GPTConfig, key), float) else type(getattr(GPTConfig, key))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{path}: {key} is {value!r}")
    config = GPTConfig(**values)
    check_options(config)
    return config


def load_nanogpt(path: Path) -> tuple[GPTConfig, State]:
    """nanoGPT's ckpt.pt: `model_args`, and `model`."""
    checkpoint = read_nanogpt(path)
    with reading_values(path):
        config = _nanogpt_config(path, checkpoint)
        return config, _finish(config, without_prefixes(checkpoint["model"]), path)


def _nanogpt_config(path: Path, checkpoint: dict) -> GPTConfig:
    args = checkpoint["model_args"]
    return _make_config(path, {"mlp": "gelu", "bias": True} | {key: args[key] for key in (
        "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias") if key in args})


def read_nanogpt(path: Path) -> dict:
    """The dictionary in a ckpt.pt: model, model_args, config, ... Raises ValueError for a file that is something else,
    or that holds objects other than tensors, plain values and NumPy's numbers (they could run code, so they are not
    built)."""
    refuse_pointer(path)
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a broken pickle raises nearly anything
        if isinstance(error, OSError) and error.filename:
            raise
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} holds objects other than tensors and plain values ({named[1]}); it was not "
                             "loaded, because such a file can run code") from None
        with open(path, "rb") as file:
            raise ValueError(f"{path} is not a readable PyTorch checkpoint: its {path.stat().st_size:,} bytes, which "
                             f"begin with {file.read(16)!r}, are incomplete or of another kind") from None
    parts = [checkpoint.get(key) for key in ("model", "model_args")] if isinstance(checkpoint, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is not nanoGPT's: a dictionary with 'model' and 'model_args' was expected")
    if not all(isinstance(tensor, torch.Tensor) for tensor in checkpoint["model"].values()):
        raise ValueError(f"{path} is not nanoGPT's: 'model' should hold tensors only")
    return checkpoint


def _read_safetensors(folder: Path) -> State:
    """All tensors, mapped from the files."""
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{index} does not say which tensor is in which file")
        files = [folder / Path(name).name for name in sorted({*shards.values()})]
    state = {}
    for file in files:
        try:
            state |= load_file(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} has no {file.name}: weights are read from safetensors only") from None
        except SafetensorError as error:
            raise ValueError(broken(file, f": {error}")) from None
    return state


def _finish(config: GPTConfig, state: State, path: Path) -> State:
    """Drop a tied head, and check that every parameter is there in its shape, and no other."""
    if config.tie_embeddings:
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state.setdefault("wte.weight", head)):
            raise ValueError(f"{path}: the head differs from the token table, but config.json says that they are tied")
    wanted = shapes(config)
    in_files = {name: torch.Size([config.vocab_size, *shape[1:]]) if name in TABLES else shape
                for name, shape in wanted.items()}
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    found = sorted(wanted.keys() & state.keys())
    misshapen = [name for name in found if _shape(state[name]) != in_files[name]]
    quantized = [name for name in found if any(part.dtype not in DTYPES for part in _parts(state[name]))]
    faults = [f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for what, names in (
        ("missing", missing), ("unknown", unknown), ("of another shape than config.json says", misshapen),
        ("of other number types than float32, float16, bfloat16 and float64", quantized)) if names]
    if faults:
        raise ValueError(f"{path}: parameters {'; '.join(faults)}")
    return state


def _parts(found: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return found if isinstance(found, list) else [found]


def _shape(found: torch.Tensor | list[torch.Tensor]) -> torch.Size | None:
    """Of the parameter that is made of it; None for parts that do not fit each other."""
    parts = _parts(found)
    if len({part.shape[1:] for part in parts}) > 1:
        return None
    return torch.Size([sum(map(len, parts)), *parts[0].shape[1:]])


def make_parameter(found: torch.Tensor | list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """A copy of what a file has, as float32 of this shape: rows of zeros are added at the end, or rows there are cut
    off. The file is mapped, and another program may write to it later."""
    parameter, start = torch.empty(shape), 0
    for part in _parts(found):
        rows = parameter[start:start + len(part)]
        rows.copy_(part[:len(rows)])
        start += len(rows)
    parameter[start:] = 0
    return parameter


def shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name -> shape of every parameter of a model."""
    return {name: p.shape for name, p in build_empty(config).state_dict().items()}


def save_pretrained(config: GPTConfig, state: Mapping[str, torch.Tensor], folder: str | Path,
                    eot_id: int | None = None, token_ids: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors, which transformers loads where the model fits
    one of FAMILIES. `eot_id` becomes the begin- and end-of-text id, None means none; `token_ids` says more of them: see
    Tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id}
    token_ids = token_ids or {"config.json": ids, "generation_config.json": ids}
    state = {name: tensor.detach().float().cpu()[:config.vocab_size if name in TABLES else None]
             for name, tensor in state.items()}
    kind = family_of(config)
    if kind:
        family, is_a = FAMILIES[kind], {"architectures": [FAMILIES[kind].architecture], "model_type": kind}
        settings, tensors = is_a | family.write_config(config), family.write_state(config, state)
    else:
        settings, tensors = {"architectures": ["FlatGPT"], "model_type": "flatgpt"}, state
        settings |= {OWN_NAMES.get(key, key): value for key, value in asdict(config).items()}
    write_json(folder / "config.json", settings | token_ids["config.json"] | {"torch_dtype": "float32"})
    write_json(folder / "generation_config.json", token_ids["generation_config.json"])
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def save_tokenizer(config: GPTConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's files beside the model that it is for.

    Of a model in Qwen2's shape transformers 5 takes the vocabulary alone, splits text as Qwen2 does, and heeds no
    tokenizer_class, unless an auto_map names code. Without trust_remote_code it then goes by tokenizer.json and runs
    nothing; here nothing is named either. Qwen2's own tokenizer needs none of that."""
    tokenizer.save(folder, model_max_length=config.block_size)
    splits = (json.loads(tokenizer.hf.to_str())["pre_tokenizer"] or {}).get("pretokenizers", [])
    if family_of(config) == "qwen2" and {"Regex": QWEN2_SPLIT} not in [split.get("pattern") for split in splits]:
        path = folder / "tokenizer_config.json"
        write_json(path, read_json(path) | {"auto_map": {"AutoTokenizer": ["", ""]}})


def save_tensors(tensors: State, path: Path) -> None:
    """Write a safetensors file with mode 0644. Raises OSError (safetensors has an error of its own for a full disk)."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers insists on this key
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from None
    with contextlib.suppress(OSError):  # a disk without modes
        path.chmod(0o644)
