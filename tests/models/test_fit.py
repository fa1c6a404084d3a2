"""Images that are not square: what the vision encoder sees, in training and in acting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mllm_act.errors import UserError
from mllm_act.models.acting.prepare import for_acting
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.models.vision import FAMILIES, FITS, preprocess
from tests.models import tiny

pytestmark = pytest.mark.slow

SHAPES = {"front": (20, 40), "wrist": (36, 20)}


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """PIL's antialiased bicubic resize of each channel, without rounding in between; values in [0, 1]."""
    bands = [Image.fromarray(image[..., i].astype(np.float32), "F") for i in range(3)]
    small = [np.asarray(band.resize((size, size), Image.Resampling.BICUBIC)) for band in bands]
    return np.clip(np.stack(small, -1) / 255, 0, 1)


@pytest.mark.parametrize("shape", SHAPES.values())
def test_pad_and_crop_are_bars_and_a_centre_in_front_of_the_resize(shape: tuple[int, int]) -> None:
    image, (height, width) = pixels(*shape), shape
    low, high = min(shape), max(shape)
    padded, before = np.zeros((high, high, 3), np.uint8), (high - low) // 2
    centre = image[:, before : before + low] if width > height else image[before : before + low]
    if width > height:
        padded[before : before + low] = image
    else:
        padded[:, before : before + low] = image
    family = FAMILIES["clip"]
    for fit, expected in (("pad", padded), ("crop", centre), ("squash", image)):
        found = preprocess(jnp.asarray(image), 12, fit=fit) * np.array(family.std) + np.array(
            family.mean
        )
        assert found.shape == (12, 12, 3)
        np.testing.assert_allclose(found, resized(expected, 12), atol=2e-5)


def test_square_images_are_the_same_in_every_fit_and_squash_is_a_plain_resize() -> None:
    image = jnp.asarray(pixels(2, 20, 20))
    for fit in FITS:
        np.testing.assert_array_equal(preprocess(image, 12, fit=fit), preprocess(image, 12))
    wide, family = jnp.asarray(pixels(2, 20, 40)), FAMILIES["clip"]
    plain = jax.image.resize(wide.astype(jnp.float32) / 255, (2, 12, 12, 3), "cubic")
    plain = (jnp.clip(plain, 0, 1) - jnp.array(family.mean)) / jnp.array(family.std)
    np.testing.assert_array_equal(preprocess(wide, 12), plain)


@pytest.mark.parametrize("fit", FITS)
def test_acting_sees_what_training_sees(fit: str) -> None:
    """Cameras of different sizes in one batch."""
    model = tiny.mllm(fit=fit)
    images = {name: jnp.asarray(pixels(2, 3, *shape)) for name, shape in SHAPES.items()}
    latents = tiny.jit(lambda model, images: model.latents(images))
    trained = latents(model, images)
    assert trained.shape == (2, 3, 8, tiny.D)
    np.testing.assert_allclose(latents(for_acting(model), images), trained, atol=1e-5)
    other = tiny.mllm(fit=FITS[FITS.index(fit) - 1])
    assert not np.allclose(latents(other, images), trained, atol=1e-3)


def test_the_fit_is_kept_and_checked() -> None:
    config = tiny.mllm(fit="pad").config
    kept = dataclasses.asdict(config)
    assert MLLMConfig.from_dict(kept) == config
    del kept["fit"]  # of a checkpoint written before there was a choice
    assert MLLMConfig.from_dict(kept).fit == "squash"
    with pytest.raises(UserError, match="fit: expected one of squash, pad, crop, found 'stretch'"):
        MLLM(dataclasses.replace(config, fit="stretch"), None)
