"""The pretrained folder: weights under our own paths and in our own layout, ready for training.

    weights.safetensors    every array by its path in ``MLLM``; [L, ...] for repeated blocks
    meta.json              the sizes, and the sources of the weights
    tokenizer.json         the language model's, in Hugging Face's format
    tokenizer_config.json, chat_template.jinja, generation_config.json, ...: as they came with it; export needs them

Weights are one safetensors file rather than an Orbax checkpoint: it can be written and read one layer at a time at any
offset, so neither import nor start-up holds more than one layer in memory.
"""

import dataclasses
import functools
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
from mllm_act.weights.text_files import TOKENIZER, read_json, read_text_files, read_tokenizer
from mllm_act.weights.to_devices import Layers, put, put_float8, put_layers

WEIGHTS, META = "weights.safetensors", "meta.json"


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
    check_shapes(folder, tensors, like)
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
    return read_tokenizer(Path(folder) / TOKENIZER)


def pretrained_text_files(folder: Path) -> dict[str, str]:
    """Returns the other text files of a folder's language model by name; see ``text_files.NAMES``.

    Raises:
      UserError: if the folder does not exist or is incomplete.
    """
    pretrained_meta(folder)
    return read_text_files(Path(folder))


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
    meta = read_json(Path(folder) / META)
    try:
        config = MLLMConfig.from_dict(meta["config"])
        for part in (config.vision, config.language):
            for name, size in dataclasses.asdict(part).items():
                if type(size) is int and not 0 <= size <= (10_000 if name == "layers" else 10**8):
                    raise ValueError(f"{name} = {size}")
        return {"config": meta["config"], "sources": meta["sources"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
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


def check_shapes(
    folder: Path, tensors: Mapping[str, Tensor], like: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Raises UserError, with every path that is missing in a folder or has another shape there than expected."""
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
