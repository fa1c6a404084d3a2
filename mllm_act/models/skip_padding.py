"""Encoding only the images that exist, in batches whose windows are mostly padding.

Shapes are static under jit, so padding must be skipped at run time: existing images are sorted to the front, the batch
is cut into pieces, and a piece without images is skipped. The features of an image depend on no other image, so every
existing image gets the same features as without skipping.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from mllm_act import placement

PIECES = 8  # more skip more exactly; fewer keep a device busier


def skip_padding(
    encode: Callable[
        [UInt8[Array, "B T H W 3"], Float[Array, "B T C"] | None], Float[Array, "B T L D"]
    ],
    images: UInt8[Array, "B T H W 3"],
    instruction: Float[Array, "B C"] | None,
    mask: Bool[Array, "B T"],
    shards: int,
) -> Float[Array, "B T L D"]:
    """Encodes the images that ``mask`` marks as existing; the features of the others are zero.

    Args:
      encode: turns images into features, each by itself and with its window's instruction, where there is one;
        differentiable in the instruction and in what it closes over.
      images: of the batch, padding included.
      instruction: of each window.
      mask: which images exist.
      shards: the number of equal parts that the devices split axis B into. Images move only within a shard, so none
        goes from device to device; a piece is run where any shard has an image in it.
    """
    b, t = mask.shape
    count = b * t // shards  # images of a shard
    pieces = math.gcd(count, PIECES)
    exists = mask.reshape(shards, count)
    order = jnp.argsort(~exists, axis=1, stable=True)
    flat = placement.activation(images.reshape(shards, count, *images.shape[2:]))
    windows = None if instruction is None else instruction.reshape(shards, b // shards, -1)

    def run(_: None, piece: tuple[Array, Array]) -> tuple[None, Array]:
        index, piece_exists = piece
        chosen = placement.activation(
            jnp.take_along_axis(flat, index[..., None, None, None], axis=1)
        )
        own = None
        if windows is not None:
            own = jnp.take_along_axis(windows, index[..., None] // t, axis=1)
        shape = jax.eval_shape(encode, chosen, own)
        empty = jnp.zeros(shape.shape, shape.dtype)
        return None, jax.lax.cond(piece_exists.any(), lambda: encode(chosen, own), lambda: empty)

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(shards, pieces, -1), 1, 0)

    sorted_mask = jnp.take_along_axis(exists, order, axis=1)
    _, features = jax.lax.scan(run, None, (cut(order), cut(sorted_mask)))
    features = jnp.moveaxis(features, 0, 1).reshape(shards, count, *features.shape[3:])
    back = jnp.argsort(order, axis=1)
    features = jnp.take_along_axis(placement.activation(features), back[..., None, None], axis=1)
    return features.reshape(b, t, *features.shape[2:])
