"""What the network makes of whole windows, to compare a policy with that acts frame by frame."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_act.policy import Policy


def decider(policy: Policy) -> Callable[..., np.ndarray]:
    """Returns a compiled ``decide(text, images, actions, proprio)``: the action [B, A] after a window.

    Images of each camera are [B, T, H, W, 3], actions [B, T, A] in the environment's units (the newest is not looked
    at), and ``proprio`` is the newest, [B, P].
    """

    @jax.jit
    def act(parameters: Any, prompt: Any, images: Any, actions: Any, proprio: Any) -> jax.Array:
        network = policy._network(parameters)
        adapter, reading = network.adapters[policy.name], network.mllm.read(*prompt)
        latents = network.mllm.latents(images, reading.instruction)
        mask, past = jnp.ones(latents.shape[:2], bool), adapter.encode(actions)
        return adapter.decode(network.act(policy.name, reading, latents, mask, proprio, past))

    def decide(text: str, images: Any, actions: np.ndarray, proprio: np.ndarray) -> np.ndarray:
        prompt = policy.prompt.tokens([text] * len(actions))
        return np.asarray(act(policy.parameters, prompt, images, actions, proprio))

    return decide
