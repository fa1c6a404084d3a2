"""Encoding only the pictures that exist, of batches whose windows are mostly padding.

Shapes are fixed under jit, so what is saved has to be skipped while the program runs: the pictures that exist are put
first, the batch is cut into pieces, and a piece without any is passed over. A picture's features depend on no other
picture, so every picture that exists gets what it would get otherwise.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

PIECES = 8  # more skip more exactly; fewer keep a device busier


def skip_padding(
    encode: Callable[
        [UInt8[Array, "B T H W 3"], Float[Array, "B T C"] | None], Float[Array, "B T L D"]
    ],
    images: UInt8[Array, "B T H W 3"],
    instruction: Float[Array, "B C"] | None,
    mask: Bool[Array, "B T"],
    parts: int,
) -> Float[Array, "B T L D"]:
    """Encodes the pictures that ``mask`` says exist; the others' features are zero.

    Args:
      encode: turns pictures to features, each by itself and with the instruction of its window, where there is one;
        differentiable in that and in what it closes over.
      images: all places of the batch.
      instruction: of each window.
      mask: which of them hold a picture.
      parts: into how many equal parts the devices split axis B. Pictures change places within a part alone, so none
        goes from device to device; a piece is run where one part has a picture in it.
    """
    b, t = mask.shape
    places = b * t // parts
    pieces = math.gcd(places, PIECES)
    exists = mask.reshape(parts, places)
    order = jnp.argsort(~exists, axis=1, stable=True)
    pictures = images.reshape(parts, places, *images.shape[2:])
    windows = None if instruction is None else instruction.reshape(parts, b // parts, -1)

    def run(_: None, piece: tuple[Array, Array]) -> tuple[None, Array]:
        index, there = piece
        taken = jnp.take_along_axis(pictures, index[..., None, None, None], axis=1)
        told = None
        if windows is not None:
            told = jnp.take_along_axis(windows, index[..., None] // t, axis=1)
        shape = jax.eval_shape(encode, taken, told)
        empty = jnp.zeros(shape.shape, shape.dtype)
        return None, jax.lax.cond(there.any(), lambda: encode(taken, told), lambda: empty)

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(parts, pieces, -1), 1, 0)

    sorted_mask = jnp.take_along_axis(exists, order, axis=1)
    _, features = jax.lax.scan(run, None, (cut(order), cut(sorted_mask)))
    features = jnp.moveaxis(features, 0, 1).reshape(parts, places, *features.shape[3:])
    back = jnp.argsort(order, axis=1)
    features = jnp.take_along_axis(features, back[..., None, None], axis=1)
    return features.reshape(b, t, *features.shape[2:])
