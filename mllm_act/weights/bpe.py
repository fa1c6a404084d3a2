"""Converts the byte-level BPE tokenizer inside a GGUF file to a ``tokenizer.json`` and the files beside it.

``transformers`` can read such a tokenizer too, but only with PyTorch, and it does not split numbers into digits as
SmolLM2 does.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mllm_act.errors import UserError
from mllm_act.weights.text_files import GENERATION

_CONTROL = 3  # token_type of special tokens such as <|im_start|>


def tokenizer_json(metadata: dict[str, Any], path: Path) -> str:
    """Returns the ``tokenizer.json`` of a GGUF file's tokenizer.

    Args:
      metadata: of the file; ``tokenizer.ggml.{model,pre,tokens,merges,token_type}`` are read.
      path: the file, for error messages.

    Raises:
      UserError: if the tokenizer is not of SmolLM's kind.
    """
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UserError(
            f"{path}: expected a tokenizer of model 'gpt2', pre-tokenizer 'smollm', found {kind}; "
            "convert the model to a Hugging Face folder with its tokenizer.json, and pass that folder"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer.to_str()


def text_files(metadata: dict[str, Any]) -> dict[str, str]:
    """Returns the files that go with the tokenizer, by name: special tokens, chat template and end token."""
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in keys.items()}
    ids = {ours: index for ours, index in ids.items() if index is not None}
    values = {"tokenizer_class": "PreTrainedTokenizerFast"}
    values |= {f"{name}_token": tokens[index] for name, index in ids.items()}
    if "tokenizer.chat_template" in metadata:
        values["chat_template"] = metadata["tokenizer.chat_template"]
    ends = {f"{name}_token_id": index for name, index in ids.items() if name != "unk"}
    return {
        "tokenizer_config.json": json.dumps(values, indent=1),
        GENERATION: json.dumps(ends, indent=1),
    }
