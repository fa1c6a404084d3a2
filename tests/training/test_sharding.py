"""Which axis of the mesh splits which dimension, and which meshes cannot be."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from mllm_act.batch import Batch, Observation, check_batch
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


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_packed_images_are_put_where_the_mask_says(share: float) -> None:
    """Only those that exist are sent; the rest of the batch is placed as ever."""
    rng, mesh = np.random.default_rng(0), sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    rows = 4 * jax.device_count()
    mask = np.sort(rng.random((rows, 5)) < share)[:, ::-1]
    images = rng.integers(1, 255, (rows, 5, 6, 4, 3)).astype(np.uint8) * mask[..., None, None, None]
    batch = Batch(
        Observation(
            images={"a": images[mask], "b": images}, proprio=np.zeros((rows, 5, 1), np.float32),
            mask=mask, prompt=np.zeros((rows, 2), np.int32), prompt_mask=np.ones((rows, 2), bool),
        ),
        action=np.ones((rows, 5, 2), np.float32),
    )  # fmt: skip
    check_batch(batch)
    placed = sharding.place_batch(batch, mesh)
    for name in ("a", "b"):
        found = placed.observation.images[name]
        np.testing.assert_array_equal(found, images)
        assert found.sharding == sharding.of_batch(mesh)
    np.testing.assert_array_equal(placed.action, batch.action)
