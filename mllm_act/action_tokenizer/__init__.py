"""Stage one: action tokenizers, which encode continuous actions as codes and decode them.

There are two classes: an autoencoder with one codebook (``vq``) or several (``rvq``), and ``fast``.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.action_tokenizer.fast import FastConfig, FastTokenizer

Tokenizer = ActionTokenizer | FastTokenizer


def make_tokenizer(config: Mapping[str, Any], rngs: nnx.Rngs) -> Tokenizer:
    """Makes an untrained tokenizer from the JSON form of its config (``dataclasses.asdict``)."""
    if "merges" in config:
        return FastTokenizer(FastConfig(**config))
    return ActionTokenizer(TokenizerConfig(**config), rngs=rngs)
