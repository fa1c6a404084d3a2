"""Reads weights in Hugging Face's layout: a folder with config.json and safetensors shards, local or on the hub."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import UserError
from mllm_act.models.vision import FAMILIES
from mllm_act.weights import configs, safetensors
from mllm_act.weights.tensors import Source, Tensor, not_installed, parsing
from mllm_act.weights.text_files import (
    GENERATION,
    NAMES,
    TOKENIZER,
    generation_config,
    read_json,
    read_text_files,
    read_tokenizer,
)

INDEX = "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
DOWNLOADED = ("*.safetensors", INDEX, "config.json", PREPROCESSOR, TOKENIZER, *NAMES)


def read(folder: Path, origin: str, revision: str | None = None) -> Source:
    """Opens a folder; ``origin`` names it in messages.

    Raises:
      UserError: if it has no config.json or no weights, a shard is missing or cut off, or a file is not what the
        format allows.
    """
    config = configs.complete(_json(folder / "config.json"), origin)
    tokenizer = folder / TOKENIZER
    text, files = None, {}
    if tokenizer.is_file():
        text, files = read_tokenizer(tokenizer), read_text_files(folder)
        generation = generation_config(files, config.get("text_config", config))
        files[GENERATION] = json.dumps(generation, indent=1)
    _check_preprocessor(folder, config)
    return Source(origin, _tensors(folder), config, text, revision, files)


def _check_preprocessor(folder: Path, config: dict[str, Any]) -> None:
    """Refuses an image processor whose pixel statistics are not those that ``models.vision.preprocess`` uses."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        return
    family = FAMILIES["dinov2" if config["model_type"] == "dinov2" else "clip"]
    values = read_json(path)
    for key, expected in (("image_mean", family.mean), ("image_std", family.std)):
        actual = values.get(key)
        with parsing(path, "the config of an image processor"):
            same = actual is None or np.allclose(actual, expected, atol=1e-3)
        if not same:
            raise UserError(
                f"{path}: expected {key} {list(expected)}, found {actual}; the vision encoder needs other pixels than "
                "this code makes; pass the source that the preset is made for"
            )


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
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()):
        raise UserError(
            f"{folder / INDEX}: expected weight_map, the file of every tensor by its name, found none; "
            "download the folder again"
        )
    shards = sorted(set(index.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise UserError(
            f"{folder / INDEX}: expected names of files in its folder, found {', '.join(outside)[:200]}; "
            "download the folder again"
        )
    missing = [shard for shard in shards if not os.path.isfile(folder / shard)]
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
    return read_json(path)


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
