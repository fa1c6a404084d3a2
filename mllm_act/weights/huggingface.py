"""Reads weights in Hugging Face's layout: a folder with config.json and safetensors shards, local or on the hub."""

import json
import re
from pathlib import Path
from typing import Any

from mllm_act.errors import UserError
from mllm_act.weights import configs, safetensors
from mllm_act.weights.tensors import Source, Tensor, not_installed

INDEX = "model.safetensors.index.json"
DOWNLOADED = ("*.safetensors", INDEX, "config.json", "tokenizer.json")


def read(folder: Path, origin: str, revision: str | None = None) -> Source:
    """Opens a folder; ``origin`` names it in messages.

    Raises:
      UserError: if it has no config.json or no weights, or a shard is missing or cut off.
    """
    config = configs.complete(_json(folder / "config.json"))
    tokenizer = folder / "tokenizer.json"
    text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None
    return Source(origin, _tensors(folder), config, text, revision)


def download(name: str) -> Path:
    """Downloads the files needed from a hub repository (``owner/name`` or ``owner/name@revision``) to the hub's cache.

    Raises:
      UserError: if it does not exist or cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise not_installed("huggingface_hub", name) from error
    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=list(DOWNLOADED)
            )
        )
    except (OSError, ValueError) as error:  # the package's own errors derive from these
        reason = [*str(error).splitlines(), type(error).__name__][0]
        raise UserError(
            f"--source={name}: expected a folder, a .gguf or .onnx file, or a hub id that can be reached, found none "
            f"({reason[:200]}); check the name and the connection"
        ) from error


def is_hub_id(name: str) -> bool:
    """Returns whether a name has the form ``owner/name`` or ``owner/name@revision``."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name))


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, each from the shard that the index names."""
    if not (folder / INDEX).is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise UserError(
                f"{folder}: expected model.safetensors or {INDEX} in it, found {_listing(folder)}; "
                "convert other formats with save_pretrained of transformers"
            )
        return safetensors.read(single)
    index: dict[str, str] = _json(folder / INDEX).get("weight_map", {})
    shards = sorted(set(index.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"{folder}: expected the {len(shards)} shards that {INDEX} names, found {', '.join(missing)} missing; "
            "download them"
        )
    tensors = {shard: safetensors.read(folder / shard) for shard in shards}
    wrong = [name for name, shard in index.items() if name not in tensors[shard]]
    if wrong:
        raise UserError(
            f"{folder}: expected in each shard the tensors that {INDEX} names for it, found no {', '.join(wrong)}; "
            "download the folder again"
        )
    return {name: tensors[shard][name] for name, shard in index.items()}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path.parent}: expected {path.name} in it, found {_listing(path.parent)}; "
            "pass a Hugging Face model folder"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found {error}; download it again") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected a JSON object, found {type(values).__name__}; download it again"
        )
    return values


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
