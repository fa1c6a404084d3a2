"""Where arrays live on the devices: one table of rules, for parameters and for activations.

The mesh has the axes ``data``, ``fsdp`` and ``tensor``. The batch is split over ``data`` and ``fsdp`` together, and
activations stay split so from the images to the loss. A parameter is stored split over ``fsdp`` and ``tensor``; a
matrix is gathered along ``fsdp`` where it is used, so that weights travel and activations do not. Along ``tensor``
nothing is gathered: the outputs of the first matrix of a pair are split as the inputs of the second one (Shoeybi et al.
2019, arXiv 1909.08053).

A dimension that its axis does not divide stays whole.

Models call ``activation`` and ``gathered`` at a few points. Both take the mesh from JAX's context
(``jax.sharding.use_abstract_mesh``), and do nothing without one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Shaped

from mllm_act import parameters

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what splits the first axis of every activation
Axis = str | tuple[str, ...] | None

# Matrices are [inputs, outputs]; stacked blocks have a layer axis in front, which stays whole.
PARTITIONS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"/tokenizer/", ()),  # of actions: small, and frozen
    (r"/(q|k|v|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"/(o|down)/kernel$", ("tensor", "fsdp")),
    (r"/lora_a$", ("fsdp", None)),
    (r"/lora_b$", (None, "tensor")),
    (r"language/(embedding|head)$", ("tensor", "fsdp")),
    (r"/kernel$", ("fsdp", None)),
    (r".", ()),
)


def stored(path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns how a parameter is stored, by its path; leading dimensions without a rule are whole."""
    partition = parameters.find(PARTITIONS, "/" + path)
    return _fitting((*(None,) * (len(shape) - len(partition)), *partition), shape, mesh)


def ends(name: str) -> tuple[Axis, Axis]:
    """Returns what splits the last axis of the inputs and of the outputs of the matrix ``name``, by the same rules."""
    inputs, outputs = parameters.find(PARTITIONS, f"/{name}/kernel")
    return (inputs if inputs == "tensor" else None), (outputs if outputs == "tensor" else None)


def activation(x: Shaped[Array, "B ..."], *last: Axis) -> Shaped[Array, "B ..."]:
    """States where an activation lives: its first axis is split as the batch, its last ones by ``last``."""
    mesh = _mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _of_activation(x, last, mesh))


def _of_activation(x: jax.Array, last: Sequence[Axis], mesh: AbstractMesh) -> PartitionSpec:
    return _fitting((BATCH, *(None,) * (x.ndim - 1 - len(last)), *last), x.shape, mesh)


def gathered(matrix: Any, path: str) -> Any:
    """Returns a matrix gathered along ``fsdp``; its gradient is scattered again.

    Args:
      matrix: [I, O]; or, from ``float8.lay_out``, that (or None) and its transpose.
      path: the end of its path, such as ``q/kernel``.
    """
    mesh = _mesh()
    if mesh is None:
        return matrix
    if isinstance(matrix, tuple):
        plain = None if matrix[0] is None else gathered(matrix[0], path)
        reverse = tuple(reversed(stored(path, matrix[1].shape[::-1], mesh)))
        return plain, _gathered(matrix[1], PartitionSpec(*reverse))
    return _gathered(matrix, stored(path, matrix.shape, mesh))


def gathers() -> bool:
    """Returns whether parameters are split over ``fsdp``; the backward pass should then gather them again."""
    mesh = _mesh()
    return mesh is not None and mesh.shape["fsdp"] > 1


def one_layer_ahead(weights: Any, before: Any) -> Any:
    """Lets the weights of a layer be gathered once the layer before has its input, beside that layer's arithmetic.

    Where layers are unrolled, nothing else keeps the compiler from gathering all weights at once.
    """
    if not gathers():
        return weights
    return jax.lax.optimization_barrier((weights, before))[0]


def all_but_gathered(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """A policy of ``jax.checkpoint`` that keeps everything but gathered matrices, and casts of them."""
    names = ("sharding_constraint", "custom_vjp_call", "convert_element_type", "transpose")
    return primitive.name not in names


def _gather(matrix: Array, spec: PartitionSpec) -> Array:
    with jax.named_scope("gather_weights"):
        return jax.lax.with_sharding_constraint(matrix, _whole(spec))


def _whole(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(axis if axis == "tensor" else None for axis in spec))


_gathered = jax.custom_vjp(_gather, nondiff_argnums=(1,))


def _forward(matrix: Array, spec: PartitionSpec) -> tuple[Array, None]:
    return _gather(matrix, spec), None


def _backward(spec: PartitionSpec, _: None, gradient: Array) -> tuple[Array]:
    # Both are said: else the compiler may split a sum over the batch by exchanging what is summed.
    with jax.named_scope("scatter_gradients"):
        gradient = jax.lax.with_sharding_constraint(gradient, _whole(spec))
        return (jax.lax.with_sharding_constraint(gradient, spec),)


_gathered.defvjp(_forward, _backward)


def local_attention(
    attend: Callable[..., Array],
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B N G K"],
    v: Float[Array, "B N G K"],
    mask: Bool[Array, "B Q N"] | None,
) -> Float[Array, "B Q H K"]:
    """Runs attention on every device for its own part of the batch and its own heads, with nothing exchanged.

    cuDNN's attention can be split only where q, k and v are split alike; inside ``jax.shard_map`` it sees the arrays of
    one device. Heads are split over ``tensor`` where that divides the heads of the keys, else they stay whole.
    """
    mesh = _mesh()
    if mesh is None:
        return attend(q, k, v, mask)
    axis = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    heads = _of_activation(q, (axis, None), mesh)
    specs = (heads, heads, heads, None if mask is None else _of_activation(mask, (), mesh))
    local = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return local(q, k, v, mask)


def _mesh() -> AbstractMesh | None:
    """Returns the mesh of JAX's context; None without one, and where each device's arrays are handled already."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def _fitting(
    partition: Sequence[Axis], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Leaves whole what an axis does not divide."""

    def parts(axis: Axis) -> int:
        return math.prod(
            mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ())
        )

    fits = [
        axis if size % parts(axis) == 0 else None
        for axis, size in zip(partition, shape, strict=True)
    ]
    return PartitionSpec(*fits)
