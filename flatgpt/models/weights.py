"""Other people's names and layouts: Hugging Face's GPT-2 and Llama, folders and hub ids, nanoGPT's ckpt.pt.

Owns the translation between `(GPTConfig, state dict)` of model.py and files. It returns no model, and nothing it
loads can run code: safetensors hold numbers only, and ckpt.pt goes through torch's weights-only unpickler.

A parameter's way, taking the first MLP matrix of GPT-2 small:

    Hugging Face   transformer.h.0.mlp.c_fc.weight            (768, 3072)  Conv1D: x @ W
    OpenAI's file              h.0.mlp.c_fc.weight            (768, 3072)
    nanoGPT        _orig_mod.transformer.h.0.mlp.c_fc.weight  (3072, 768)  nn.Linear: x @ W.T
    here                       h.0.mlp.c_fc.weight            (3072, 768)

A model that is shaped as neither GPT-2 nor Llama is written under our own names, and only flatGPT reads it.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flatgpt.data.tokenizer import TOKENIZER_FILES
from flatgpt.files import HUB_ID, broken, fetch_snapshot, read_json, reading_values, refuse_pointer, write_json
from flatgpt.models.baselines import build_empty
from flatgpt.models.positions import HIGH_FREQ_FACTOR, LOW_FREQ_FACTOR
from flatgpt.options import check_options
from flatgpt.pickles import STAND_INS
from flatgpt.run_folder import best_checkpoint, follow_link, newest_checkpoint
from model import GPTConfig

HUB_ALIASES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
               "relu2": "relu2"}  # Hugging Face's names for GPT-2's activation -> ours
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D
ATTENTION_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # buffers in old files, not parameters
LLAMA = {  # ours -> Llama's
    "wte.weight": "model.embed_tokens.weight", "ln_f.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight"}
LLAMA_BLOCK = {  # of a block, and where there are several their rows lie below each other in ours
    "ln_1.weight": ["input_layernorm.weight"], "ln_2.weight": ["post_attention_layernorm.weight"],
    "attn.c_attn.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attn.c_proj.weight": ["self_attn.o_proj.weight"], "mlp.c_proj.weight": ["mlp.down_proj.weight"],
    "mlp.c_fc.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]}

WEIGHT_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]  # of a hub repository
TABLES = ("wte.weight", "lm_head.weight")  # a row a token: padded here, not in files
State = dict[str, torch.Tensor]


def load_pretrained(source: str) -> tuple[GPTConfig, State]:
    """Configuration and float32 state dict of any source that `resolve` knows. Raises ValueError or OSError."""
    path = resolve(source)
    return load_nanogpt(path) if path.is_file() else load_huggingface(path)


def resolve(source: str) -> Path:
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
    return fetch_snapshot(repo_id, [*WEIGHT_FILES, *TOKENIZER_FILES])


def full_name(source: str) -> str:
    """A source as it reads from any folder: with the whole path of what lies on this disk, and a hub id as it is."""
    return str(Path(source).absolute()) if follow_link(Path(source)).exists() else HUB_ALIASES.get(source, source)


def load_huggingface(folder: Path) -> tuple[GPTConfig, State]:
    """A Hugging Face GPT-2 or Llama folder, or one of our own: config.json and model.safetensors (one file, or shards
    with an index). Raises ValueError for a model of another type, or with a part that model.py does not have."""
    path = folder / "config.json"
    with reading_values(path):
        settings = read_json(path)
        kind = settings.get("model_type")
        own = {field.name: settings[field.name] for field in fields(GPTConfig) if field.name in settings}
        readers = {"gpt2": (_gpt2_config, _from_gpt2), "llama": (_llama_config, _from_llama),
                   "flatgpt": (lambda settings: (own, []), lambda config, state: state)}
        if kind not in readers:
            raise ValueError(f"{folder}: model_type is {kind!r}, and only gpt2 and llama can be loaded")
        read_config, rename = readers[kind]
        values, faults = read_config(settings)
        if faults:
            raise ValueError(f"{path} asks for features that flatGPT does not have: {', '.join(faults)}")
        config = _make_config(path, values)
        state = rename(config, _read_safetensors(folder))
        if kind == "gpt2":
            config.bias = (settings.get("flatgpt") or {}).get("bias", True) or any(
                name.endswith(".bias") and bool(tensor.any()) for name, tensor in state.items())
            if not config.bias:
                state = {name: tensor for name, tensor in state.items() if not name.endswith(".bias")}
        return config, _finish(config, state, folder)


def _gpt2_config(settings: dict) -> tuple[dict[str, Any], list[str]]:
    """The values of our configuration, and what model.py does not have. The fall-backs are transformers' defaults for
    keys that config.json may leave out."""
    activation = str(settings.get("activation_function", "gelu_new"))
    faults = [key for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention") if settings.get(key)]
    if not settings.get("scale_attn_weights", True):
        faults.append("scale_attn_weights=False")
    if activation not in ACTIVATIONS:
        faults.append(f"activation_function={activation}")
    return {"block_size": settings.get("n_positions", 1024), "vocab_size": settings.get("vocab_size", 50257),
            "n_layer": settings.get("n_layer", 12), "n_head": settings.get("n_head", 12),
            "n_embd": settings.get("n_embd", 768), "mlp_hidden": settings.get("n_inner") or 0,
            "dropout": settings.get("resid_pdrop", 0.1), "norm_eps": settings.get("layer_norm_epsilon", 1e-5),
            "tie_embeddings": settings.get("tie_word_embeddings", True), "mlp": ACTIVATIONS.get(activation, "gelu"),
            "pos": (settings.get("flatgpt") or {}).get("pos", "learned")}, faults


def _llama_config(settings: dict) -> tuple[dict[str, Any], list[str]]:
    rope, faults = _llama_rope(settings)
    width, n_head = settings.get("hidden_size", 4096), settings.get("num_attention_heads", 32)
    head_dim = settings.get("head_dim") or width // n_head
    activation = settings.get("hidden_act", "silu")
    faults += [key for key in ("attention_bias", "mlp_bias") if settings.get(key)]
    if activation != "silu":
        faults.append(f"hidden_act={activation}")
    if head_dim * n_head != width:
        faults.append(f"head_dim={head_dim} with {n_head} heads of {width} channels")
    return {"block_size": settings.get("max_position_embeddings", 2048),
            "vocab_size": settings.get("vocab_size", 32000), "n_layer": settings.get("num_hidden_layers", 32),
            "n_head": n_head, "n_kv_head": settings.get("num_key_value_heads") or 0, "n_embd": width,
            "mlp_hidden": settings.get("intermediate_size", 11008), "norm_eps": settings.get("rms_norm_eps", 1e-6),
            "tie_embeddings": settings.get("tie_word_embeddings", False), "dropout": 0.0, "bias": False,
            "pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", **rope}, faults


def _llama_rope(settings: dict) -> tuple[dict[str, Any], list[str]]:
    """As `_llama_config`, of the rotations alone. Where a file has both names, transformers takes `rope_scaling`."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    values = {"rope_theta": rope.get("rope_theta") or settings.get("rope_theta") or 10000.0}
    if kind != "llama3":
        return values, [] if kind == "default" else [f"rope_type={kind}"]
    values |= {"rope_factor": rope.get("factor"),
               "rope_original_block_size": rope.get("original_max_position_embeddings")}
    return values, [f"{key}={rope.get(key)} (every published Llama 3 has {bound})" for key, bound in (
        ("low_freq_factor", LOW_FREQ_FACTOR), ("high_freq_factor", HIGH_FREQ_FACTOR)) if rope.get(key) != bound]


