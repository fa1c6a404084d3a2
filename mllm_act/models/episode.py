"""Keys and values of whole episodes, kept: one decision reads the latents of its new images and nothing else.

    memory = empty(mllm, rows, prompt_tokens, steps)
    memory = read(mllm, memory, rows, prompts, ...)          # where episodes begin
    hidden, decoding, memory = look(mllm, memory, latents, position)

A row has the prompt first, then the latents of each step. Past actions are not in it, so this is for the history
``observations``. The hidden states are those of ``MLLM.__call__``, up to rounding.
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mllm_act.models.language import Cache
from mllm_act.models.mllm import MLLM, Decoding


@no_type_check  # JAX rebuilds it with shapes in place of arrays
@struct.dataclass
class Memory:
    """What is kept of B episodes."""

    cache: Cache  # of N prompt tokens and T steps of L latents
    prompt_mask: Bool[Array, "B N"]
    instruction: Float[Array, "B C"] | None  # see ``MLLM.instruction``


def empty(mllm: MLLM, rows: int, prompt_tokens: int, steps: int, latents: int) -> Memory:
    """Returns a memory of ``rows`` episodes of at most ``steps`` steps with ``latents`` latents each."""
    prompt = jnp.zeros((rows, prompt_tokens), jnp.int32)
    mask = jnp.zeros((rows, prompt_tokens), bool)

    def shapes() -> Memory:
        reading = mllm.read(prompt, mask)
        return Memory(reading.cache, mask, reading.instruction)

    length = prompt_tokens + steps * latents
    found = jax.eval_shape(shapes)
    cache = jax.tree.map(
        lambda c: jnp.zeros((*c.shape[:-3], length, *c.shape[-2:]), c.dtype), found.cache
    )
    return Memory(
        cache, mask, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found.instruction)
    )


def read(
    mllm: MLLM,
    memory: Memory,
    rows: Int[Array, " R"],
    prompt: Int[Array, "R N"],
    prompt_mask: Bool[Array, "R N"],
    images: dict[str, Any],
    step_mask: Bool[Array, "R T"],
) -> Memory:
    """Reads prompts, and the past steps of their episodes, into some rows.

    Args:
      mllm: the model.
      memory: is replaced.
      rows: which rows; a row may be named twice with the same values.
      prompt: token ids, with ``prompt_mask`` saying which exist.
      prompt_mask: see above.
      images: of each camera, uint8[R, T, H, W, 3]; T may be 0.
      step_mask: which steps exist.
    """
    instruction = mllm.instruction(prompt, prompt_mask)
    dtype = jnp.dtype(mllm.config.dtype)
    b, t = step_mask.shape
    if t:
        latents = mllm.bridged(mllm.features(images), instruction)
    else:
        latents = jnp.zeros((b, 0, 0, mllm.width), dtype)
    nothing = jnp.zeros((b, t, 0, mllm.width), dtype)
    length = prompt.shape[1] + t * latents.shape[2]
    x, positions, mask = mllm._sequence(prompt_mask, latents, step_mask, nothing, length)
    x = jnp.concatenate([mllm.language.embed(prompt, dtype), x], axis=1)
    _, cache = mllm.language(x, positions, mask, keep_cache=True)

    def put(kept: Array, new: Array) -> Array:
        # [.., B, S, G, K]; axes of layers in front, if any
        kept, new = jnp.moveaxis(kept, -4, 0), jnp.moveaxis(new, -4, 0)
        kept = kept.at[rows, ..., :length, :, :].set(new)
        return jnp.moveaxis(kept, 0, -4)

    kept_instruction = memory.instruction
    if instruction is not None and kept_instruction is not None:
        kept_instruction = kept_instruction.at[rows].set(instruction)
    prompt_masks = memory.prompt_mask.at[rows].set(prompt_mask)
    return Memory(jax.tree.map(put, memory.cache, cache), prompt_masks, kept_instruction)


def look(
    mllm: MLLM, memory: Memory, latents: Float[Array, "B L D"], position: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], Decoding, Memory]:
    """Reads the latents of the newest step of every row.

    Args:
      mllm: the model.
      memory: is replaced.
      latents: of the newest images.
      position: how many steps each row has before; 0 forgets all steps.

    Returns:
      The hidden state that predicts the first action token, the state for ``MLLM.extend``, and the new memory.
    """
    prompt_mask = memory.prompt_mask
    (b, n), count = prompt_mask.shape, latents.shape[1]
    start = position * count
    slots = jax.tree.leaves(memory.cache)[0].shape[-3] - n
    past = jnp.arange(slots) < start[:, None]
    exists = jnp.concatenate([prompt_mask, past], axis=1)
    causal = jnp.tril(jnp.ones((count, count), bool))
    mask = jnp.concatenate(
        [
            jnp.broadcast_to(exists[:, None], (b, count, n + slots)),
            jnp.broadcast_to(causal, (b, count, count)),
        ],
        axis=2,
    )
    positions = prompt_mask.sum(1)[:, None] + start[:, None] + jnp.arange(count)
    hidden, cache = mllm.language(latents, positions, mask, past=(memory.cache,), keep_cache=True)

    def put(kept: Array, new: Array) -> Array:
        def one(kept: Array, new: Array, start: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(kept, new, n + start, axis=-3)

        return jax.vmap(one, in_axes=(-4, -4, 0), out_axes=-4)(kept, new, start)

    cache = jax.tree.map(put, memory.cache, cache)
    memory = Memory(cache, prompt_mask, memory.instruction)
    after = jnp.arange(slots) < start[:, None] + count
    readable = jnp.concatenate([prompt_mask, after], axis=1)
    return hidden[:, -1], Decoding((memory.cache,), readable, positions[:, -1]), memory
