"""The kinds of action tokenizers: learnt codebooks, one (``vq``) or several (``rvq``), and ``fast``."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.action_tokenizer.fast import FastConfig, FastTokenizer

Tokenizer = ActionTokenizer | FastTokenizer


def make(sizes: Mapping[str, Any], rngs: nnx.Rngs) -> Tokenizer:
    """Makes an untrained tokenizer from the JSON form of its config, which ``dataclasses.asdict`` gives."""
    if "merges" in sizes:
        return FastTokenizer(FastConfig(**sizes))
    return ActionTokenizer(TokenizerConfig(**sizes), rngs=rngs)


def kind(config: TokenizerConfig | FastConfig) -> str:
    """Returns the name of the adapter that a tokenizer is for."""
    if isinstance(config, FastConfig):
        return "fast"
    return "vq" if config.quantizers == 1 else "rvq"