def _without_prefixes(theirs: State) -> State:
    """GPT-2's parameters without what transformers and torch.compile put before their names."""
    state = {name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    return {name: tensor.float() for name, tensor in state.items() if not ATTENTION_MASKS.fullmatch(name)}


def _from_gpt2(config: GPTConfig, theirs: State) -> State:
    return {name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
            for name, tensor in _without_prefixes(theirs).items()}


def _from_llama(config: GPTConfig, theirs: State) -> State:
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("rotary_emb.inv_freq")}  # a buffer
    state = {ours: theirs.pop(name) for ours, name in LLAMA.items() if name in theirs}
    for layer in range(config.n_layer):
        for ours, names in LLAMA_BLOCK.items():
            names = [f"model.layers.{layer}.{name}" for name in names]
            if all(name in theirs for name in names):
                state[f"h.{layer}.{ours}"] = torch.cat([theirs.pop(name) for name in names])
    return state | theirs  # what is left over is named as unknown


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
        args = checkpoint["model_args"]
        config = _make_config(path, {"mlp": "gelu"} | {key: args[key] for key in (
            "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias") if key in args})
        return config, _finish(config, _without_prefixes(checkpoint["model"]), path)


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
    """All tensors, as float32."""
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        files = [folder / Path(name).name for name in sorted({*read_json(index).get("weight_map", {}).values()})]
    state = {}
    for file in files:
        try:
            state |= {name: tensor.float() for name, tensor in load_file(file).items()}
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} has no {file.name}: weights are read from safetensors only") from None
        except SafetensorError as error:
            raise ValueError(broken(file, f": {error}")) from None
    return state


def _finish(config: GPTConfig, state: State, path: Path) -> State:
    """Drop a tied head, pad the vocabulary, and check that every parameter is there in its shape, and no other."""
    if config.tie_embeddings:
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state.setdefault("wte.weight", head)):
            raise ValueError(f"{path}: the head differs from the token table, but config.json says that they are tied")
    wanted = shapes(config)
    for name in TABLES:
        if name in state and name in wanted:
            padding = max(0, wanted[name][0] - state[name].size(0))
            state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, padding))
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & state.keys() if state[name].shape != wanted[name])
    faults = [f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for what, names in (
        ("missing", missing), ("unknown", unknown), ("of another shape than config.json says", misshapen)) if names]
    if faults:
        raise ValueError(f"{path}: parameters {'; '.join(faults)}")
    return state


def shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name -> shape of every parameter of a model."""
    return {name: p.shape for name, p in build_empty(config).state_dict().items()}


def save_pretrained(config: GPTConfig, state: Mapping[str, torch.Tensor], folder: str | Path,
                    eot_id: int | None = None, token_ids: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors, which transformers loads as GPT2LMHeadModel or
    LlamaForCausalLM where the model has that shape. `eot_id` becomes the begin- and end-of-text id, None means none;
    `token_ids` says more of them: see Tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id}
    token_ids = token_ids or {"config.json": ids, "generation_config.json": ids}
    state = {name: tensor.detach().float().cpu()[:config.vocab_size if name in TABLES else None]
             for name, tensor in state.items()}
    if is_gpt2(config) or is_llama(config):
        settings, tensors = (_to_gpt2 if is_gpt2(config) else _to_llama)(config, state)
    else:
        settings, tensors = {"architectures": ["FlatGPT"], "model_type": "flatgpt", **asdict(config)}, state
    write_json(folder / "config.json", settings | token_ids["config.json"] | {"torch_dtype": "float32"})
    write_json(folder / "generation_config.json", token_ids["generation_config.json"])
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def is_gpt2(config: GPTConfig) -> bool:
    return (config.model == "gpt" and config.pos.startswith("learned") and config.mlp in ACTIVATIONS.values()
            and config.num_kv_heads == config.n_head
            and (config.norm, config.norm_position, config.qk_norm) == ("layernorm", "pre", False))


def is_llama(config: GPTConfig) -> bool:
    return (config.model == "gpt" and (config.pos, config.mlp, config.bias) == ("rope", "swiglu", False)
            and (config.norm, config.norm_position, config.qk_norm) == ("rmsnorm", "pre", False))


def _to_gpt2(config: GPTConfig, state: State) -> tuple[dict[str, Any], State]:
    """GPT-2 always has biases there: absent ones are written as zeros, and `flatgpt.bias` remembers them."""
    activation = {"gelu_tanh": "gelu_new"}.get(config.mlp, config.mlp)
    with_biases = shapes(replace(config, bias=True))
    state = {name: state[name] if name in state else torch.zeros(shape) for name, shape in with_biases.items()}
    settings = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.n_embd,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": config.mlp_hidden or None,
        "activation_function": activation, "resid_pdrop": config.dropout, "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout, "layer_norm_epsilon": config.norm_eps, "initializer_range": 0.02,
        "scale_attn_weights": True, "use_cache": True, "tie_word_embeddings": config.tie_embeddings,
        "flatgpt": {"bias": config.bias, "pos": config.pos}}
    return settings, {name if name == "lm_head.weight" else f"transformer.{name}":
                      tensor.t() if name.endswith(TRANSPOSED) else tensor for name, tensor in state.items()}


def _to_llama(config: GPTConfig, state: State) -> tuple[dict[str, Any], State]:
    head_dim = config.n_embd // config.n_head
    rows = {"attn.c_attn.weight": [head_dim * heads for heads in (config.n_head, *[config.num_kv_heads] * 2)],
            "mlp.c_fc.weight": [config.hidden] * 2}
    tensors = {theirs: state[ours] for ours, theirs in LLAMA.items() if ours in state}
    for layer in range(config.n_layer):
        for ours, names in LLAMA_BLOCK.items():
            tensor = state[f"h.{layer}.{ours}"]
            for name, part in zip(names, tensor.split(rows.get(ours, [tensor.size(0)]))):
                tensors[f"model.layers.{layer}.{name}"] = part
    rope = {"rope_type": "default"}
    if config.rope_original_block_size:
        rope = {"rope_type": "llama3", "factor": float(config.rope_factor), "low_freq_factor": float(LOW_FREQ_FACTOR),
                "high_freq_factor": float(HIGH_FREQ_FACTOR),
                "original_max_position_embeddings": config.rope_original_block_size}
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size, "hidden_size": config.n_embd, "head_dim": head_dim,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.num_kv_heads, "intermediate_size": config.hidden, "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta}, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "tie_word_embeddings": config.tie_embeddings}
    if config.rope_original_block_size:
        settings["rope_scaling"] = rope  # transformers 4's name; it warns of a rope_theta in there
    return settings, tensors


def save_tensors(tensors: State, path: Path) -> None:
    """Write a safetensors file with mode 0644. Raises OSError (safetensors has an error of its own for a full disk)."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers insists on this key
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from None
    with contextlib.suppress(OSError):  # a disk without modes
        path.chmod(0o644)
