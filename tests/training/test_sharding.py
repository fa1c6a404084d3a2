"""Which axis of the mesh splits which dimension, and which meshes cannot be."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from mllm_act.errors import UserError
from mllm_act.training import sharding


def specs(shapes: dict[str, tuple[int, ...]], fsdp: int, tensor: int) -> dict[str, PartitionSpec]:
    mesh = AbstractMesh((1, fsdp, tensor), sharding.AXES)
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return {name: s.spec for name, s in sharding.of_parameters(tree, mesh).items()}


def test_matrices_are_split_and_the_layer_axis_is_not() -> None:
    found = specs(
        {
            "mllm/language/blocks/q/kernel": (30, 64, 32),
            "mllm/language/blocks/down/kernel": (30, 32, 64),
            "mllm/language/blocks/q/lora_a": (30, 64, 4),
            "mllm/language/norm/scale": (64,),
        },
        fsdp=4,
        tensor=2,
    )
    assert found["mllm/language/blocks/q/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["mllm/language/blocks/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert found["mllm/language/blocks/q/lora_a"] == PartitionSpec(None, "fsdp", None)
    assert not any(found["mllm/language/norm/scale"])


def test_a_dimension_that_the_axis_does_not_divide_stays_whole() -> None:
    found = specs({"mllm/language/blocks/q/kernel": (2, 6, 32)}, fsdp=4, tensor=2)
    assert found["mllm/language/blocks/q/kernel"] == PartitionSpec(None, None, "tensor")


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (7, 1, 1), (-2, 1, 1), (-1, 7, 1)])
def test_meshes_that_cannot_be(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="config.mesh: expected sizes whose product is"):
        sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))


def test_the_rest_of_the_devices_go_to_the_axis_that_says_so() -> None:
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    assert mesh.shape["data"] == jax.device_count()
