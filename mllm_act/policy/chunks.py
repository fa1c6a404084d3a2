"""Acting with chunks: the chunks decided so far, and the action to take now.

A chunk is the H actions of one decision. Either they are executed one after another and then a new chunk is decided, or
a new chunk is decided at every step and the actions that overlapping chunks give for the present are averaged: temporal
ensembling (Zhao et al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", arXiv 2304.13705,
algorithm 2). At each step, for B episodes at once, all under jit:

    plan = forget(plan, first)               # episodes that begin
    now = due(plan)                          # bool[B]: which need a new chunk
    plan = push(plan, new_chunk, now)        # rows of new_chunk where now is false are not read
    action, plan = take(plan, decay)
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@no_type_check  # JAX rebuilds it with shapes in place of arrays
@struct.dataclass
class Plan:
    """The newest P chunks of each of B episodes, the oldest first; P is H with ensembling, else 1.

    ``age`` counts the actions of a chunk that lie in the past; H means that there is no chunk.
    """

    chunks: Float[Array, "B P H A"]
    age: Int[Array, "B P"]


def start(batch: int, chunk: int, actions: int, ensembling: bool) -> Plan:
    """Returns a plan without chunks for ``batch`` episodes with actions of ``actions`` numbers."""
    kept = chunk if ensembling else 1
    return Plan(
        chunks=jnp.zeros((batch, kept, chunk, actions), jnp.float32),
        age=jnp.full((batch, kept), chunk, jnp.int32),
    )


def forget(plan: Plan, first: Bool[Array, " B"]) -> Plan:
    """Returns the plan without the chunks of episodes that begin."""
    none = plan.chunks.shape[2]
    return Plan(plan.chunks, jnp.where(first[:, None], none, plan.age))


def due(plan: Plan) -> Bool[Array, " B"]:
    """Returns where a chunk has to be decided now: where none is left; with ensembling everywhere."""
    kept, chunk = plan.chunks.shape[1:3]
    return (plan.age[:, -1] >= chunk) | (kept > 1)


def push(plan: Plan, chunk: Float[Array, "B C"], due: Bool[Array, " B"]) -> Plan:
    """Adds a new chunk of C = H * A numbers, time first, where it is due, and drops the oldest."""
    new = chunk.reshape(plan.chunks[:, :1].shape).astype(plan.chunks.dtype)
    chunks = jnp.concatenate([plan.chunks[:, 1:], new], axis=1)
    age = jnp.concatenate([plan.age[:, 1:], jnp.zeros_like(plan.age[:, :1])], axis=1)
    return Plan(
        chunks=jnp.where(due[:, None, None, None], chunks, plan.chunks),
        age=jnp.where(due[:, None], age, plan.age),
    )


def take(plan: Plan, decay: float | None) -> tuple[Float[Array, "B A"], Plan]:
    """Returns this step's action and the plan of the next step. Each episode needs an unfinished chunk.

    Without ensembling the action is exactly that of the chunk, so that the index of a discrete action survives. With
    it, the action is the mean over the chunks that reach this step, weighted by exp(-decay * i), i = 0 for the oldest;
    ACT's code uses 0.01. ``decay`` is read only with ensembling.
    """
    kept, chunk = plan.chunks.shape[1:3]
    position = jnp.minimum(plan.age, chunk - 1)[:, :, None, None]
    candidates = jnp.take_along_axis(plan.chunks, position, axis=2)[:, :, 0]
    later = Plan(plan.chunks, jnp.minimum(plan.age + 1, chunk))
    if kept == 1:
        return candidates[:, 0], later
    assert decay is not None, "ensembling needs a decay"
    exists = plan.age < chunk
    number = jnp.cumsum(exists, axis=1) - 1
    # Softmax of the exponents: a negative decay, which favours the newest, does not overflow.
    weights = jax.nn.softmax(jnp.where(exists, -decay * number, -jnp.inf), axis=1)[..., None]
    return jnp.where(exists[..., None], weights * candidates, 0).sum(axis=1), later
