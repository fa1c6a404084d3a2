"""Greedy text generation with a key-value cache of fixed size: one compiled program, no word to the host in between.

Acting does not need it (``mllm.MLLM.prefill`` and ``extend`` decode actions); it shows that an imported language model
still speaks, and that what the cache computes is what the whole pass computes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mllm_act.errors import UserError
from mllm_act.models.language import Cache, LanguageModel


def layout(exists: Bool[Array, "B N"]) -> tuple[Int[Array, "B N"], Bool[Array, "B N N"]]:
    """Returns rotary positions and the causal mask of texts that are padded on either side.

    Positions count what exists. Padding sees itself alone, which keeps its softmax finite; nothing else sees it.
    """
    positions = jnp.maximum(jnp.cumsum(exists, axis=1) - 1, 0)
    order = jnp.arange(exists.shape[1])
    mask = (order[:, None] >= order) & exists[:, None, :]
    return positions, mask | (order[:, None] == order)


@partial(nnx.jit, static_argnames="steps")
def generate(
    language: LanguageModel, x: Float[Array, "B N D"], exists: Bool[Array, "B N"], steps: int
) -> Int[Array, "B steps"]:
    """Continues texts by the likeliest token, ``steps`` times.

    Args:
      language: the model; it computes in the dtype of ``x``.
      x: input embeddings: ``language.embed`` of tokens, the latents of images among them or not.
      exists: which inputs are no padding, at least one a text; padding is on either side.
      steps: how many tokens to generate. No token ends a text: what follows an end token is for the caller to cut.

    Raises:
      UserError: if text and continuation are longer than the model's context.
    """
    return decode(language, x, exists, steps)[0]


def decode(
    language: LanguageModel, x: Float[Array, "B N D"], exists: Bool[Array, "B N"], steps: int
) -> tuple[Int[Array, "B steps"], Float[Array, "B steps V"]]:
    """``generate`` without its jit, and the logits that each token was chosen by."""
    b, n, _ = x.shape
    if n + steps > language.config.max_positions:
        raise UserError(
            f"generate: expected at most {language.config.max_positions} tokens, the model's positions, "
            f"found {n} of text and {steps} to generate; shorten the text"
        )
    positions, mask = layout(exists)
    hidden, cache = language(x, positions, mask, keep_cache=True)
    newest = n - 1 - jnp.argmax(exists[:, ::-1], axis=1)
    logits = language.logits(hidden[jnp.arange(b), newest])
    length = exists.sum(axis=1)
    room = ((0, 0), (0, steps), (0, 0), (0, 0))  # for the keys or values [.., B, N, G, K] to come
    cache = jax.tree.map(lambda c: jnp.pad(c, ((0, 0),) * (c.ndim - 4) + room), cache)

    def step(
        carry: tuple[Cache, Float[Array, "B V"]], i: Int[Array, ""]
    ) -> tuple[tuple[Cache, Float[Array, "B V"]], tuple[Int[Array, " B"], Float[Array, "B V"]]]:
        cache, logits = carry
        token = logits.argmax(axis=-1)
        filled = jnp.broadcast_to(jnp.arange(steps) < i, (b, steps))
        itself = jnp.ones((b, 1), bool)  # a new input's key comes after all of the past's
        hidden, grown = language(
            language.embed(token[:, None], x.dtype),
            (length + i)[:, None],
            jnp.concatenate([exists, filled, itself], axis=1)[:, None],
            past=(cache,),
            keep_cache=True,
        )
        cache = jax.tree.map(
            lambda fixed, new: jax.lax.dynamic_update_slice_in_dim(
                fixed, new, n + i, axis=fixed.ndim - 3
            ),
            cache,
            grown,
        )
        return (cache, language.logits(hidden[:, 0])), (token, logits)

    _, (tokens, chosen_by) = jax.lax.scan(step, (cache, logits), jnp.arange(steps))
    return tokens.T, chosen_by.swapaxes(0, 1)
