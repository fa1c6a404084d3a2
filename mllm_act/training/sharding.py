"""Where arrays live: a mesh with axes ``data``, ``fsdp`` and ``tensor``, and rules from parameter path to partition.

The batch is split over ``data`` and ``fsdp`` together. A dimension that is not divisible by its axis stays whole.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mllm_act import parameters
from mllm_act.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Matrices are [inputs, outputs]; stacked blocks have a layer axis in front, which stays whole.
PARTITIONS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"/(q|k|v|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"/(o|down)/kernel$", ("tensor", "fsdp")),
    (r"/lora_a$", ("fsdp", None)),
    (r"/lora_b$", (None, "tensor")),
    (r"language/(embedding|head)$", ("tensor", "fsdp")),
    (r"/kernel$", ("fsdp", None)),
    (r".", ()),
)


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """Makes the mesh over all devices of all processes.

    Args:
      sizes: devices along each axis of ``AXES``; one of them may be -1 for the remaining devices.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    shape = [sizes[axis] for axis in AXES]
    count = len(jax.devices())
    possible = all(size > 0 or size == -1 for size in shape) and shape.count(-1) <= 1
    if possible and -1 in shape:
        shape[shape.index(-1)] = count // -math.prod(shape)
    if not possible or math.prod(shape) != count:
        wanted = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(
            f"config.mesh: expected sizes whose product is the number of devices, {count}, at most one of them -1 for "
            f"the rest, found {wanted}"
        )
    return Mesh(np.array(jax.devices()).reshape(shape), AXES)


def of_parameters(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns a sharding for every array of a tree, by its path and shape."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        partition = parameters.find(PARTITIONS, "/" + parameters.name(path))
        whole = (None,) * (leaf.ndim - len(partition))
        sizes = leaf.shape[len(whole) :]
        fits = [
            a if a and n % mesh.shape[a] == 0 else None
            for a, n in zip(partition, sizes, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*whole, *fits))

    return jax.tree_util.tree_map_with_path(one, tree)


def abstract(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns a tree of ``jax.ShapeDtypeStruct`` with the sharding of every array, by its path and shape."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree, of_parameters(tree, mesh))


def of_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batch arrays, over their first axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch (numpy arrays) on its devices, as global arrays."""
    sharding = of_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
