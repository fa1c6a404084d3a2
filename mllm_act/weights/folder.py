"""The pretrained folder: weights under our own paths and in our own layout, ready for training.

    weights.safetensors    every array by its path in ``MLLM``; [L, ...] for repeated blocks
    meta.json              the sizes, and the sources of the weights
    tokenizer.json         the language model's, in Hugging Face's format

Weights are one safetensors file rather than an Orbax checkpoint: it can be written and read one layer at a time at any
offset, so neither import nor start-up holds more than one layer in memory.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mllm_act.errors import UserError
from mllm_act.models import float8
from mllm_act.models.mllm import MLLMConfig
from mllm_act.weights import safetensors
from mllm_act.weights.tensors import Tensor
from mllm_act.weights.to_devices import Layers, put, put_float8, put_layers

WEIGHTS, META, TOKENIZER = "weights.safetensors", "meta.json", "tokenizer.json"


def load_pretrained(folder: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays onto the devices, one layer at a time.

    Args:
      folder: made by ``mllm_act.import_hf``.
      like: shape, dtype and sharding by path in ``MLLM``. Values are cast on the devices. A kernel in float8 comes with
        its ``kernel_scale``; both are computed from the kernel in the folder.

    Returns:
      The arrays by path.

    Raises:
      UserError: listing every path that is missing in the folder or has another shape there.
    """
    tensors = pretrained_tensors(folder)
    _check_shapes(folder, tensors, like)
    loaded: dict[str, jax.Array] = {}
    total = sum(tensors[path].bytes for path in like if path in tensors)
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, leave=False) as progress:
        for path, leaf in like.items():
            if path.endswith("/kernel_scale"):
                continue  # computed with its kernel
            tensor = tensors[path]
            if leaf.dtype == float8.DTYPE:
                scale = f"{path}_scale"
                loaded[path], loaded[scale] = put_float8(_layers(tensor), leaf, like[scale])
            elif "/blocks/" in path:
                loaded[path] = put_layers(_layers(tensor), leaf)
            else:
                loaded[path] = put(tensor.read, leaf)
            progress.update(tensor.bytes)
    return loaded


def pretrained_paths(folder: Path) -> set[str]:
    """Returns the paths of the arrays in a folder."""
    return set(pretrained_tensors(folder))


def pretrained_text_tokenizer(folder: Path) -> str:
    """Returns the text of a folder's ``tokenizer.json``.

    Raises:
      UserError: if the folder does not exist or is incomplete.
    """
    pretrained_meta(folder)
    return (Path(folder) / TOKENIZER).read_text(encoding="utf-8")


def pretrained_meta(folder: Path) -> dict[str, Any]:
    """Returns a folder's ``meta.json``: ``config`` (the fields of an ``MLLMConfig``) and ``sources``.

    Raises:
      UserError: if the folder does not exist or is incomplete.
    """
    fix = (
        "make it with make pretrained, or with python -m mllm_act.import_hf --preset=NAME "
        f"--source=FOLDER_OR_HUB_ID --out={folder}"
    )
    missing = [name for name in (META, WEIGHTS, TOKENIZER) if not (Path(folder) / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: expected a folder of pretrained weights, found no {', '.join(missing)} in it; {fix}"
        )
    try:
        meta = json.loads((Path(folder) / META).read_text(encoding="utf-8"))
        MLLMConfig.from_dict(meta["config"])
        return {"config": meta["config"], "sources": meta["sources"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/{META}: expected a complete config and its sources, found {error!r}; {fix}"
        ) from error


def pretrained_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns a folder's arrays by path, unread.

    Raises:
      UserError: if the folder does not exist or is incomplete, or its weights are cut off.
    """
    pretrained_meta(folder)
    return safetensors.read(Path(folder) / WEIGHTS)


def _layers(tensor: Tensor) -> Layers:
    """One reader for each layer of a tensor with a leading layer axis."""

    def read(index: int) -> np.ndarray:
        return tensor.read()[index]

    return [functools.partial(read, index) for index in range(tensor.shape[0])]


def _check_shapes(
    folder: Path, tensors: Mapping[str, Tensor], like: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    needed = {path: leaf for path, leaf in like.items() if not path.endswith("/kernel_scale")}
    missing = sorted(needed.keys() - tensors.keys())
    misshapen = [
        f"{path}: expected {list(leaf.shape)}, found {list(tensors[path].shape)}"
        for path, leaf in sorted(needed.items())
        if path in tensors and tensors[path].shape != tuple(leaf.shape)
    ]
    if missing or misshapen:
        raise UserError(
            f"{folder}: expected the weights of this model, found others; missing: {', '.join(missing) or 'none'}; "
            f"of another shape: {'; '.join(misshapen) or 'none'}; import the preset's weights with "
            "python -m mllm_act.import_hf"
        )
