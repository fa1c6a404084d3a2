"""The first parameters of a run, each array made or read straight into its place on the devices."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_act import parameters
from mllm_act.errors import UserError
from mllm_act.models.mllm import MLLMConfig
from mllm_act.weights import folder as pretrained_folder

MODEL = "mllm/"  # where the model's paths begin in a policy's network

Wanted = Mapping[str, jax.ShapeDtypeStruct]


def initial_parameters(
    make: Callable[[], nnx.Module],
    wanted: Wanted,
    given: Mapping[str, jax.Array],
    model: MLLMConfig,
    pretrained: Path | None,
) -> dict[str, jax.Array]:
    """Returns all arrays of a policy's network by path. What is given or pretrained is never made at random.

    Args:
      make: makes the network; traced, so that what is not used of it is not computed.
      wanted: shape, dtype and sharding of every array.
      given: arrays that exist, such as the action tokenizer's.
      model: the sizes of the model.
      pretrained: a folder that ``mllm_act.import_hf`` wrote; without it everything else is random.

    Raises:
      UserError: if the folder lacks an array, or has it in another shape, or is of another model.
    """
    arrays = {
        path: jax.device_put(np.asarray(array), wanted[path].sharding)
        for path, array in given.items()
    }
    if pretrained is not None:
        arrays |= _read(pretrained, wanted, model)
        arrays |= _action_rows(arrays, wanted, model)
    fresh = wanted.keys() - arrays.keys()
    if pretrained is not None:
        groups = {"/".join(path.split("/")[:3]) for path in fresh}
        print(f"From {pretrained}, but for what starts at random: {', '.join(sorted(groups))}")

    def random() -> dict[str, jax.Array]:
        named = parameters.flatten(nnx.state(make()))
        return {path: named[path] for path in fresh}

    shardings = {path: wanted[path].sharding for path in fresh}
    return arrays | jax.jit(random, out_shardings=shardings)()


def _read(folder: Path, wanted: Wanted, model: MLLMConfig) -> dict[str, jax.Array]:
    """Reads the vision encoder, the language model less LoRA, and the projector where the folder has it."""
    _check_sizes(folder, model)
    there = pretrained_folder.paths(folder)
    needed = {}
    for path, leaf in wanted.items():
        part = path.removeprefix(MODEL)
        if part.startswith(("vision/", "language/")):
            chosen = "lora_" not in part
        else:
            chosen = part.startswith("bridge/projector/") and part in there
        if path.startswith(MODEL) and chosen:
            needed[part] = leaf
    loaded = pretrained_folder.load(folder, needed)
    return {MODEL + part: array for part, array in loaded.items()}


def _action_rows(
    arrays: Mapping[str, jax.Array], wanted: Wanted, model: MLLMConfig
) -> dict[str, jax.Array]:
    """Takes an adapter's own rows of embedding and head from the pretrained rows that they write over."""
    rows, language = {}, model.language
    tables = {"embedding": "embedding", "head": "embedding" if language.tied else "head"}
    for path in wanted:
        if not re.fullmatch("adapters/[^/]+/head", path):
            continue  # adapters without a head over vocabulary rows start from scratch
        for own, table in tables.items():
            place = wanted[path.removesuffix("head") + own]
            first, count = language.action_tokens, place.shape[0]
            take = jax.jit(
                lambda x, first=first, count=count: x[first : first + count].astype(jnp.float32),
                out_shardings=place.sharding,
            )
            rows[path.removesuffix("head") + own] = take(arrays[f"mllm/language/{table}"])
    return rows


def _check_sizes(folder: Path, model: MLLMConfig) -> None:
    """Raises UserError if the folder is of a model that has the same shapes but computes otherwise."""
    found = MLLMConfig.from_dict(pretrained_folder.meta(folder)["config"])
    differences = [
        f"{part}.{key}: expected {getattr(ours, key)!r}, found {getattr(theirs, key)!r}"
        for part, ours, theirs, keys in (
            ("vision", model.vision, found.vision, ("family", "heads", "patch_size")),
            ("language", model.language, found.language, LANGUAGE),
        )
        for key in keys
        if getattr(ours, key) != getattr(theirs, key)
    ]
    if differences:
        raise UserError(
            f"{folder}: expected weights of the model being trained, found another's; {'; '.join(differences)}; "
            "import the preset's weights with python -m mllm_act.import_hf"
        )


LANGUAGE = ("heads", "kv_heads", "rope_theta", "epsilon", "tied")
