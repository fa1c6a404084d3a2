"""Statistics of discrete demonstrations, and a stand-in for the model between an action's tokens."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_act.adapters.language import Language
from mllm_act.normalization import Moments, Statistics

V, D = 12, 6  # vocabulary, width


def moments(low: tuple[float, ...], high: tuple[float, ...]) -> Moments:
    zeros, ones = (0.0,) * len(low), (1.0,) * len(low)
    two_valued = (False,) * len(low)
    return Moments(zeros, ones, min=low, max=high, q01=low, q99=high, two_valued=two_valued)


def statistics(low: float = 0.0, high: float = 0.0) -> Statistics:
    """Of demonstrations whose actions go from ``low`` to ``high``."""
    return Statistics(
        action=moments((low,), (high,)),
        proprio=moments((), ()),
        num_steps=1,
        num_episodes=1,
        num_segments=1,
        split="train",
        fingerprint="",
        tasks=("go to",),
        instructions=("go to the red ball",),
    )


def rows(seed: int, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Random tables of a language model: embedding and head [V, D]."""
    rng = np.random.default_rng(seed)
    embedding, head = rng.normal(size=(2, V, D))
    return jnp.array(embedding, jnp.float32), jnp.array(scale * head, jnp.float32)


def language(sequences: Sequence[Sequence[int]], end: int = V - 1) -> Language:
    names = [f"action {i}" for i in range(len(sequences))]
    return Language(statistics(0, len(names) - 1), names, sequences, end, V)


def extend(embedding: jax.Array, state: jax.Array) -> tuple[jax.Array, Any]:
    """Feeds a token to a "model" whose hidden state depends on all tokens before, and on their order."""
    hidden = jnp.tanh(1.7 * state + embedding)
    return hidden, hidden


def teacher_forced(first: jax.Array, embedded: jax.Array) -> jax.Array:
    """Returns the hidden states [..., M, D] that predict tokens whose embeddings are [..., M, D]."""
    hidden = [jnp.broadcast_to(first, embedded[..., 0, :].shape)]
    for j in range(embedded.shape[-2] - 1):
        hidden.append(extend(embedded[..., j, :], hidden[-1])[0])
    return jnp.stack(hidden, axis=-2)
