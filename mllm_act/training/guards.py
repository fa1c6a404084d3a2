"""What stops a run: trained parameters in too few bits, a resumed run that is not the same, and non-finite values."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_act.checkpoints.checkpoint import Checkpointer
from mllm_act.errors import UserError


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_same_run(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    parts: Sequence[str],
    may_differ: Collection[str],
    workdir: Path,
) -> None:
    """Compares the settings in a checkpoint with those the program was started with.

    Args:
      saved: the checkpoint's JSON document.
      now: the document that the program would write.
      parts: the keys to compare.
      may_differ: dotted keys, or prefixes of them, that may differ: how often to report, where files lie.
      workdir: named in the error.

    Raises:
      UserError: if a key differs, so that the run could not continue bit for bit.
    """
    before, after = (dict(_leaves({p: meta.get(p, {}) for p in parts})) for meta in (saved, now))
    for key in sorted(before.keys() | after.keys()):
        ignored = any(key == name or key.startswith(f"{name}.") for name in may_differ)
        if not ignored and before.get(key) != after.get(key):
            raise UserError(
                f"{workdir}: {key}: expected {before.get(key)!r} as in the checkpoint there, found "
                f"{after.get(key)!r}; use the same value to continue, or another --workdir"
            )


def check_float32(trained: Mapping[str, Any]) -> None:
    """Checks the dtype of the trained parameters.

    Raises:
      UserError: if one is not float32, so that its updates would be lost in rounding.
    """
    for path, leaf in trained.items():
        if leaf.dtype != "float32":
            raise UserError(
                f"config.weight_dtype: expected float32 where the matrices are trained, found {leaf.dtype} for {path}; "
                "leave config.weight_dtype out, or take a preset whose base is frozen"
            )


def check_finite(step: int, scalars: Mapping[str, Any], checkpoints: Checkpointer) -> None:
    """Checks the loss, the gradient and the updated weights (``loss``, ``grad_norm``, ``weight_norm``) of an update.

    Raises:
      UserError: if one is not finite; it names the step and the last good checkpoint.
    """
    found = {name: float(scalars[name]) for name in ("loss", "grad_norm", "weight_norm")}
    if all(map(math.isfinite, found.values())):
        return
    checkpoints.wait()
    last = checkpoints.latest_step
    raise UserError(
        f"step {step}: expected a finite loss, gradient and weights, found "
        + ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        + f"; the last good checkpoint is {'none' if last is None else checkpoints.directory / str(last)}; "
        "try a lower --config.optimizer.learning_rate"
    )
