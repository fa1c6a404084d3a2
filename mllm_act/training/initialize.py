"""The first parameters of a run, each array made or read directly into its sharding on the devices."""

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
from mllm_act.weights.folder import load_pretrained, pretrained_meta, pretrained_paths

MODEL = "mllm/"  # prefix of the model's paths in a policy's network

Wanted = Mapping[str, jax.ShapeDtypeStruct]


def initial_parameters(
    make: Callable[[], nnx.Module],
    wanted: Wanted,
    given: Mapping[str, jax.Array],
    model: MLLMConfig,
    pretrained: Path | None,
) -> dict[str, jax.Array]:
    """Returns all arrays of a policy's network by path. Given and pretrained arrays are never made at random first.

    Args:
      make: makes the network; traced, so that unused arrays are not computed.
      wanted: shape, dtype and sharding of every array.
      given: existing arrays, such as the action tokenizer's.
      model: the sizes of the model.
      pretrained: a folder written by ``mllm_act.import_hf``; without it all other arrays are random.

    Raises:
      UserError: if the folder lacks an array, has it in another shape, or belongs to another model.
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
        print(f"Weights from {pretrained}; starting at random: {', '.join(sorted(groups))}")

    def random() -> dict[str, jax.Array]:
        named = parameters.flatten(nnx.state(make()))
        return {path: named[path] for path in fresh}

    shardings = {path: wanted[path].sharding for path in fresh}
    return arrays | jax.jit(random, out_shardings=shardings)()


def _read(folder: Path, wanted: Wanted, model: MLLMConfig) -> dict[str, jax.Array]:
    """Reads the vision encoder, the language model without LoRA, and the projector if the folder has it."""
    _check_sizes(folder, model)
    available = pretrained_paths(folder)
    needed = {}
    for path, leaf in wanted.items():
        part = path.removeprefix(MODEL)
        if part.startswith(("vision/", "language/")):
            chosen = "lora_" not in part
        else:
            chosen = part.startswith("bridge/projector/") and part in available
        if path.startswith(MODEL) and chosen:
            needed[part] = leaf
    loaded = load_pretrained(folder, needed)
    return {MODEL + part: array for part, array in loaded.items()}


def _action_rows(
    arrays: Mapping[str, jax.Array], wanted: Wanted, model: MLLMConfig
) -> dict[str, jax.Array]:
    """Copies an adapter's rows of embedding and head from the pretrained rows that they replace."""
    rows, language = {}, model.language
    tables = {"embedding": "embedding", "head": "embedding" if language.tied else "head"}
    for path in wanted:
        if not re.fullmatch("adapters/[^/]+/head", path):
            continue  # adapters without a head over vocabulary rows start at random
        for own, table in tables.items():
            leaf = wanted[path.removesuffix("head") + own]
            first, count = language.action_tokens, leaf.shape[0]
            take = jax.jit(
                lambda x, first=first, count=count: x[first : first + count].astype(jnp.float32),
                out_shardings=leaf.sharding,
            )
            rows[path.removesuffix("head") + own] = take(arrays[f"mllm/language/{table}"])
    return rows


def _check_sizes(folder: Path, model: MLLMConfig) -> None:
    """Raises UserError if the folder's model has the same shapes but computes something else."""
    found = MLLMConfig.from_dict(pretrained_meta(folder)["config"])
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
            f"{folder}: expected weights of the model being trained, found those of another; {'; '.join(differences)}; "
            "import the preset's weights with python -m mllm_act.import_hf"
        )


LANGUAGE = ("heads", "kv_heads", "rope_theta", "epsilon", "tied")
