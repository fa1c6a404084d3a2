"""Puts arrays on devices piece by piece, so that the host never holds more than the piece under way."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mllm_act.models import float8

Layers = Iterable[Callable[[], np.ndarray]]


def place(read: Callable[[], np.ndarray], wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Makes an array of values that are read at once, sent to where they belong, and cast there.

    Args:
      read: gives the values; may be a view of a file, which is not looked at afterwards.
      wanted: shape, dtype and sharding of the array (None: the default device).
    """
    sharding = _sharding(wanted)
    return jax.block_until_ready(_copier(wanted.dtype, sharding)(_send(read(), sharding)))


def place_layers(layers: Layers, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Makes an array with a leading layer axis.

    Each layer is read, sent to where it belongs, cast there and written into the array, which is updated in place;
    the next is read once that is done.
    """
    sharding = _sharding(wanted)
    target = jnp.zeros(wanted.shape, wanted.dtype, device=sharding)
    write = _writer(sharding)
    for number, read in enumerate(layers):
        target = jax.block_until_ready(write(target, _send(read()[None], sharding), number))
    return target


def place_float8(
    layers: Layers, wanted: jax.ShapeDtypeStruct, wanted_scale: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
    """Makes matrices in float8 and their scales, with a leading layer axis, of matrices in another dtype."""
    sharding, sharding_scale = _sharding(wanted), _sharding(wanted_scale)
    target = jnp.zeros(wanted.shape, wanted.dtype, device=sharding)
    scales = jnp.zeros(wanted_scale.shape, wanted_scale.dtype, device=sharding_scale)
    write, write_scale = _writer(sharding), _writer(sharding_scale)
    for number, read in enumerate(layers):
        kernel, scale = _quantize(_send(read()[None], sharding))
        target, scales = write(target, kernel, number), write_scale(scales, scale, number)
        jax.block_until_ready((target, scales))
    return target, scales


_quantize = jax.jit(float8.quantize)


def _sharding(wanted: jax.ShapeDtypeStruct) -> Sharding:
    if wanted.sharding is not None:
        return wanted.sharding
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _send(values: np.ndarray, sharding: Sharding) -> jax.Array:
    """Puts values on the devices, split as the array is; each device's part alone is read."""
    if isinstance(sharding, NamedSharding) and values.shape[0] == 1:  # one layer is not split
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


@functools.cache
def _copier(dtype: jnp.dtype, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """The cast, to a new array even where there is nothing to cast."""
    return jax.jit(lambda values: jnp.copy(values.astype(dtype)), out_shardings=sharding)


@functools.cache
def _writer(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """The update in place."""

    def write(target: jax.Array, layer: jax.Array, number: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(target, layer.astype(target.dtype), number, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
