"""The base of adapters for discrete actions. An action is an index into a list of names, float32[1] in batches."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_act.adapters.base import Adapter
from mllm_act.errors import UserError
from mllm_act.normalization import Statistics


class Discrete(Adapter):
    """An adapter of the actions in ``names``."""

    discrete = True
    normalizations = ("range",)  # an index is not normalised

    def __init__(self, statistics: Statistics, names: Sequence[str]) -> None:
        """Checks the names against the demonstrations.

        Raises:
          UserError: if there are no names, or an action of the demonstrations is not in the list.
        """
        super().__init__(statistics)
        self.names = tuple(names)
        if not self.names:
            raise UserError(
                "config.actions: expected the names of the environment's actions, found none; list them"
            )
        low, high = statistics.action.min, statistics.action.max
        if len(low) != 1:
            raise UserError(
                f"statistics of actions: expected one dimension, the index of a discrete action, found {len(low)}; "
                "choose an adapter of continuous actions"
            )
        if low[0] < 0 or high[0] > len(self.names) - 1:
            raise UserError(
                f"statistics of actions: expected indices from 0 to {len(self.names) - 1} for the {len(self.names)} "
                f"actions of config.actions ({', '.join(self.names)}), found {low[0]:g} to {high[0]:g}; list all of "
                "the environment's actions in their order"
            )

    def to_index(self, action: Float[Array, "... 1"]) -> Int[Array, "..."]:
        """Returns the index of an action."""
        return jnp.round(action[..., 0]).astype(jnp.int32)

    def from_index(self, index: Int[Array, "..."]) -> Float[Array, "... 1"]:
        """Returns the action, as the environment takes it, of an index."""
        return index[..., None].astype(jnp.float32)
