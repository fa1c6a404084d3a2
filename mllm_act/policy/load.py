"""Loading a policy's network from a checkpoint: for acting, and for export."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mllm_act import parameters
from mllm_act.checkpoints.checkpoint import check_digests, find, parsing, read_arrays, read_meta
from mllm_act.checkpoints.digests import while_checking, writer
from mllm_act.checkpoints.frozen import check_frozen, read_frozen
from mllm_act.errors import UserError
from mllm_act.normalization import Statistics
from mllm_act.policy.network import FORMAT, NetworkConfig, PolicyNetwork, build_network
from mllm_act.policy.prompt import Prompt

NEEDED = ("network", "statistics", "prompt", "frozen")  # keys of the checkpoint's JSON


@dataclasses.dataclass(frozen=True)
class SavedNetwork:
    """What a checkpoint says of a network.

    Attributes:
      workdir: the run's folder.
      step: of the checkpoint.
      meta: the checkpoint's JSON document.
      config: what the network is made of.
      arrays: every array by its path in ``PolicyNetwork``.
    """

    workdir: Path
    step: int
    meta: Mapping[str, Any]
    config: NetworkConfig
    arrays: dict[str, jax.Array]

    def network(self) -> PolicyNetwork:
        """Returns the network, with all its adapters."""
        graph, *parts = parameters.split(abstract(self.config, self.meta), self.config.trained)
        return nnx.merge(graph, *(parameters.unflatten(self.arrays, like=part) for part in parts))


def load_network(path: Path, device: jax.Device) -> SavedNetwork:
    """Loads a network onto one device.

    Args:
      path: a run's folder, whose newest checkpoint is taken, or one step of it.
      device: where the arrays go.

    Raises:
      UserError: if there is no whole checkpoint of a policy, or another version wrote it.
    """
    workdir, step = find(path)
    meta = read_meta(workdir, step)
    where = f"{workdir}/checkpoints/{step}"
    missing = [key for key in NEEDED if key not in meta]
    if missing:
        raise UserError(
            f"{where}: expected a policy's checkpoint with {', '.join(NEEDED)}, found no {', '.join(missing)} in "
            "it; if it is a tokenizer's folder, train a policy with python -m mllm_act.train"
        )
    with parsing(meta, where):
        check_format(meta, where)
        config = NetworkConfig.from_dict(meta["network"])
    # Where training kept an average of the weights, the average acts.
    item = "ema" if meta.get("config", {}).get("ema") else "trained"

    def check() -> None:
        check_digests(workdir, step, [item])
        check_frozen(workdir, meta["frozen"])

    def shapes() -> list[dict[str, jax.ShapeDtypeStruct]]:
        with parsing(meta, where):
            for name in config.embodiments:
                Prompt(**meta["prompt"][name]).encode("")
            _, *parts = parameters.split(abstract(config, meta), config.trained)
            sharding = jax.sharding.SingleDeviceSharding(device)
            return [_on(parameters.flatten(part), sharding) for part in parts]

    trained, frozen = while_checking(check, shapes)
    arrays = read_arrays(workdir / "checkpoints" / str(step) / item, trained)
    arrays |= read_frozen(workdir, frozen)
    return SavedNetwork(workdir, step, meta, config, arrays)


def check_format(meta: Mapping[str, Any], where: str) -> None:
    """Raises UserError if another version of mllm_act wrote a checkpoint; it names that version."""
    written = meta["network"].get("format", 1)
    if written != FORMAT:
        raise UserError(
            f"{where}: expected a checkpoint of format {FORMAT}, found format {written}, written by "
            f"{writer(meta)}; use that version, or train again"
        )


def abstract(config: NetworkConfig, meta: Mapping[str, Any]) -> PolicyNetwork:
    """Returns the network that a checkpoint describes, with shapes in place of arrays."""
    statistics = {name: Statistics.from_dict(part) for name, part in meta["statistics"].items()}
    return nnx.eval_shape(lambda: build_network(config, statistics, nnx.Rngs(0)))


def _on(
    arrays: Mapping[str, jax.ShapeDtypeStruct], sharding: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for path, leaf in arrays.items()
    }
