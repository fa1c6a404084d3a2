"""A trained tokenizer from its run's folder, for the policy's second stage and for reports."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from mllm_act.errors import UserError
from mllm_act.normalization import Statistics
from mllm_act.tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.training import checkpoint, rules
from mllm_act.training.checkpoint import Checkpointer


@dataclasses.dataclass(frozen=True)
class Trained:
    """A tokenizer as stage one left it.

    Attributes:
      model: the frozen autoencoder.
      statistics: of the actions it was trained on; they normalise what it encodes.
      meta: the checkpoint's JSON document.
    """

    model: ActionTokenizer
    statistics: Statistics
    meta: dict[str, Any]

    @property
    def config(self) -> TokenizerConfig:
        """The sizes."""
        return self.model.config


def load(path: Path) -> Trained:
    """Loads the newest checkpoint of ``train_tokenizer``'s workdir.

    The checkpoint's ``meta`` holds ``tokenizer`` (a ``TokenizerConfig``) and ``statistics``; its item ``model`` holds
    the tokenizer's arrays by path (``rules.flatten``).

    Raises:
      UserError: if there is no whole checkpoint, or it is not a tokenizer's.
    """
    workdir, step = checkpoint.find(path)
    with Checkpointer(workdir) as checkpoints:
        meta = checkpoints.meta(step)
        for key in ("tokenizer", "statistics"):
            if key not in meta:
                raise UserError(
                    f"{workdir}/checkpoints/{step}: expected {key!r} in it, found {sorted(meta)}; "
                    "name a folder of python -m mllm_act.train_tokenizer"
                )
        model = ActionTokenizer(TokenizerConfig(**meta["tokenizer"]), rngs=nnx.Rngs(0))
        state = nnx.state(model)
        restored = checkpoints.restore(step, {"model": rules.flatten(state)})
        nnx.update(model, rules.unflatten(restored["model"], like=state))
    return Trained(model, Statistics.from_dict(meta["statistics"]), meta)
