"""Our sizes as Hugging Face's ``config.json``, and a ``config.json`` checked against our sizes."""

from collections.abc import Iterator
from typing import Any

from mllm_act.errors import UserError
from mllm_act.models.mllm import MLLMConfig

# What a config.json leaves out because it is the class's default in transformers.
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


def complete(found: dict[str, Any]) -> dict[str, Any]:
    """Returns a ``config.json`` with the defaults put in that it leaves out."""
    if found.get("model_type") == "llava":
        text = {"model_type": "llama", **(found.get("text_config") or {})}
        image = {"model_type": "clip_vision_model", **(found.get("vision_config") or {})}
        return {**found, "text_config": complete(text), "vision_config": complete(image)}
    found = {**_DEFAULTS.get(str(found.get("model_type")), {}), **found}
    if found.get("num_key_value_heads") is None and found.get("model_type") == "llama":
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


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
        # Both spellings of the rotary base: transformers before 5 reads the first, since 5 the second.
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def vision(config: MLLMConfig) -> dict[str, Any]:
    """Returns the config of the vision encoder as a ``CLIPVisionModel`` or ``Dinov2Model``.

    It has the blocks that run here and no more, so that our features are its ``hidden_states[-1]``.
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
    """Returns the config of the whole as a ``LlavaForConditionalGeneration``."""
    side = config.vision.image_size // config.vision.patch_size
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": language(config),
        "vision_config": vision(config),
        "vision_feature_layer": -1,  # of the blocks that are kept
        "vision_feature_select_strategy": "default",  # without the class token
        "image_seq_length": side * side,
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.language.tied,
    }


def check(found: dict[str, Any], config: MLLMConfig, where: str) -> None:
    """Compares a source's ``config.json`` with the sizes that the weights are for.

    Args:
      found: the config, complete; a file format that says less may lack keys.
      config: the sizes wanted.
      where: the source, for the message.

    Raises:
      UserError: listing every difference, if the architecture, a size or the vocabulary is another.
    """
    kind = found.get("model_type")
    differences: list[str] = []
    if kind == "llava":
        text, image = found["text_config"], found["vision_config"]
        differences += _differences(text, language(config), "text_config.")
        differences += _differences(image, vision(config), "vision_config.")
        differences += _features(found, image, config)
        if found.get("projector_hidden_act", "gelu") != "gelu":
            differences.append(
                f"projector_hidden_act: expected 'gelu', found {found['projector_hidden_act']!r}"
            )
    elif kind == "llama":
        differences += _differences(found, language(config), "")
    elif kind in ("clip_vision_model", "dinov2"):
        differences += _differences(found, vision(config), "")
    else:
        differences.append(
            f"model_type: expected llava, llama, clip_vision_model or dinov2, found {kind!r}"
        )
    if differences:
        raise UserError(
            f"{where}: its config.json is of another model than the preset: {'; '.join(differences)}; "
            "pass the source that the preset is made for, or --preset of the model that this is"
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yields what differs among the keys that change the result; one that is not there is not compared."""
    rope = found.get("rope_parameters") or {}  # since transformers 5
    found = {**found, "rope_theta": rope.get("rope_theta", found.get("rope_theta", 1e4))}
    ignored = {"architectures", "rope_parameters", "max_position_embeddings", "num_channels"}
    for key, value in wanted.items():
        there = found.get(key)
        if key in ignored or there is None:
            continue
        if key == "num_hidden_layers" and "patch_size" in wanted:
            if there < value:  # later vision blocks are left out
                yield f"{prefix}{key}: expected at least {value}, found {there}"
        elif isinstance(value, float) and isinstance(there, (int, float)):
            if abs(there - value) > 1e-6 * abs(value):  # GGUF keeps float32
                yield f"{prefix}{key}: expected {value}, found {there}"
        elif there != value:
            yield f"{prefix}{key}: expected {value!r}, found {there!r}"
    scaling = found.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        yield f"{prefix}rope_type: expected 'default', found {kind!r}"


def _features(found: dict[str, Any], image: dict[str, Any], config: MLLMConfig) -> Iterator[str]:
    """LLaVA says which layer's features it takes; ours are those after the last block that runs."""
    blocks = image["num_hidden_layers"]
    layer = found.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or (layer % (blocks + 1)) != config.vision.layers:
        yield f"vision_feature_layer: expected that of {config.vision.layers} blocks, found {layer!r} of {blocks}"
    strategy = found.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        yield f"vision_feature_select_strategy: expected 'default', found {strategy!r}"
