"""Writes our sizes as a Hugging Face ``config.json``, and checks a ``config.json`` against our sizes."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.models.mllm import MLLMConfig
from mllm_act.weights.tensors import not_installed, parsing

KINDS = ("llava", "llama", "clip_vision_model", "dinov2")
# Fields that do not change what a model computes from its weights: those of training, of how a text is drawn, and of
# functions that are not used here. Every other field is compared, or refused by name where it has a value.
_HARMLESS = {
    "llama": {"pretraining_tp", "is_llama_config", "attention_dropout", "max_position_embeddings"},
    "clip_vision_model": {
        "attention_dropout", "initializer_factor", "projection_dim", "vocab_size", "max_position_embeddings",
    },
    "dinov2": {
        "hidden_dropout_prob", "attention_probs_dropout_prob", "layerscale_value", "drop_path_rate", "apply_layernorm",
        "reshape_hidden_states", "use_mask_token", "stage_names", "out_features", "out_indices",
    },
    "llava": {
        "text_config", "vision_config", "image_token_id", "ignore_index", "vocab_size", "max_position_embeddings",
    },
}  # fmt: skip
_HARMLESS_ANYWHERE = {
    "initializer_range", "tokenizer_class", "torch_dtype", "transformers.js_config", "unsloth_version",
    "unsloth_fixed", "auto_map", "attn_implementation", "num_labels", "prefix",
}  # fmt: skip
_MOST_LAYERS = 10_000


def complete(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Returns the values of a ``config.json`` as ``transformers`` understands them, with its defaults.

    Args:
      values: of the file.
      origin: the source, for error messages.

    Raises:
      UserError: if it is not the config of such a model, or has a field that changes what the model computes and that
        this code does not know.
    """
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # or it reports that there is no PyTorch
    try:
        from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
    except ImportError as error:
        raise not_installed("transformers", origin) from error
    kind = _kind(values, origin)
    path = Path(origin) / "config.json"
    with parsing(path, f"the config of a {kind}"):
        for name, part in _parts(values, kind):
            _kind(part, origin)
            for key, value in part.items():  # transformers makes lists of these lengths
                if key.startswith("num_") and isinstance(value, int) and value > _MOST_LAYERS:
                    raise UserError(
                        f"{path}: expected {name}{key} of at most {_MOST_LAYERS:,}, found {value:,}; download it again"
                    )
        result: dict[str, Any] = AutoConfig.for_model(
            kind, **{key: value for key, value in values.items() if key != "model_type"}
        ).to_dict()
        harmless = {*_HARMLESS_ANYWHERE, *PreTrainedConfig().to_dict(), *vars(GenerationConfig())}
        unknown = [
            f"{name}{key} = {value!r}"
            for name, part in _parts(result, kind)
            for key, value in part.items()
            if value not in (None, False, [], {}) and not key.startswith("_")
            if key not in harmless | _HARMLESS[part["model_type"]] | _compared(part["model_type"])
        ]
    if unknown:
        raise UserError(
            f"{path}: expected only fields that are known here, found {', '.join(unknown)[:400]}; the model may "
            "compute something else; remove a field from config.json if you know that it changes nothing"
        )
    return result


def _kind(values: dict[str, Any], origin: str) -> str:
    kind = values.get("model_type")
    if kind not in KINDS:
        raise UserError(
            f"{origin}: expected a model that a preset has, found another in its config.json: model_type: expected "
            f"{', '.join(KINDS[:-1])} or {KINDS[-1]}, found {kind!r}; pass the source that the preset is made for"
        )
    return str(kind)


def _parts(values: dict[str, Any], kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The configs within a config, with the prefix of their fields' names."""
    parts = [("", values)]
    if kind == "llava":
        defaults = {"text_config": "llama", "vision_config": "clip_vision_model"}
        for key, default in defaults.items():
            parts.append((f"{key}.", {"model_type": default, **(values.get(key) or {})}))
    return parts


@functools.cache
def _compared(kind: str) -> frozenset[str]:
    """The fields that ``check`` compares."""
    config = presets.get("llava_1_5_7b").model
    if kind == "dinov2":
        config = presets.get("smollm2_vit_s").model
    written = {
        "llava": lambda: llava(config, 0), "llama": lambda: language(config),
    }.get(kind, lambda: vision(config))()  # fmt: skip
    return frozenset(written)


def language(config: MLLMConfig) -> dict[str, Any]:
    """Returns the config of the language model as a ``LlamaForCausalLM``, without the ids of special tokens."""
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
        whole = llava(config, 0)
        keys = ("projector_hidden_act", "multimodal_projector_bias", "tie_word_embeddings")
        differences += _differences(values, {key: whole[key] for key in keys}, "")
    elif kind == "llama":
        differences += _differences(values, language(config), "")
    else:
        differences += _differences(values, vision(config), "")
    if differences:
        raise UserError(
            f"{origin}: expected the preset's model, found another in its config.json: {'; '.join(differences)}; "
            "pass the source that the preset is made for, or the --preset of this model"
        )


def _differences(values: dict[str, Any], expected: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yields the differences among the keys that change the result; missing keys are not compared."""
    rope = values.get("rope_parameters") or {}
    values = {**values, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    ignored = {"architectures", "rope_parameters", "max_position_embeddings"}
    for key, wanted in expected.items():
        actual = values.get(key)
        if key in ignored or actual is None:
            continue
        if key == "num_hidden_layers" and "patch_size" in expected:
            if actual < wanted:  # the last vision blocks may be left out
                yield f"{prefix}{key}: expected at least {wanted}, found {actual}"
        elif isinstance(wanted, float) and isinstance(actual, (int, float)):
            if not abs(actual - wanted) <= 1e-6 * abs(
                wanted
            ):  # GGUF stores float32; NaN is no match
                yield f"{prefix}{key}: expected {wanted}, found {actual}"
        elif actual != wanted:
            yield f"{prefix}{key}: expected {wanted!r}, found {actual!r}"
    for key, actual in rope.items():
        if key == "rope_type" and actual != "default":
            yield f"{prefix}rope_type: expected 'default', found {actual!r}"
        elif key not in ("rope_type", "type", "rope_theta") and actual not in (None, 1.0):
            yield f"{prefix}rope_parameters.{key}: expected none, found {actual!r}"


def _feature_differences(
    values: dict[str, Any], image: dict[str, Any], config: MLLMConfig
) -> Iterator[str]:
    """Checks which layer's features LLaVA uses; ours are those after the last block that runs."""
    blocks = image["num_hidden_layers"]
    layer = values.get("vision_feature_layer", -2)
    if layer not in (config.vision.layers, config.vision.layers - blocks - 1):
        yield f"vision_feature_layer: expected that of {config.vision.layers} blocks, found {layer!r} of {blocks}"
    strategy = values.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        yield f"vision_feature_select_strategy: expected 'default', found {strategy!r}"
