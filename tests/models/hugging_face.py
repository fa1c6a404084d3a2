"""Small Hugging Face models with random weights, and their weights as our parameters.

The copying is written from the parameter tree alone and shares nothing with ``mllm_act.weights``: where the two
disagree, one of them is wrong. A test module that imports this is skipped where there is no PyTorch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from mllm_act import parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # more of them wait for each other longer than such sizes take

Arrays = dict[str, np.ndarray]
EPSILON = 1e-4  # no default of anybody, and large enough to show

LLAMA = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
CLIP = {
    "norm1": "layer_norm1", "norm2": "layer_norm2",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj",
    "up": "mlp.fc1", "down": "mlp.fc2",
}  # fmt: skip
DINOV2 = {
    "norm1": "norm1", "norm2": "norm2",
    "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj",
    "up": "mlp.fc1", "down": "mlp.fc2", "scale1": "layer_scale1", "scale2": "layer_scale2",
}  # fmt: skip
# The names of its attention in releases of transformers that have no q_proj there, such as 5.17.
DINOV2_QUERY = DINOV2 | {
    "q": "attention.attention.query", "k": "attention.attention.key", "v": "attention.attention.value",
    "o": "attention.output.dense",
}  # fmt: skip


def randomized(model: torch.nn.Module) -> Any:
    """Draws every parameter, so that no bias is left at zero and no scale at one, where mistakes would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and not name.endswith("bias"):  # scales of norms and layers
                parameter.copy_(1 + 0.2 * draw)
            else:
                parameter.copy_(0.2 * draw)
    return model.eval()


def llama_config(
    kv_heads: int = 2, *, tied: bool = False, theta: float = 10_000.0
) -> transformers.LlamaConfig:
    """Vocabulary 40, width 32, 3 layers of 4 heads. Nothing ends a text, so every text has the length asked for."""
    return transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, rms_norm_eps=EPSILON, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def clip_config() -> transformers.CLIPVisionConfig:
    """Images of 28 pixels in 16 patches, width 16, 4 layers of 2 heads."""
    return transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7,
    )  # fmt: skip


def dinov2_config(side: int) -> transformers.Dinov2Config:
    """Patches of 7 pixels, ``side`` by ``side`` stored positions, width 16, 4 layers of 2 heads."""
    return transformers.Dinov2Config(
        hidden_size=16, mlp_ratio=3, num_hidden_layers=4, num_attention_heads=2, image_size=7 * side, patch_size=7,
    )  # fmt: skip


def llama(model: Any) -> Arrays:
    """Parameters of a ``LlamaForCausalLM``, or of the language half of LLaVA, by path in our ``LanguageModel``."""
    body = getattr(model.model, "language_model", model.model)
    head = {} if model.config.tie_word_embeddings else {"head": array(model.lm_head.weight)}
    return {
        "embedding": array(body.embed_tokens.weight),
        "norm/scale": array(body.norm.weight),
        **head,
        **_blocks(list(body.layers), LLAMA),
    }


def clip(model: Any, layers: int) -> Arrays:
    """Parameters of the first ``layers`` layers of a ``CLIPVisionModel``, by path in our ``VisionTransformer``."""
    model = getattr(model, "vision_model", model)
    embeddings = model.embeddings
    return {
        "patch/kernel": _patches(embeddings.patch_embedding.weight),
        "class_token": array(embeddings.class_embedding),
        "position": array(embeddings.position_embedding.weight),
        **_named("norm", model.pre_layrnorm),
        **_blocks(list(model.encoder.layers)[:layers], CLIP),
    }


def dinov2(model: Any, layers: int) -> Arrays:
    """Parameters of the first ``layers`` layers of a ``Dinov2Model``, by path in our ``VisionTransformer``."""
    embeddings, blocks = model.embeddings, list(model.encoder.layer)[:layers]
    names = DINOV2 if hasattr(blocks[0].attention, "q_proj") else DINOV2_QUERY
    projection = embeddings.patch_embeddings.projection
    return {
        "patch/kernel": _patches(projection.weight),
        "patch/bias": array(projection.bias),
        "class_token": array(embeddings.cls_token)[0, 0],
        "position": array(embeddings.position_embeddings)[0],
        **_blocks(blocks, names),
    }


def projector(model: Any) -> Arrays:
    """Parameters of ``LlavaMultiModalProjector``, by path in our ``bridge/projector``."""
    return {**_named("layer1", model.linear_1), **_named("layer2", model.linear_2)}


def lora(model: Any) -> Arrays:
    """A PEFT model's factors, by path in our ``LanguageModel``; those of one projection stacked over the layers."""
    found: dict[str, list[np.ndarray]] = {}
    for layer in model.base_model.model.model.layers:
        for ours, theirs in LLAMA.items():
            module = layer.get_submodule(theirs)
            if hasattr(module, "lora_A"):
                for name, factor in (("lora_a", module.lora_A), ("lora_b", module.lora_B)):
                    found.setdefault(f"blocks/{ours}/{name}", []).append(
                        array(factor["default"].weight).T
                    )
    return {path: np.stack(arrays) for path, arrays in found.items()}


def put(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets all of a module's parameters: those given must be exactly those there are, shape for shape."""
    state = nnx.state(module, nnx.Param)
    named = parameters.flatten(state)
    assert named.keys() == arrays.keys(), named.keys() ^ arrays.keys()
    for path, leaf in named.items():
        assert leaf.shape == arrays[path].shape, (path, leaf.shape, arrays[path].shape)
    given: dict[str, Array] = {path: jnp.asarray(arrays[path], named[path].dtype) for path in named}
    nnx.update(module, parameters.unflatten(given, state))


def under(prefix: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Puts a prefix before every path."""
    return {f"{prefix}/{path}": value for path, value in arrays.items()}


def array(tensor: torch.Tensor) -> np.ndarray:
    """A copy of a tensor."""
    return tensor.detach().numpy().copy()


def _named(path: str, module: Any) -> Arrays:
    """One layer's parameters: Linear (theirs are [outputs, inputs]), a norm, or LayerScale."""
    if hasattr(module, "lambda1"):
        return {path: array(module.lambda1)}
    weight = array(module.weight)
    arrays = {f"{path}/kernel": weight.T} if weight.ndim == 2 else {f"{path}/scale": weight}
    if getattr(module, "bias", None) is not None:
        arrays[f"{path}/bias"] = array(module.bias)
    return arrays


def _blocks(layers: Sequence[Any], names: Mapping[str, str]) -> Arrays:
    """The parameters of all layers, stacked."""
    each = [
        {
            path: value
            for ours, theirs in names.items()
            for path, value in _named(f"blocks/{ours}", layer.get_submodule(theirs)).items()
        }
        for layer in layers
    ]
    return {path: np.stack([one[path] for one in each]) for path in each[0]}


def _patches(weight: torch.Tensor) -> np.ndarray:
    """A convolution [D, rgb, row, column] as a matrix over flattened patches (row, column, rgb)."""
    return array(weight).transpose(2, 3, 1, 0).reshape(-1, len(weight))
