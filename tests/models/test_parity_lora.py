"""LoRA against PEFT on Transformers' Llama in PyTorch, merged into the base and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act.models import generate
from mllm_act.models.acting.prepare import for_acting
from mllm_act.models.bridge.perceiver import PerceiverConfig
from mllm_act.models.language import LanguageConfig, LanguageModel
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.models.vision import VisionConfig
from tests.models import hugging_face, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@tiny.jit
def logits(language: LanguageModel, tokens: jax.Array) -> jax.Array:
    positions, mask = generate.layout(jnp.ones(tokens.shape, bool))
    hidden, _ = language(language.embed(tokens, jnp.dtype("float32")), positions, mask)
    return language.logits(hidden)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("q|k|v", ["q_proj", "k_proj", "v_proj"]),
        (".*", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
    ids=["q, k, v", "all linear layers"],
)
def test_logits_equal_pefts_merged_and_unmerged(ours: str, theirs: list[str]) -> None:
    base = hugging_face.randomized(transformers.LlamaForCausalLM(hugging_face.llama_config()))
    arrays = hugging_face.llama(base)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5, target_modules=theirs)
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model = MLLM(
        MLLMConfig(
            vision=VisionConfig(image_size=8, patch_size=8, width=8, layers=1, heads=1, mlp_width=8),
            bridge=("projector",),
            sizes=(("perceiver", PerceiverConfig(width=8, heads=1, mlp_width=8)),),
            language=LanguageConfig(
                vocabulary=40, action_tokens=30, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48,
                epsilon=hugging_face.EPSILON, lora=LoRA(targets=ours, rank=4, alpha=6.0, dropout=0.5),
            ),
            dtype="float32",
        ),
        nnx.Rngs(0),
    )  # fmt: skip
    hugging_face.put(model.language, {**arrays, **hugging_face.lora(adapted)})

    tokens = np.random.default_rng(0).integers(0, 40, (2, 9))
    with torch.no_grad():
        unmerged = adapted(torch.tensor(tokens)).logits.numpy()
        merged = adapted.merge_and_unload()(torch.tensor(tokens)).logits.numpy()
        with_no_factors = hugging_face.randomized(
            transformers.LlamaForCausalLM(hugging_face.llama_config())
        )(torch.tensor(tokens)).logits.numpy()
    assert np.abs(unmerged - with_no_factors).max() > 0.1  # the factors do something
    np.testing.assert_allclose(logits(model.language, jnp.array(tokens)), unmerged, atol=1e-4)
    ready = for_acting(model).language
    np.testing.assert_allclose(logits(ready, jnp.array(tokens)), merged, atol=1e-4)
