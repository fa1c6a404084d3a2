"""The byte-level BPE tokenizer that a GGUF file carries, as a ``tokenizer.json``."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mllm_act.errors import UserError

_CONTROL = 3  # token_type of markers such as <|im_start|>


def tokenizer_json(facts: dict[str, Any], path: Path) -> str:
    """Rebuilds the tokenizer from a file's metadata.

    Args:
      facts: the metadata; ``tokenizer.ggml.{model,pre,tokens,merges,token_type}`` are read.
      path: the file, for the message.

    Raises:
      UserError: if the tokenizer is of another kind than SmolLM's.
    """
    kind = (facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UserError(
            f"{path}: expected a tokenizer of model 'gpt2', pre-tokenizer 'smollm', found {kind}; "
            "convert the model to Hugging Face's layout, with its tokenizer.json, and pass that folder"
        )
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    markers = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    return tokenizer.to_str()
