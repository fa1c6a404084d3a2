"""The ``config.json`` of released models against the presets made for them, and the configs that we write."""

from typing import Any

import pytest

from mllm_act.errors import UserError
from mllm_act.models.presets import PRESETS
from mllm_act.weights import configs

# The relevant keys of llava-hf/llava-1.5-7b-hf, HuggingFaceTB/SmolLM2-135M-Instruct and facebook/dinov2-small.
LLAVA = {
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
    "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
    "vocab_size": 49152, "head_dim": None,
}  # fmt: skip
DINOV2 = {
    "model_type": "dinov2", "hidden_act": "gelu", "hidden_size": 384, "image_size": 518, "layer_norm_eps": 1e-06,
    "mlp_ratio": 4, "num_attention_heads": 6, "num_hidden_layers": 12, "patch_size": 14, "qkv_bias": True,
    "use_swiglu_ffn": False,
}  # fmt: skip
VICUNA_13B = {
    **SMOLLM2,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
}


# What older releases of transformers wrote beside the sizes.
HARMLESS = {
    "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "top_k": 50,
    "initializer_range": 0.041, "is_llama_config": True, "rope_interleaved": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "use_cache": True, "pretraining_tp": 1, "temperature": 1.0, "length_penalty": 1.0, "max_length": 20,
    "attention_dropout": 0.0, "sliding_window": None,
}  # fmt: skip


def check(values: dict[str, Any], preset: str) -> None:
    configs.check(configs.complete(values, "x"), PRESETS[preset].model, "x")


@pytest.mark.parametrize(
    ("values", "preset"),
    [(LLAVA, "llava_1_5_7b"), (SMOLLM2 | HARMLESS, "smollm2_vit_s"), (DINOV2, "smollm2_vit_s")],
)
def test_released_models_fit_their_presets(values: dict[str, Any], preset: str) -> None:
    check(values, preset)


@pytest.mark.parametrize(
    ("values", "preset", "match"),
    [
        (VICUNA_13B, "llava_1_5_7b", "hidden_size: expected 4096, found 5120; .*vocab_size|vocab_size: .*hidden_size"),
        (SMOLLM2 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "smollm2_vit_s", "rope_type: .*'linear'"),
        (SMOLLM2 | {"tie_word_embeddings": False}, "smollm2_vit_s", "tie_word_embeddings: expected True"),
        (SMOLLM2 | {"attention_bias": True}, "smollm2_vit_s", "attention_bias: expected False"),
        (DINOV2 | {"num_hidden_layers": 10}, "smollm2_vit_s", "num_hidden_layers: expected at least 11, found 10"),
        (LLAVA | {"vision_feature_select_strategy": "full"}, "llava_1_5_7b", "expected 'default', found 'full'"),
        (LLAVA | {"vision_feature_layer": 98}, "llava_1_5_7b", "vision_feature_layer: .* found 98"),
        (LLAVA | {"multimodal_projector_bias": False}, "llava_1_5_7b", "multimodal_projector_bias: expected True"),
        (SMOLLM2 | {"partial_rotary_factor": 0.5}, "smollm2_vit_s", "partial_rotary_factor: expected none, found 0.5"),
        (SMOLLM2 | {"sliding_window": 4096}, "smollm2_vit_s", "found sliding_window = 4096"),
        (SMOLLM2 | {"head_dim": 32}, "smollm2_vit_s", "head_dim: expected 64, found 32"),
        (SMOLLM2 | {"rms_norm_eps": float("nan")}, "smollm2_vit_s", "rms_norm_eps: .*found nan"),
        (SMOLLM2 | {"logits_scaling": 2.0, "qk_norm": True}, "smollm2_vit_s", "logits_scaling = 2.0, qk_norm = True"),
        (SMOLLM2 | {"quantization_config": {"bits": 4}}, "smollm2_vit_s", "found quantization_config"),
        (SMOLLM2 | {"hidden_size": "576"}, "smollm2_vit_s", "expected int, got str"),
        (SMOLLM2 | {"num_hidden_layers": 10**7}, "smollm2_vit_s", "at most 10,000, found 10,000,000"),
        (SMOLLM2 | {"num_labels": 10**9}, "smollm2_vit_s", "num_labels of at most 10,000"),
        (DINOV2 | {"num_channels": 4}, "smollm2_vit_s", "num_channels: expected 3, found 4"),
        (DINOV2, "llava_1_5_7b", "model_type: expected 'clip_vision_model', found 'dinov2'"),
    ],
)  # fmt: skip
def test_other_models_are_refused(values: dict[str, Any], preset: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        check(values, preset)


@pytest.mark.parametrize("preset", ["llava_1_5_7b", "smollm2_vit_s"])
def test_written_configs_pass_the_check(preset: str) -> None:
    model = PRESETS[preset].model
    configs.check(configs.complete(configs.language(model), "x"), model, "x")
    configs.check(configs.complete(configs.vision(model), "x"), model, "x")
    if model.vision.family == "clip":
        configs.check(configs.complete(configs.llava(model, 32000), "x"), model, "x")
