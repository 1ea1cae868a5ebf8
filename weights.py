"""Other people's names and layouts: Hugging Face GPT-2 folders and hub ids, nanoGPT's ckpt.pt, in and out.

Owns the translation between `(GPTConfig, state dict)` of model.py and files. It never builds a model, and nothing it
loads can run code: safetensors hold numbers only, and ckpt.pt goes through torch's weights-only unpickler.

A parameter's way, taking the first MLP matrix of GPT-2 small:

    Hugging Face   transformer.h.0.mlp.c_fc.weight            (768, 3072)  Conv1D: x @ W
    OpenAI's file              h.0.mlp.c_fc.weight            (768, 3072)
    nanoGPT        _orig_mod.transformer.h.0.mlp.c_fc.weight  (3072, 768)  nn.Linear: x @ W.T
    here                       h.0.mlp.c_fc.weight            (3072, 768)
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from baselines import build
from files import read_json, write_json
from model import GPTConfig

HUB_ALIASES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # Hugging Face -> ours
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D
ATTENTION_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # buffers in old files, not parameters

State = dict[str, torch.Tensor]


def load_pretrained(source: str) -> tuple[GPTConfig, State]:
    """Configuration and float32 state dict of any source that `resolve` knows. Raises ValueError or OSError."""
    path = resolve(source)
    if path.is_file():
        return load_nanogpt(path)
    return load_huggingface(path)


def resolve(source: str) -> Path:
    """Where a model lies: a nanoGPT .pt file, or a folder with config.json (a run folder means its best checkpoint,
    a hub id its snapshot in the local cache, downloaded when it is not there yet)."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        for folder in (path, path / "checkpoints" / "best", path / "checkpoints" / "latest"):
            if (folder / "config.json").is_file():
                return folder.resolve()  # the checkpoint itself: a run that is under way moves the link
        if (path / "ckpt.pt").is_file():  # nanoGPT's out_dir
            return path / "ckpt.pt"
        raise FileNotFoundError(f"{source} holds no model: no config.json, no checkpoints/, no ckpt.pt")
    repo_id = HUB_ALIASES.get(source, source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or source.endswith(".pt"):
        raise FileNotFoundError(f"no model at {source!r}: neither a file, a folder, a hub id (owner/name) nor one of "
                                f"{', '.join(HUB_ALIASES)}")
    return _download(repo_id)


def _download(repo_id: str) -> Path:
    """Snapshot folder of a hub repository; files already in the cache are not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*.json"]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"could not get {repo_id} from the hub, and the cache does not hold it: {reason} "
                      f"(without network: copy its folder here and pass --init_from=FOLDER)") from None


def load_huggingface(folder: Path) -> tuple[GPTConfig, State]:
    """A Hugging Face GPT-2 folder: config.json and model.safetensors (one file, or shards with an index)."""
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    if settings.get("model_type") == "flatgpt":
        return load_own(settings, folder)
    config = _config_from_huggingface(settings, folder)
    state = {}
    for name, tensor in _read_safetensors(folder).items():
        name = name.removeprefix("transformer.")
        if ATTENTION_MASKS.fullmatch(name):
            continue
        state[name] = tensor.float().t().contiguous() if name.endswith(TRANSPOSED) else tensor.float()
    config.bias = (settings.get("flatgpt") or {}).get("bias", True) or _any_bias(state)
    if not config.bias:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".bias")}
    return config, _finish(config, state, folder)


def load_own(settings: dict, folder: Path) -> tuple[GPTConfig, State]:
    """A model that is neither a GPT-2 nor a Llama, as `save_own` writes it. Raises ValueError."""
    fields = asdict(GPTConfig())
    config = _make_config(folder / "config.json", {key: value for key, value in settings.items() if key in fields})
    state = {name: tensor.float() for name, tensor in _read_safetensors(folder).items()}
    if {name: tensor.shape for name, tensor in state.items()} != shapes(config):
        raise ValueError(f"{folder}: the parameters are not those that config.json speaks of")
    return config, state


def save_own(config: GPTConfig, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """The configuration, and the tensors under their own names, padding included."""
    write_json(folder / "config.json", {"model_type": "flatgpt", **asdict(config)})
    save_tensors({name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()},
                 folder / "model.safetensors")


def _config_from_huggingface(settings: dict, folder: Path) -> GPTConfig:
    """Raises ValueError for a model that is no GPT-2, or a GPT-2 with a part that model.py does not have."""
    if settings.get("model_type") != "gpt2":
        raise ValueError(f"{folder}: model_type is {settings.get('model_type')!r}, and only gpt2 can be loaded")
    activation = str(settings.get("activation_function", "gelu_new"))
    hidden, width = settings.get("n_inner"), settings.get("n_embd", 768)
    faults = [key for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention") if settings.get(key)]
    if not settings.get("scale_attn_weights", True):
        faults.append("scale_attn_weights=False")
    if not settings.get("tie_word_embeddings", True):
        faults.append("tie_word_embeddings=False")
    if activation not in ACTIVATIONS:
        faults.append(f"activation_function={activation}")
    if hidden is not None and hidden != 4 * width:
        faults.append(f"n_inner={hidden}")
    if faults:
        raise ValueError(f"{folder}/config.json asks for what this GPT-2 does not have: {', '.join(faults)}")
    # The fall-backs are transformers' defaults for keys that config.json may leave out.
    return _make_config(folder / "config.json", {
        "block_size": settings.get("n_positions", 1024), "vocab_size": settings.get("vocab_size", 50257),
        "n_layer": settings.get("n_layer", 12), "n_head": settings.get("n_head", 12),
        "n_embd": settings.get("n_embd", 768), "dropout": settings.get("resid_pdrop", 0.1),
        "norm_eps": settings.get("layer_norm_epsilon", 1e-5), "mlp": ACTIVATIONS[activation]})


def _make_config(path: Path, values: dict) -> GPTConfig:
    """A valid configuration from a file's values. Raises ValueError naming the file and the value that is none."""
    for key, value in values.items():
        kind = (int, float) if key in ("dropout", "norm_eps", "rope_theta") else type(getattr(GPTConfig, key))
        if not isinstance(value, kind):
            raise ValueError(f"{path}: {key} is {value!r}")
    config = GPTConfig(**values)
    config.validate()
    return config


def load_nanogpt(path: Path) -> tuple[GPTConfig, State]:
    """nanoGPT's ckpt.pt: `model_args`, and `model` with the prefixes that torch.compile leaves."""
    checkpoint = read_nanogpt(path)
    args = checkpoint["model_args"]
    config = _make_config(path, {"mlp": "gelu"} | {key: args[key] for key in (
        "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias") if key in args})
    state = {name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor.float()
             for name, tensor in checkpoint["model"].items()}
    state = {name: tensor for name, tensor in state.items() if not ATTENTION_MASKS.fullmatch(name)}
    return config, _finish(config, state, path)


def read_nanogpt(path: Path) -> dict:
    """The dictionary in a ckpt.pt: model, model_args, config, ... Raises ValueError for a file that is something else,
    or that holds objects other than tensors and plain values (they could run code, so they are not built)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds objects other than tensors and plain values; it was not loaded, "
                         "because such a file can run code") from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a readable PyTorch checkpoint: {str(error).splitlines()[0]}") from None
    parts = [checkpoint.get(key) for key in ("model", "model_args")] if isinstance(checkpoint, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is not nanoGPT's: a dictionary with 'model' and 'model_args' was expected")
    if not all(isinstance(tensor, torch.Tensor) for tensor in checkpoint["model"].values()):
        raise ValueError(f"{path} is not nanoGPT's: 'model' should hold tensors only")
    return checkpoint


def _read_safetensors(folder: Path) -> State:
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        names = set(read_json(index).get("weight_map", {}).values())
        files = [folder / Path(name).name for name in sorted(names)]
    state = {}
    for file in files:
        try:
            state.update(load_file(file))
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} has no {file.name}: weights are read from safetensors only") from None
        except SafetensorError as error:
            raise ValueError(f"{file} is broken: {error}") from None
    return state


def _any_bias(state: State) -> bool:
    return any(name.endswith(".bias") and bool(tensor.any()) for name, tensor in state.items())


def _finish(config: GPTConfig, state: State, path: Path) -> State:
    """Drop the tied head, pad the vocabulary, and check that every parameter is there in its shape, and no other."""
    head = state.pop("lm_head.weight", None)
    table = state.get("wte.weight")
    if head is not None and table is None:
        table = head
    if head is not None and not torch.equal(head, table):
        raise ValueError(f"{path}: the head differs from the token table, but they are one here (tied)")
    if table is not None:
        padding = max(0, config.padded_vocab_size - table.size(0))
        state["wte.weight"] = torch.nn.functional.pad(table, (0, 0, 0, padding))
    wanted = shapes(config)
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & state.keys() if state[name].shape != wanted[name])
    faults = [f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for what, names in (
        ("missing", missing), ("unknown", unknown), ("of another shape than config.json says", misshapen)) if names]
    if faults:
        raise ValueError(f"{path}: parameters {'; '.join(faults)}")
    return state


def shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name -> shape of every parameter of a model."""
    with torch.device("meta"):
        return {name: p.shape for name, p in build(config).state_dict().items()}


def save_pretrained(config: GPTConfig, state: Mapping[str, torch.Tensor], folder: str | Path,
                    eot_id: int | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors, which transformers loads as GPT2LMHeadModel.

    GPT-2 there always has biases and no padding: absent biases are written as zeros (and `flatgpt.bias` in config.json
    remembers them), padding rows are cut off. `eot_id` becomes the begin- and end-of-text id, None means none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config.model != "gpt":
        return save_own(config, state, folder)
    hf_activation = {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.mlp]
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.n_embd,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": None, "activation_function": hf_activation,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps, "initializer_range": 0.02, "scale_attn_weights": True,
        "use_cache": True, "tie_word_embeddings": True, "bos_token_id": eot_id, "eos_token_id": eot_id,
        "torch_dtype": "float32", "flatgpt": {"bias": config.bias},
    })
    write_json(folder / "generation_config.json", {"bos_token_id": eot_id, "eos_token_id": eot_id})
    tensors = {}
    for name, shape in shapes(GPTConfig(**{**asdict(config), "bias": True})).items():
        tensor = state[name].detach().float().cpu() if name in state else torch.zeros(shape)
        if name == "wte.weight":
            tensor = tensor[:config.vocab_size]
        tensors[f"transformer.{name}"] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    save_tensors(tensors, folder / "model.safetensors")


def save_tensors(tensors: State, path: Path) -> None:
    """Write a safetensors file with mode 0644. Raises OSError (safetensors has an error of its own for a full disk)."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers insists on this key
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from None
    path.chmod(0o644)
