"""Our parameter paths and Hugging Face's tensor names: one table for both directions.

Hugging Face's names are matched without the prefix of the enclosing modules. The released LLaVA-1.5 has
``language_model.model.layers.0.mlp.up_proj.weight``, newer files ``model.language_model.layers.0...``, a Llama alone
``model.layers.0...``; all of them mean ``layers.0.mlp.up_proj.weight``.
"""

import dataclasses
import math
import re

import numpy as np

from mllm_act.models.mllm import MLLMConfig

LANGUAGE = {
    "language/embedding": "embed_tokens.weight",
    "language/head": "lm_head.weight",
    "language/norm/scale": "norm.weight",
    "language/blocks/norm1/scale": "layers.{}.input_layernorm.weight",
    "language/blocks/norm2/scale": "layers.{}.post_attention_layernorm.weight",
    "language/blocks/q/kernel": "layers.{}.self_attn.q_proj.weight",
    "language/blocks/k/kernel": "layers.{}.self_attn.k_proj.weight",
    "language/blocks/v/kernel": "layers.{}.self_attn.v_proj.weight",
    "language/blocks/o/kernel": "layers.{}.self_attn.o_proj.weight",
    "language/blocks/gate/kernel": "layers.{}.mlp.gate_proj.weight",
    "language/blocks/up/kernel": "layers.{}.mlp.up_proj.weight",
    "language/blocks/down/kernel": "layers.{}.mlp.down_proj.weight",
}
PROJECTOR = {
    f"bridge/projector/layer{i}/{ours}": f"linear_{i}.{theirs}"
    for i in (1, 2)
    for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
}


def _vision_blocks(block: str, modules: dict[str, str]) -> dict[str, str]:
    """Returns path -> name of the weight and bias of every module of a vision block."""
    table = {}
    for ours, theirs in modules.items():
        weight = "scale" if ours.startswith("norm") else "kernel"
        table[f"vision/blocks/{ours}/{weight}"] = f"{block}.{theirs}.weight"
        table[f"vision/blocks/{ours}/bias"] = f"{block}.{theirs}.bias"
    return table


CLIP = {
    "vision/patch/kernel": "embeddings.patch_embedding.weight",
    "vision/class_token": "embeddings.class_embedding",
    "vision/position": "embeddings.position_embedding.weight",
    "vision/norm/scale": "pre_layrnorm.weight",  # their spelling
    "vision/norm/bias": "pre_layrnorm.bias",
} | _vision_blocks(
    "encoder.layers.{}",
    {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
)
DINOV2 = {
    "vision/patch/kernel": "embeddings.patch_embeddings.projection.weight",
    "vision/patch/bias": "embeddings.patch_embeddings.projection.bias",
    "vision/class_token": "embeddings.cls_token",
    "vision/position": "embeddings.position_embeddings",
    "vision/blocks/scale1": "encoder.layer.{}.layer_scale1.lambda1",
    "vision/blocks/scale2": "encoder.layer.{}.layer_scale2.lambda1",
} | _vision_blocks(
    "encoder.layer.{}",
    {
        "norm1": "norm1",
        "norm2": "norm2",
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "o": "attention.output.dense",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
)
VISION = {"clip": CLIP, "dinov2": DINOV2}

_PREFIX = re.compile(
    r"^(?:(?:model|language_model|vision_tower|vision_model|multi_modal_projector|dinov2)\.)*"
)
# Tensors that we do not use: the norm after the last vision block (our encoders stop before it), DINOv2's mask token
# (for its pretraining), and precomputed tables.
_UNUSED = re.compile(
    r"^(post_layernorm|layernorm)\.|^embeddings\.(mask_token|position_ids)$|rotary_emb\.inv_freq$"
)
_VISION_BLOCK = re.compile(r"^encoder\.layers?\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Target:
    """The parameter that a tensor fills: its path, and the layer within it (None if it has no layer axis)."""

    path: str
    layer: int | None


def table(config: MLLMConfig, projector: bool) -> dict[str, str]:
    """Returns path -> name (with ``{}`` for the block's index) of everything that is imported and exported."""
    names = LANGUAGE | VISION[config.vision.family] | (PROJECTOR if projector else {})
    if config.language.tied:
        names = {path: name for path, name in names.items() if path != "language/head"}
    return names


def targets(config: MLLMConfig, projector: bool) -> dict[str, Target]:
    """Returns the target of every tensor that is needed, by the tensor's short name."""
    result = {}
    for path, name in table(config, projector).items():
        if "{}" in name:
            part = config.vision if path.startswith("vision/") else config.language
            for layer in range(part.layers):
                result[name.format(layer)] = Target(path, layer)
        else:
            result[name] = Target(path, None)
    return result


def short_name(name: str) -> str:
    """Returns a Hugging Face name without the prefix of its enclosing modules."""
    return _PREFIX.sub("", name)


def unused(name: str, config: MLLMConfig) -> bool:
    """Returns whether a tensor, by its short name, is known but not needed."""
    block = _VISION_BLOCK.match(name)
    dropped = block is not None and int(block[1]) >= config.vision.layers
    return (
        dropped or bool(_UNUSED.search(name)) or (config.language.tied and name == "lm_head.weight")
    )


def their_shape(path: str, ours: tuple[int, ...], family: str) -> tuple[int, ...]:
    """Returns the shape of a tensor in Hugging Face's layout.

    Args:
      path: our parameter's path.
      ours: its shape, without the layer axis.
      family: of the vision encoder; DINOv2 has leading axes of size 1 in its embeddings.
    """
    if path == "vision/patch/kernel":
        patch = math.isqrt(ours[0] // 3)
        return (ours[1], 3, patch, patch)
    if path.endswith("/kernel"):
        return ours[::-1]
    if family == "dinov2" and path in ("vision/class_token", "vision/position"):
        return (1,) * (3 - len(ours)) + ours
    return ours


def to_ours(path: str, values: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
    """Converts a tensor from Hugging Face's layout to ours; ``ours`` is the resulting shape."""
    if path == "vision/patch/kernel":  # [D, rgb, row, column] -> [row column rgb, D]
        values = values.transpose(2, 3, 1, 0)
    elif path.endswith("/kernel"):
        values = values.T
    return values.reshape(ours)


def to_theirs(path: str, values: np.ndarray, theirs: tuple[int, ...]) -> np.ndarray:
    """Inverse of ``to_ours``; ``theirs`` is the resulting shape."""
    if path == "vision/patch/kernel":
        _, rgb, rows, columns = theirs
        return values.reshape(rows, columns, rgb, -1).transpose(3, 2, 0, 1)
    if path.endswith("/kernel"):
        values = values.T
    return values.reshape(theirs)
