"""What stops a run: a resumed run that is not the same one, and numbers that are no longer numbers."""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_act.errors import UserError
from mllm_act.training.checkpoint import Checkpointer


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_same_run(
    saved: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str], workdir: Path
) -> None:
    """Compares what a checkpoint was made with to what the program was started with.

    Args:
      saved: plain JSON types.
      now: the like.
      free: dotted keys, or first parts of them, that may differ: how often to report, where files lie.
      workdir: named in the error.

    Raises:
      UserError: if a key differs; a resumed run could not go on bit for bit.
    """
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    for key in sorted(before.keys() | after.keys()):
        may_differ = any(key == one or key.startswith(f"{one}.") for one in free)
        if not may_differ and before.get(key) != after.get(key):
            raise UserError(
                f"{workdir}: {key}: expected {before.get(key)!r} as in the checkpoint there, found "
                f"{after.get(key)!r}; use the same to go on, or another --workdir"
            )


def check_finite(step: int, scalars: Mapping[str, Any], checkpoints: Checkpointer) -> None:
    """Looks at ``loss`` and ``grad_norm`` of one update.

    Raises:
      UserError: if one is not finite; it names the step and the last good checkpoint.
    """
    loss, norm = float(scalars["loss"]), float(scalars["grad_norm"])
    if math.isfinite(loss) and math.isfinite(norm):
        return
    checkpoints.wait()
    last = checkpoints.latest_step
    raise UserError(
        f"step {step}: expected a finite loss and gradient, found loss {loss}, gradient norm {norm}; the last good "
        f"checkpoint is {'none' if last is None else checkpoints.directory / str(last)}; "
        "try a lower --config.optimizer.learning_rate"
    )
