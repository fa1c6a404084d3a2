"""Puts arrays on devices piece by piece, so that the host never holds more than the piece under way."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mllm_act.models import float8

Pieces = Iterable[tuple[int, Callable[[], np.ndarray]]]  # (place on the first axis, its values)


def place(pieces: Pieces, wanted: jax.ShapeDtypeStruct, stacked: bool) -> jax.Array:
    """Makes one array of its pieces.

    Each piece is read, sent to where it belongs, cast there and written into the array, which is updated in place;
    the next is read once that is done.

    Args:
      pieces: with ``stacked``, one layer each; else the whole as the only one.
      wanted: shape, dtype and sharding of the array (None: the default device).
      stacked: whether the array has a leading layer axis.
    """
    sharding = _sharding(wanted)
    target = jnp.zeros(wanted.shape, wanted.dtype, device=sharding)
    write = _writer(sharding)
    for layer, read in pieces:
        piece = _send(read(), sharding, stacked)
        target = write(target, piece, layer if stacked else 0)
        jax.block_until_ready(target)
    return target


def place_float8(
    pieces: Pieces, wanted: jax.ShapeDtypeStruct, wanted_scale: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
    """Makes a stacked matrix in float8 and its scales of matrices that have another dtype; see ``place``."""
    sharding, sharding_scale = _sharding(wanted), _sharding(wanted_scale)
    target = jnp.zeros(wanted.shape, wanted.dtype, device=sharding)
    scales = jnp.zeros(wanted_scale.shape, wanted_scale.dtype, device=sharding_scale)
    write, write_scale = _writer(sharding), _writer(sharding_scale)
    for layer, read in pieces:
        kernel, scale = _quantize(_send(read(), sharding, True))
        target, scales = write(target, kernel, layer), write_scale(scales, scale, layer)
        jax.block_until_ready((target, scales))
    return target, scales


_quantize = jax.jit(float8.quantize)


def _sharding(wanted: jax.ShapeDtypeStruct) -> Sharding:
    if wanted.sharding is not None:
        return wanted.sharding
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _send(values: np.ndarray, sharding: Sharding, stacked: bool) -> jax.Array:
    """Puts one piece on the devices, split as the array is; each device's part alone is read."""
    if stacked:
        values = values[None]
    if stacked and isinstance(sharding, NamedSharding):  # one layer has no layers to split
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


@functools.cache
def _writer(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """The update in place; a copy in any case, for a piece may be a view of a file."""

    def write(target: jax.Array, piece: jax.Array, first: int) -> jax.Array:
        piece = piece.reshape(-1, *target.shape[1:]).astype(target.dtype)
        return jax.lax.dynamic_update_slice_in_dim(target, piece, first, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
