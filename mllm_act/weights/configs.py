"""Writes our sizes as a Hugging Face ``config.json``, and checks a ``config.json`` against our sizes."""

from collections.abc import Iterator
from typing import Any

from mllm_act.errors import UserError
from mllm_act.models.mllm import MLLMConfig

# Defaults of transformers' config classes; a config.json may leave them out.
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_DINOV2 = {
    "hidden_size": 768,
    "mlp_ratio": 4,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
    "qkv_bias": True,
}
_DEFAULTS = {"llama": _LLAMA, "clip_vision_model": _CLIP, "dinov2": _DINOV2}


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a ``config.json`` with the defaults filled in."""
    if values.get("model_type") == "llava":
        text = {"model_type": "llama", **(values.get("text_config") or {})}
        image = {"model_type": "clip_vision_model", **(values.get("vision_config") or {})}
        return {**values, "text_config": complete(text), "vision_config": complete(image)}
    values = {**_DEFAULTS.get(str(values.get("model_type")), {}), **values}
    if values.get("num_key_value_heads") is None and values.get("model_type") == "llama":
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values


def language(config: MLLMConfig) -> dict[str, Any]:
    """Returns the config of the language model as a ``LlamaForCausalLM``."""
    c = config.language
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocabulary,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.width // c.heads,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.epsilon,
        # The rotary base in both spellings: transformers 4 reads the first, transformers 5 the second.
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def vision(config: MLLMConfig) -> dict[str, Any]:
    """Returns the config of the vision encoder as a ``CLIPVisionModel`` or ``Dinov2Model``.

    It has only the blocks that run here, so our features are its ``hidden_states[-1]``.
    """
    c = config.vision
    side = c.position_side or c.image_size // c.patch_size
    shared = {
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "image_size": side * c.patch_size,
        "patch_size": c.patch_size,
        "num_channels": 3,
    }
    if c.family == "clip":
        return shared | {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "intermediate_size": c.mlp_width,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
    return shared | {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "mlp_ratio": c.mlp_width / c.width if c.mlp_width % c.width else c.mlp_width // c.width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
        "qkv_bias": True,
    }


def llava(config: MLLMConfig, image_token: int) -> dict[str, Any]:
    """Returns the config of the whole model as a ``LlavaForConditionalGeneration``."""
    side = config.vision.image_size // config.vision.patch_size
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": language(config),
        "vision_config": vision(config),
        "vision_feature_layer": -1,  # only the blocks that run here are written
        "vision_feature_select_strategy": "default",  # without the class token
        "image_seq_length": side * side,
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.language.tied,
    }


def check(values: dict[str, Any], config: MLLMConfig, origin: str) -> None:
    """Compares a source's ``config.json`` with the sizes that the weights must have.

    Args:
      values: of the ``config.json``, with the defaults filled in; a file format that stores less may lack keys.
      config: the expected sizes.
      origin: the source, for error messages.

    Raises:
      UserError: listing every difference in architecture, sizes or vocabulary.
    """
    kind = values.get("model_type")
    differences: list[str] = []
    if kind == "llava":
        text, image = values["text_config"], values["vision_config"]
        differences += _differences(text, language(config), "text_config.")
        differences += _differences(image, vision(config), "vision_config.")
        differences += _feature_differences(values, image, config)
        activation = values.get("projector_hidden_act", "gelu")
        if activation != "gelu":
            differences.append(f"projector_hidden_act: expected 'gelu', found {activation!r}")
    elif kind == "llama":
        differences += _differences(values, language(config), "")
    elif kind in ("clip_vision_model", "dinov2"):
        differences += _differences(values, vision(config), "")
    else:
        differences.append(
            f"model_type: expected llava, llama, clip_vision_model or dinov2, found {kind!r}"
        )
    if differences:
        raise UserError(
            f"{origin}: expected the preset's model, found another in its config.json: {'; '.join(differences)}; "
            "pass the source that the preset is made for, or the --preset of this model"
        )


def _differences(values: dict[str, Any], expected: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yields the differences among the keys that change the result; missing keys are not compared."""
    rope = values.get("rope_parameters") or {}  # since transformers 5
    values = {**values, "rope_theta": rope.get("rope_theta", values.get("rope_theta", 1e4))}
    ignored = {"architectures", "rope_parameters", "max_position_embeddings", "num_channels"}
    for key, wanted in expected.items():
        actual = values.get(key)
        if key in ignored or actual is None:
            continue
        if key == "num_hidden_layers" and "patch_size" in expected:
            if actual < wanted:  # the last vision blocks may be left out
                yield f"{prefix}{key}: expected at least {wanted}, found {actual}"
        elif isinstance(wanted, float) and isinstance(actual, (int, float)):
            if abs(actual - wanted) > 1e-6 * abs(wanted):  # GGUF stores float32
                yield f"{prefix}{key}: expected {wanted}, found {actual}"
        elif actual != wanted:
            yield f"{prefix}{key}: expected {wanted!r}, found {actual!r}"
    scaling = values.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        yield f"{prefix}rope_type: expected 'default', found {kind!r}"


def _feature_differences(
    values: dict[str, Any], image: dict[str, Any], config: MLLMConfig
) -> Iterator[str]:
    """Checks which layer's features LLaVA uses; ours are those after the last block that runs."""
    blocks = image["num_hidden_layers"]
    layer = values.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or (layer % (blocks + 1)) != config.vision.layers:
        yield f"vision_feature_layer: expected that of {config.vision.layers} blocks, found {layer!r} of {blocks}"
    strategy = values.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        yield f"vision_feature_select_strategy: expected 'default', found {strategy!r}"
