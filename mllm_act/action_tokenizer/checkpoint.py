"""A tokenizer's checkpoint: enough to resume its training, and enough to encode and decode."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mllm_act import parameters
from mllm_act.action_tokenizer import kinds
from mllm_act.action_tokenizer.autoencoder import TokenizerConfig
from mllm_act.action_tokenizer.fast import FastConfig
from mllm_act.action_tokenizer.kinds import Tokenizer
from mllm_act.checkpoints.checkpoint import Checkpointer, find
from mllm_act.errors import UserError
from mllm_act.normalization import Statistics


@dataclasses.dataclass(frozen=True)
class LoadedTokenizer:
    """A trained tokenizer with what it needs in use."""

    config: TokenizerConfig | FastConfig
    statistics: Statistics  # of single actions; what it was trained on was normalised with these
    model: Tokenizer
    metadata: dict[str, Any]  # the environment's: action names, units, scale
    workdir: Path
    step: int


def variables(model: Tokenizer) -> dict[str, jax.Array]:
    """All variables of a tokenizer by path: the ``model`` item of its checkpoints."""
    return parameters.flatten(nnx.to_pure_dict(nnx.state(model)))


def load(path: Path) -> LoadedTokenizer:
    """Loads the newest tokenizer of a workdir of ``mllm_act.train_tokenizer`` (or one step of it).

    Raises:
      UserError: if there is no whole checkpoint, or what is there is no tokenizer's.
    """
    workdir, step = find(Path(path))
    with Checkpointer(workdir) as checkpoints:
        meta = checkpoints.meta(step)
        for key in ("tokenizer", "statistics", "metadata"):
            if key not in meta:
                raise UserError(
                    f"{workdir}/checkpoints/{step}: expected the key {key!r} in its meta, found "
                    f"{', '.join(sorted(meta))}; pass the workdir of mllm_act.train_tokenizer"
                )
        model = kinds.make(meta["tokenizer"], nnx.Rngs(0))
        restored = checkpoints.restore(step, {"model": variables(model)})["model"]
    like = nnx.to_pure_dict(nnx.state(model))
    nnx.update(model, nnx.State(parameters.unflatten(restored, like)))
    statistics = Statistics.from_dict(meta["statistics"])
    return LoadedTokenizer(model.config, statistics, model, meta["metadata"], workdir, step)
