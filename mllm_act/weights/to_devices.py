"""Moves arrays to devices one layer at a time, so that the host never holds more than one layer."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mllm_act.models import float8

Layers = Iterable[Callable[[], np.ndarray]]


def put(read: Callable[[], np.ndarray], like: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads an array, sends it to the devices and casts it there.

    Args:
      read: returns the values; they may be a view of a file, which is not used afterwards.
      like: shape, dtype and sharding of the array (sharding None: the default device).
    """
    sharding = _sharding(like)
    return jax.block_until_ready(_copier(like.dtype, sharding)(_send(read(), sharding)))


def put_layers(layers: Layers, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Makes an array with a leading layer axis, layer by layer.

    Each layer is read, sent to the devices, cast there and written into the array in place before the next one is
    read.
    """
    sharding = _sharding(like)
    array = jnp.zeros(like.shape, like.dtype, device=sharding)
    write = _writer(sharding)
    for index, read in enumerate(layers):
        array = jax.block_until_ready(write(array, _send(read()[None], sharding), index))
    return array


def put_float8(
    layers: Layers, like: jax.ShapeDtypeStruct, like_scale: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
    """Quantizes matrices with a leading layer axis to float8, layer by layer; returns them and their scales."""
    sharding, sharding_scale = _sharding(like), _sharding(like_scale)
    kernels = jnp.zeros(like.shape, like.dtype, device=sharding)
    scales = jnp.zeros(like_scale.shape, like_scale.dtype, device=sharding_scale)
    write, write_scale = _writer(sharding), _writer(sharding_scale)
    for index, read in enumerate(layers):
        kernel, scale = _quantize(_send(read()[None], sharding))
        kernels, scales = write(kernels, kernel, index), write_scale(scales, scale, index)
        jax.block_until_ready((kernels, scales))
    return kernels, scales


_quantize = jax.jit(float8.quantize)


def _sharding(like: jax.ShapeDtypeStruct) -> Sharding:
    if like.sharding is not None:
        return like.sharding
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _send(values: np.ndarray, sharding: Sharding) -> jax.Array:
    """Sends values to the devices, sharded as the array is; only the local devices' parts are read."""
    if isinstance(sharding, NamedSharding) and values.shape[0] == 1:  # one layer cannot be split
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


@functools.cache
def _copier(dtype: jnp.dtype, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """The compiled cast, which copies even if the dtype is the same already."""
    return jax.jit(lambda values: jnp.copy(values.astype(dtype)), out_shardings=sharding)


@functools.cache
def _writer(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """The compiled update of one layer in place."""

    def write(array: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, layer.astype(array.dtype), index, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
