"""The mesh of devices, and the shardings of parameters and batches on it; see ``mllm_act.placement``."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mllm_act import parameters, placement
from mllm_act.errors import UserError
from mllm_act.models import layers
from mllm_act.placement import AXES


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh over all devices of all processes.

    On TPUs an axis follows the links between the chips; slices lie along ``data``.

    Args:
      sizes: devices along each axis of ``AXES``; one of them may be -1 for the remaining devices.
      devices: other devices than JAX's.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    shape = [sizes[axis] for axis in AXES]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    possible = all(size > 0 or size == -1 for size in shape) and shape.count(-1) <= 1
    if possible and -1 in shape:
        shape[shape.index(-1)] = count // -math.prod(shape)
    if not possible or math.prod(shape) != count:
        wanted = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(
            f"config.mesh: expected sizes whose product is the number of devices, {count}, at most one of them -1 for "
            f"the rest, found {wanted}"
        )
    if devices[0].platform != "tpu":
        return Mesh(np.array(devices).reshape(shape), AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise UserError(
            f"config.mesh.data: expected a multiple of the number of slices, {slices}, found {shape[0]}"
        )
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inner = [shape[0] // slices, *shape[1:]]
        arranged = mesh_utils.create_hybrid_device_mesh(
            inner, [slices, 1, 1], devices, allow_split_physical_axes=True
        )
    return Mesh(arranged, AXES)


def of_parameters(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns a sharding for every array of a tree, by its path and shape."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, placement.stored(parameters.name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def unstack(frozen: nnx.State, mesh: Mesh | AbstractMesh) -> tuple[Callable[..., nnx.State], Any]:
    """Returns ``layers.unstack`` of frozen parameters as a compiled function, and the shardings of its results.

    The matrices of a layer are split as they were in their stack; transposes are split along the same dimensions.
    """
    cut = functools.partial(layers.unstack, backward=True)

    def one(path: Any, leaf: Any) -> NamedSharding:
        parts = parameters.name(path).split("/")
        indices = list(itertools.takewhile(str.isdigit, reversed(parts)))
        name = "/".join(parts[: len(parts) - len(indices)])
        transposed = len(indices) == 2 and indices[0] == "1"
        shape = leaf.shape[::-1] if transposed else leaf.shape
        spec = placement.stored(name, shape, mesh)
        return NamedSharding(mesh, PartitionSpec(*reversed(spec)) if transposed else spec)

    shardings = jax.tree_util.tree_map_with_path(one, jax.eval_shape(cut, frozen))
    return jax.jit(cut, out_shardings=shardings), shardings


def abstract(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns a tree of ``jax.ShapeDtypeStruct`` with the sharding of every array, by its path and shape."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree, of_parameters(tree, mesh))


def of_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batch arrays, over their first axis."""
    return NamedSharding(mesh, PartitionSpec(placement.BATCH))


def part_of(mesh: Mesh) -> tuple[int, int]:
    """Returns which part of a batch's rows is on this process's devices, and how many parts there are.

    Processes whose devices differ only along ``tensor`` hold the same part.

    Raises:
      UserError: if the process's rows are not one of several equal parts.
    """
    by_row = mesh.devices.reshape(-1, mesh.shape["tensor"])
    own = [
        row
        for row, devices in enumerate(by_row)
        if any(device.process_index == jax.process_index() for device in devices)
    ]
    parts, uneven = divmod(len(by_row), len(own))
    if uneven or own != list(range(own[0], own[0] + len(own))) or own[0] % len(own):
        raise UserError(
            f"config.mesh: expected the batch's {len(by_row)} parts to be divided equally among the processes, found "
            f"{own} in process {jax.process_index()}; make tensor a divisor or a multiple of a process's devices"
        )
    return own[0] // len(own), parts


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch (numpy arrays) on its devices, as global arrays.

    Of packed images (see ``mllm_act.batch``) only those that exist are sent.
    """
    sharding = of_batch(mesh)
    observation = batch.observation
    packed = {name: x for name, x in observation.images.items() if x.ndim == 4}
    rest = {name: x for name, x in observation.images.items() if x.ndim != 4}
    batch = batch.replace(observation=observation.replace(images=rest))
    placed = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
    if not packed:
        return placed
    images = {name: _unpack(x, observation.mask, mesh) for name, x in packed.items()}
    images = {name: images[name] if name in packed else placed.observation.images[name] for name in
              observation.images}  # fmt: skip
    return placed.replace(observation=placed.observation.replace(images=images))


PIECES = 8  # sizes that packed images are padded to, each of which is compiled for once


def _unpack(images: np.ndarray, mask: np.ndarray, mesh: Mesh) -> jax.Array:
    """Sends packed images [N, H, W, 3] to this process's devices; returns the global array [B, T, H, W, 3].

    The devices put images in the places that ``mask``, bool[b, T], says, and zeros in the others.
    """
    rows, steps = mask.shape
    sharding, shape = of_batch(mesh), (rows * part_of(mesh)[1], steps, *images.shape[1:])
    slices = {
        device: index[0].indices(shape[0])[:2]
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    first = min(start for start, _ in slices.values())
    counts = np.concatenate([[0], np.cumsum(mask.sum(1))])
    places = (np.cumsum(mask) - 1).reshape(mask.shape)  # of each step's image among the packed
    on_devices = []
    for device, (start, end) in slices.items():
        own = slice(start - first, end - first)
        begin, stop = counts[own.start], counts[own.stop]
        piece = -(-(end - start) * steps // PIECES)
        size = piece * max(1, -(-(stop - begin) // piece))
        chunk = np.zeros((size, *images.shape[1:]), images.dtype)
        chunk[: stop - begin] = images[begin:stop]
        index = np.where(mask[own], places[own] - begin, size).astype(np.int32)
        on_devices.append(_spread(*jax.device_put((chunk, index), device)))
    return jax.make_array_from_single_device_arrays(shape, sharding, on_devices)


@jax.jit
def _spread(images: jax.Array, index: jax.Array) -> jax.Array:
    """Returns ``images[index]``, zeros where the index is beyond them."""
    return images.at[index].get(mode="fill", fill_value=0)
