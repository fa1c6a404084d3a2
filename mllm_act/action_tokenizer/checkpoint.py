"""Loads an action tokenizer from a checkpoint of ``mllm_act.train_tokenizer``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mllm_act import parameters
from mllm_act.action_tokenizer import Tokenizer, make_tokenizer
from mllm_act.action_tokenizer.autoencoder import TokenizerConfig
from mllm_act.action_tokenizer.fast import FastConfig
from mllm_act.checkpoints.checkpoint import find, parsing, read_items, read_meta
from mllm_act.checkpoints.digests import writer
from mllm_act.errors import UserError
from mllm_act.normalization import Statistics


@dataclasses.dataclass(frozen=True)
class LoadedTokenizer:
    """A trained tokenizer, and the statistics and metadata needed to use it."""

    config: TokenizerConfig | FastConfig
    statistics: Statistics  # of single actions; they normalised its training data
    model: Tokenizer
    metadata: dict[str, Any]  # the dataset's: action names, units, scale
    workdir: Path
    step: int


def tokenizer_arrays(tokenizer: Tokenizer) -> dict[str, jax.Array]:
    """Returns all arrays of a tokenizer by path: the ``model`` item of its checkpoints."""
    return parameters.flatten(nnx.to_pure_dict(nnx.state(tokenizer)))


def load_tokenizer(path: Path) -> LoadedTokenizer:
    """Loads the newest checkpoint in a workdir of ``mllm_act.train_tokenizer``, or the step that ``path`` names.

    Raises:
      UserError: if there is no whole checkpoint, it is not a tokenizer's, or another version wrote it.
    """
    workdir, step = find(Path(path))
    meta, where = read_meta(workdir, step), f"{workdir}/checkpoints/{step}"
    for key in ("tokenizer", "statistics", "metadata"):
        if key not in meta:
            raise UserError(
                f"{where}: expected the key {key!r} of a tokenizer's checkpoint, found {', '.join(sorted(meta))}; pass "
                "the workdir of mllm_act.train_tokenizer"
            )
    with parsing(meta, where):
        statistics = _statistics(meta, where)
        model = make_tokenizer(meta["tokenizer"], nnx.Rngs(0))
    restored = read_items(workdir, step, {"model": tokenizer_arrays(model)})["model"]
    like = nnx.to_pure_dict(nnx.state(model))
    nnx.update(model, nnx.State(parameters.unflatten(restored, like)))
    return LoadedTokenizer(model.config, statistics, model, meta["metadata"], workdir, step)


def _statistics(meta: Mapping[str, Any], where: str) -> Statistics:
    try:
        return Statistics.from_dict(meta["statistics"])
    except UserError as error:
        raise UserError(
            f"{where}: expected statistics as this version writes them, found those of {writer(meta)}; use that "
            "version, or train the tokenizer again"
        ) from error
