"""Bigram, MLP and recurrent language models behind model.py's interface: what a GPT is to be measured against."""

from __future__ import annotations

from model import GPT, GPTConfig, LanguageModel


def build(config: GPTConfig) -> LanguageModel:
    """The model that `config.model` names, freshly initialised."""
    return {"gpt": GPT}[config.model](config)
