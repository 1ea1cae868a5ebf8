"""What a model is made of, by part: parameters, and the floating-point operations of a token.

A part is what a reader of model.py knows by name: tables, attention, MLPs, norms, head. Padding rows of the vocabulary,
which no checkpoint has, are left out, so that the numbers are those that are published.
"""

from __future__ import annotations

from collections import Counter

from flatgpt.models.generate import cache_slots
from model import LanguageModel

PARTS = {"wte": "token table", "wpe": "position table", "attn": "attention", "mlp": "MLP", "ln_1": "norms",
         "ln_2": "norms", "ln_f": "norms", "lm_head": "head"}  # of the name of a module; baselines have others
LOOKED_UP = ("token table", "position table")  # nothing is multiplied there


def params_by_part(model: LanguageModel) -> dict[str, int]:
    """Part -> parameters; a head that is the token table counts as that."""
    count: Counter[str] = Counter()
    padding = model.config.padded_vocab_size - model.config.vocab_size
    for name, p in model.named_parameters():
        words = name.split(".")
        module = words[2] if words[0] == "h" else words[0]
        rows = padding if name in ("wte.weight", "lm_head.weight") else 0
        count[PARTS.get(module, module)] += p.numel() - rows * p.shape[-1]
    return dict(count)


def flops_by_part(model: LanguageModel) -> dict[str, int]:
    """Part -> operations of a token, forward and backward: 6 for each parameter of a matrix, and 12 L H D T for
    attention's scores and sums (PaLM, arXiv:2204.02311, appendix B), where T is at most the window in a layer that has
    one. The models of baselines.py have no attention. (A bigram multiplies nothing: its MFU is of a product with its
    whole table.)"""
    c, params = model.config, params_by_part(model)
    flops = {part: 6 * count for part, count in params.items() if part not in LOOKED_UP}
    if model.lm_head is None and "token table" in params:
        flops["head"] = 6 * params["token table"]
    if model.h:
        flops["scores"] = 12 * c.n_head * c.head_size * sum(cache_slots(c, c.block_size))
    return flops


def flops_per_token(model: LanguageModel) -> int:
    """Of all parts, see `flops_by_part`."""
    return sum(flops_by_part(model).values())


def recomputed_flops_per_token(model: LanguageModel) -> int:
    """What activation checkpointing adds: a second forward pass of the blocks, a third of theirs. No MFU counts it."""
    return sum(flops for part, flops in flops_by_part(model).items() if part != "head") // 3


def num_non_embedding(model: LanguageModel) -> int:
    """Parameters outside of tables and head, as Kaplan et al. (2020, arXiv:2001.08361) count them."""
    return sum(count for part, count in params_by_part(model).items() if part not in (*LOOKED_UP, "head"))
