"""The vision encoders against Transformers' in PyTorch: float32, random weights, small sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act.models.vision import FAMILIES, VisionConfig, VisionTransformer
from tests.models import hugging_face, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
image_utils = pytest.importorskip("transformers.image_utils")

SIZES = {"patch_size": 7, "width": 16, "layers": 3, "heads": 2}  # theirs have a fourth layer
CLIP = (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD)
IMAGENET = (image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD)


def images(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)


def features_before_the_last(model: object, images: np.ndarray, statistics: tuple) -> np.ndarray:
    """Their hidden states of the layer before the last, without the class token."""
    mean, std = (np.array(values, np.float32) for values in statistics)
    pixels = ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        states = model(torch.tensor(pixels), output_hidden_states=True).hidden_states  # type: ignore[operator]
    return states[-2][:, 1:].numpy()


@tiny.jit
def encode(model: VisionTransformer, images: jax.Array) -> jax.Array:
    return model(images, dtype=jnp.dtype("float32"))


def test_features_equal_clips_of_the_layer_before_the_last() -> None:
    theirs = hugging_face.randomized(transformers.CLIPVisionModel(hugging_face.clip_config()))
    ours = VisionTransformer(
        VisionConfig(image_size=28, mlp_width=40, **SIZES), "float32", nnx.Rngs(0)
    )
    hugging_face.put(ours, hugging_face.clip(theirs, layers=3))
    expected = features_before_the_last(theirs, images(28), CLIP)
    np.testing.assert_allclose(encode(ours, jnp.array(images(28))), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("stored", "side"), [(4, 4), (9, 4), (3, 5)], ids=["as stored", "shrunk", "enlarged"]
)
def test_features_equal_dinov2s_with_its_positions_interpolated(stored: int, side: int) -> None:
    theirs = hugging_face.randomized(
        transformers.Dinov2Model(hugging_face.dinov2_config(side=stored))
    )
    config = VisionConfig(
        image_size=7 * side, mlp_width=48, family="dinov2",
        position_side=None if stored == side else stored, **SIZES,
    )  # fmt: skip
    ours = VisionTransformer(config, "float32", nnx.Rngs(0))
    hugging_face.put(ours, hugging_face.dinov2(theirs, layers=3))
    expected = features_before_the_last(theirs, images(7 * side), IMAGENET)
    np.testing.assert_allclose(encode(ours, jnp.array(images(7 * side))), expected, atol=1e-4)


def test_epsilons_are_theirs() -> None:
    """Too small to show in features at these sizes."""
    assert FAMILIES["clip"].epsilon == hugging_face.clip_config().layer_norm_eps
    assert FAMILIES["dinov2"].epsilon == hugging_face.dinov2_config(side=4).layer_norm_eps
