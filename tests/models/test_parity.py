"""Our blocks against Hugging Face Transformers' in PyTorch, float32, random weights, small sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act.models.language import LanguageConfig, LanguageModel
from mllm_act.models.layers import Linear
from mllm_act.models.vision import VisionConfig, VisionTransformer, preprocess

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def copy(linear: Linear, theirs: list) -> None:
    """Copies one projection of every layer: theirs are [outputs, inputs]."""
    linear.kernel[...] = jnp.stack([jnp.array(one.weight.detach().numpy().T) for one in theirs])
    if linear.bias is not None:
        linear.bias[...] = jnp.stack([jnp.array(one.bias.detach().numpy()) for one in theirs])


def copy_norm(norm: nnx.Module, theirs: list) -> None:
    norm.scale[...] = jnp.stack([jnp.array(one.weight.detach().numpy()) for one in theirs])
    if hasattr(norm, "bias"):
        norm.bias[...] = jnp.stack([jnp.array(one.bias.detach().numpy()) for one in theirs])


@pytest.mark.parametrize(("kv_heads", "theta"), [(4, 10_000.0), (2, 100_000.0)])
def test_language_model_equals_llama(kv_heads: int, theta: float) -> None:
    torch.manual_seed(0)
    hf = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=kv_heads, rms_norm_eps=1e-5, 
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    ).eval()  # fmt: skip
    config = LanguageConfig(
        vocabulary=40,
        action_tokens=30,
        width=32,
        layers=3,
        heads=4,
        kv_heads=kv_heads,
        mlp_width=48,
        rope_theta=theta,
    )
    ours = LanguageModel(config, nnx.Rngs(0))
    ours.embedding[...] = jnp.array(hf.embed_tokens.weight.detach().numpy())
    for name, path in {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }.items():  # fmt: skip
        copy(getattr(ours.blocks, name), [layer.get_submodule(path) for layer in hf.layers])
    copy_norm(ours.blocks.norm1, [layer.input_layernorm for layer in hf.layers])
    copy_norm(ours.blocks.norm2, [layer.post_attention_layernorm for layer in hf.layers])
    tokens = np.random.default_rng(0).integers(0, 40, (2, 7))
    with torch.no_grad():
        expected = hf(torch.tensor(tokens)).last_hidden_state.numpy()
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (2, 7, 7))
    hidden, _ = ours(ours.embed(jnp.array(tokens), jnp.dtype("float32")), positions, causal)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


def test_vision_encoder_equals_clips_features_of_the_layer_before_the_last() -> None:
    torch.manual_seed(0)
    hf = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
        )
    ).eval()
    ours = VisionTransformer(
        VisionConfig(image_size=28, patch_size=7, width=32, layers=3, heads=4, mlp_width=64),
        nnx.Rngs(0),
    )
    vision = hf.vision_model if hasattr(hf, "vision_model") else hf
    embeddings = vision.embeddings
    patch = embeddings.patch_embedding.weight.detach().numpy()  # [width, 3, p, p]
    ours.patch.kernel[...] = jnp.array(patch.transpose(2, 3, 1, 0).reshape(-1, 32))
    ours.class_token[...] = jnp.array(embeddings.class_embedding.detach().numpy())
    ours.position[...] = jnp.array(embeddings.position_embedding.weight.detach().numpy())
    layers = list(vision.encoder.layers)[:3]
    for name, path in {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj",
        "up": "mlp.fc1", "down": "mlp.fc2",
    }.items():  # fmt: skip
        copy(getattr(ours.blocks, name), [layer.get_submodule(path) for layer in layers])
    copy_norm(ours.blocks.norm1, [layer.layer_norm1 for layer in layers])
    copy_norm(ours.blocks.norm2, [layer.layer_norm2 for layer in layers])
    ours.norm.scale[...] = jnp.array(vision.pre_layrnorm.weight.detach().numpy())
    ours.norm.bias[...] = jnp.array(vision.pre_layrnorm.bias.detach().numpy())

    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    pixels = np.array(preprocess(jnp.array(images), 28)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = (
            hf(torch.tensor(pixels), output_hidden_states=True).hidden_states[-2][:, 1:].numpy()
        )
    np.testing.assert_allclose(
        ours(jnp.array(images), dtype=jnp.dtype("float32")), expected, atol=1e-4
    )
