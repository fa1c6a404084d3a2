"""LLaVA whole against Transformers' in PyTorch: images among the words of a text, logits and generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act.models import generate
from mllm_act.models.bridge.perceiver import PerceiverConfig
from mllm_act.models.language import LanguageConfig
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.models.vision import VisionConfig
from tests.models import hugging_face, tiny
from tests.models.test_parity_vision import CLIP

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE = 39  # the id that stands for one patch of an image
PATCHES = 16


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Two texts padded on the left, the first with two images in it, the second with one, and what of them exists."""
    image = [IMAGE] * PATCHES
    rows = [[1, *image, 5, 6, *image, 7, 8, 9], [1, 11, *image, 12]]
    longest = max(map(len, rows))
    tokens = np.array([[0] * (longest - len(row)) + row for row in rows])
    return tokens, np.array([[i >= longest - len(row) for i in range(longest)] for row in rows])


def test_llavas_logits_and_generation_with_several_images() -> None:
    config = transformers.LlavaConfig(
        vision_config=hugging_face.clip_config(), text_config=hugging_face.llama_config(),
        image_token_index=IMAGE, image_seq_length=PATCHES,
    )  # fmt: skip
    theirs = hugging_face.randomized(transformers.LlavaForConditionalGeneration(config))
    ours = MLLM(
        MLLMConfig(
            vision=VisionConfig(image_size=28, patch_size=7, width=16, layers=3, heads=2, mlp_width=40),
            bridge=("projector",),
            sizes=(("perceiver", PerceiverConfig(width=16, heads=2, mlp_width=32)),),
            language=LanguageConfig(
                vocabulary=40, action_tokens=30, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48,
                epsilon=hugging_face.EPSILON,
            ),
            dtype="float32",
        ),
        nnx.Rngs(0),
    )  # fmt: skip
    arrays = {
        **hugging_face.under("vision", hugging_face.clip(theirs.model.vision_tower, layers=3)),
        **hugging_face.under(
            "bridge/projector", hugging_face.projector(theirs.model.multi_modal_projector)
        ),
        **hugging_face.under("language", hugging_face.llama(theirs)),
    }
    hugging_face.put(ours, arrays)

    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    mean, std = (np.array(values, np.float32) for values in CLIP)
    pixels = ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    tokens, exists = texts()
    given = {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(exists).long(),
        "pixel_values": torch.tensor(pixels),
    }
    with torch.no_grad():
        expected = theirs(**given).logits.numpy()
    written = theirs.generate(**given, max_new_tokens=8, do_sample=False)[:, tokens.shape[1] :]

    @tiny.jit
    def read(model: MLLM, images: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        latents = model.latents({"front": images[None]})
        assert latents.shape == (1, 3, PATCHES, 32) and model.config.latents_per_image == PATCHES
        words = model.language.embed(tokens, jnp.dtype("float32"))
        x = words.at[jnp.nonzero(tokens == IMAGE, size=3 * PATCHES)].set(latents.reshape(-1, 32))
        positions, mask = generate.layout(jnp.array(exists))
        return x, model.language.logits(model.language(x, positions, mask)[0])

    x, logits = read(ours, jnp.array(images), jnp.array(tokens))
    np.testing.assert_allclose(logits[exists], expected[exists], atol=1e-4)
    found = generate.generate(ours.language, x, jnp.array(exists), steps=8)
    assert len(np.unique(written)) > 3
    np.testing.assert_array_equal(found, written.numpy())
