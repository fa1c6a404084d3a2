"""The pretrained folder: weights under our own paths, in our own layout, as training reads them.

    weights.safetensors    every array by its path in ``MLLM``; [L, ...] where blocks repeat
    meta.json              the sizes, and which sources the weights came from
    tokenizer.json         of the language model, in Hugging Face's format

One safetensors file rather than Orbax: it is written and read one layer at a time at whatever offset, so that neither
import nor start-up holds more of it in memory than the layer under way.
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
from mllm_act.weights.to_devices import Layers, place, place_float8, place_layers

WEIGHTS, META, TOKENIZER = "weights.safetensors", "meta.json", "tokenizer.json"


def load(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays onto the devices, one layer at a time.

    Args:
      folder: made by ``mllm_act.import_hf``.
      wanted: shape, dtype and sharding by path in ``MLLM``. Values are cast on the devices; a kernel wanted in float8
        comes with its ``kernel_scale``, and both are made of the kernel in the folder.

    Returns:
      The arrays by path.

    Raises:
      UserError: listing every path that is not in the folder or has another shape there.
    """
    there = tensors(folder)
    _check(folder, there, wanted)
    loaded: dict[str, jax.Array] = {}
    total = sum(there[path].bytes for path in wanted if path in there)
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, leave=False) as progress:
        for path, leaf in wanted.items():
            if path.endswith("/kernel_scale"):
                continue  # made with its kernel
            if leaf.dtype == float8.DTYPE:
                scale = f"{path}_scale"
                loaded[path], loaded[scale] = place_float8(
                    _layers(there[path]), leaf, wanted[scale]
                )
            elif "/blocks/" in path:
                loaded[path] = place_layers(_layers(there[path]), leaf)
            else:
                loaded[path] = place(there[path].read, leaf)
            progress.update(there[path].bytes)
    return loaded


def paths(folder: Path) -> set[str]:
    """Returns the paths of the arrays in a folder."""
    return set(tensors(folder))


def text_tokenizer(folder: Path) -> str:
    """Returns the text of a folder's ``tokenizer.json``.

    Raises:
      UserError: if there is no such folder.
    """
    meta(folder)
    return (Path(folder) / TOKENIZER).read_text(encoding="utf-8")


def meta(folder: Path) -> dict[str, Any]:
    """Returns a folder's ``meta.json``: ``config`` (an ``MLLMConfig``'s fields) and ``sources``.

    Raises:
      UserError: if there is no such folder, or it is not whole.
    """
    mend = (
        "make it with make pretrained, or with python -m mllm_act.import_hf --preset=NAME "
        f"--source=FOLDER_OR_HUB_ID --out={folder}"
    )
    missing = [name for name in (META, WEIGHTS, TOKENIZER) if not (Path(folder) / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: expected a folder of pretrained weights, found no {', '.join(missing)} there; {mend}"
        )
    try:
        found = json.loads((Path(folder) / META).read_text(encoding="utf-8"))
        MLLMConfig.from_dict(found["config"])
        return {"config": found["config"], "sources": found["sources"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/{META}: expected a whole config and its sources, found {error!r}; {mend}"
        ) from error


def tensors(folder: Path) -> dict[str, Tensor]:
    """Returns a folder's arrays by path, unread.

    Raises:
      UserError: if there is no such folder, or its file is not whole.
    """
    meta(folder)
    return safetensors.read(Path(folder) / WEIGHTS)


def _layers(tensor: Tensor) -> Layers:
    """What reads each layer of a tensor with a leading layer axis."""

    def read(number: int) -> np.ndarray:
        return tensor.read()[number]

    return [functools.partial(read, number) for number in range(tensor.shape[0])]


def _check(
    folder: Path, there: Mapping[str, Tensor], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    needed = {path: leaf for path, leaf in wanted.items() if not path.endswith("/kernel_scale")}
    missing = sorted(needed.keys() - there.keys())
    misshapen = [
        f"{path}: expected {list(leaf.shape)}, found {list(there[path].shape)}"
        for path, leaf in sorted(needed.items())
        if path in there and there[path].shape != tuple(leaf.shape)
    ]
    if missing or misshapen:
        raise UserError(
            f"{folder}: the weights there are not this model's; missing: {', '.join(missing) or 'none'}; "
            f"of another shape: {'; '.join(misshapen) or 'none'}; import the preset's weights with "
            "python -m mllm_act.import_hf"
        )
