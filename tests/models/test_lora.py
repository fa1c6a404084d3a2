"""LoRA: which matrices it adapts, what it counts, and that the frozen base stays what it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act import parameters
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.models.language import PROJECTIONS, LanguageConfig, LanguageModel
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLM
from tests.models import tiny


def language(lora: LoRA) -> LanguageModel:
    """A model's shapes; nothing is allocated."""
    config = LanguageConfig(
        vocabulary=32, action_tokens=16, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, lora=lora
    )  # fmt: skip
    return nnx.eval_shape(lambda: LanguageModel(config, "float32", nnx.Rngs(0)))


def factors(module: nnx.Module) -> dict[str, int]:
    """Sizes of all factors by path."""
    named = parameters.flatten(nnx.state(module, nnx.Param))
    return {path: leaf.size for path, leaf in named.items() if "lora_" in path}


@settings(max_examples=15, deadline=None)
@given(chosen=st.sets(st.sampled_from(PROJECTIONS), min_size=1))
def test_the_projections_that_the_pattern_matches_wholly_get_factors(chosen: set[str]) -> None:
    found = factors(language(LoRA(targets="|".join(sorted(chosen)), rank=2)))
    assert {path.split("/")[1] for path in found} == chosen


def test_a_pattern_is_matched_wholly() -> None:
    assert {path.split("/")[1] for path in factors(language(LoRA(targets="[a-k].*", rank=2)))} == {
        "k", "gate", "down",
    }  # fmt: skip


@pytest.mark.parametrize("targets", ["query", "", "qk", "Q"])
def test_a_pattern_that_matches_nothing_names_the_projections_there_are(targets: str) -> None:
    with pytest.raises(UserError, match=r"lora\.targets: .* q, k, v, o, gate, up, down .*q\|k\|v"):
        language(LoRA(targets=targets))


def test_the_papers_factors_are_100_7_million_parameters() -> None:
    config = presets.get("llava_1_5_7b").model
    assert config.language.lora == LoRA(targets="q|k|v", rank=128, alpha=32.0, dropout=0.1)
    model = nnx.eval_shape(lambda: MLLM(config, nnx.Rngs(0)))
    assert sum(factors(model).values()) == 100_663_296


class Network(nnx.Module):
    """Puts the model where the presets' rules look for it."""

    def __init__(self, mllm: MLLM) -> None:
        self.mllm = mllm


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "float8"])
def test_training_moves_factors_and_bridge_and_leaves_the_base_bit_for_bit(
    weight_dtype: str,
) -> None:
    network = Network(tiny.mllm(weight_dtype=weight_dtype))
    given, images = tiny.sequence(fed=0), tiny.images(cameras=("front",))
    labels = jnp.array(np.random.default_rng(2).integers(0, 16, (tiny.B, tiny.T)))
    graph, trained, frozen = parameters.split(network, presets.LORA_AND_ADAPTER)
    optimizer = optax.adam(1e-2)
    moments = optimizer.init(trained)

    def loss(trained: nnx.State, frozen: nnx.State, key: jax.Array) -> jax.Array:
        mllm = nnx.merge(graph, trained, frozen).mllm
        hidden = mllm(**{**given, "latents": mllm.latents(images)}, key=key)[:, :, 0]
        logits = mllm.language.logits(hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(
        trained: nnx.State, moments: optax.OptState, frozen: nnx.State, i: jax.Array
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(trained, frozen, jax.random.key(i))
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(trained, updates), moments, value

    kept = ("lora_a", "lora_b", "mllm/bridge")
    assert all(any(part in path for part in kept) for path in parameters.flatten(trained))
    state = {path for path in parameters.flatten(moments) if "mllm/" in path}
    assert state and all(any(part in path for part in kept) for path in state)

    before = {path: np.array(leaf) for path, leaf in parameters.flatten(nnx.state(network)).items()}
    losses = []
    for i in range(20):
        trained, moments, value = step(trained, moments, frozen, jnp.array(i))
        losses.append(float(value))
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    after = parameters.flatten(nnx.state(nnx.merge(graph, trained, frozen)))
    for path, leaf in before.items():
        same = np.array_equal(leaf, np.array(after[path]))
        assert same != any(part in path for part in kept), path
