"""The text files beside a language model's weights: tokenizer, chat template and how a generated text ends."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mllm_act.errors import UserError
from mllm_act.weights.tensors import parsing

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
# Kept from import to export, as they are.
NAMES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LARGEST = 64_000_000  # bytes; a vocabulary of 256,000 takes 33 million
_GROWTH = 1000.0  # times; those of released models stay below 10


def read_text(path: Path) -> str:
    """Returns the text of a file.

    Raises:
      UserError: if it is too large for a text file of a model, or not UTF-8.
    """
    size = path.stat().st_size
    if size > _LARGEST:
        raise UserError(
            f"{path}: expected at most {_LARGEST:,} bytes, found {size:,}; download it again"
        )
    with parsing(path, "a text file"):
        return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file.

    Raises:
      UserError: if it is not one.
    """
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found {error}; download it again") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected a JSON object, found {type(values).__name__}; download it again"
        )
    return values


def read_text_files(folder: Path) -> dict[str, str]:
    """Returns those of ``NAMES`` that a folder has, by name.

    Raises:
      UserError: if one is too large or not in its format.
    """
    names = [name for name in NAMES if (folder / name).is_file()]
    for name in names:
        if name.endswith(".json"):
            read_json(folder / name)
    return {name: read_text(folder / name) for name in names}


def read_tokenizer(path: Path) -> str:
    """Returns the text of a ``tokenizer.json``, unchanged.

    Raises:
      UserError: if the ``tokenizers`` library cannot read it, or its normalizer makes texts much longer: a few
        replacements in a row can turn one letter into gigabytes.
    """
    values = read_json(path)
    with parsing(path, "a tokenizer.json"):
        growth = max(_growth(values.get("normalizer")), _growth(values.get("decoder")))
    if growth > _GROWTH:
        raise UserError(
            f"{path}: expected a normalizer under which a text grows at most {_GROWTH:g} times, found one of "
            f"{growth:g} times; use the tokenizer.json of the model's publisher"
        )
    text = read_text(path)
    with parsing(path, "a tokenizer.json"):
        Tokenizer.from_str(text)
    return text


def generation_config(files: Mapping[str, str], ends: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the model's ``generation_config.json``; ``ends`` are ids for the ``ENDS`` that it lacks."""
    with parsing(Path(GENERATION), "a JSON object"):
        values = json.loads(files.get(GENERATION, "{}"))
        return {key: ends[key] for key in ENDS if ends.get(key) is not None} | {
            key: value for key, value in values.items() if value is not None
        }


def _growth(normalizer: Any) -> float:
    """How many times longer a normalizer can make a text, at most, by its replacements."""
    if not isinstance(normalizer, dict):
        return 1.0
    if normalizer.get("type") == "Sequence":
        growth = 1.0
        for step in normalizer.get("normalizers") or normalizer.get("decoders") or ():
            growth = min(growth * _growth(step), 1e9)
        return growth
    if normalizer.get("type") == "Prepend":
        return 1.0 + len(str(normalizer.get("prepend") or ""))
    if normalizer.get("type") != "Replace":
        return 1.0
    pattern = normalizer.get("pattern")
    fixed = str(pattern.get("String") or "") if isinstance(pattern, dict) else ""
    content = str(normalizer.get("content") or "")
    # A regular expression may match a single character or, as an empty pattern does, between any two.
    return max(1.0, len(content) / len(fixed) if fixed else 1.0 + len(content))
