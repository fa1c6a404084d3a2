"""What a run is said to need of a device's memory, against what XLA makes of the same update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from mllm_act import parameters
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.training import memory, sharding

pytestmark = pytest.mark.slow

TINY = presets.get("tiny").model
WITH_LORA = dataclasses.replace(
    TINY, language=dataclasses.replace(TINY.language, lora=LoRA(rank=8))
)
LORA = presets.LORA_AND_ADAPTER
B, T, N, M = 8, 3, 24, 2


class Network(nnx.Module):
    def __init__(self, config: MLLMConfig) -> None:
        self.mllm = MLLM(config, nnx.Rngs(0))


def split(config: MLLMConfig, trained: presets.Rules) -> tuple[nnx.GraphDef, Any, Any]:
    return parameters.split(nnx.eval_shape(lambda: Network(config)), trained)


def compiled_bytes(config: MLLMConfig, trained: presets.Rules) -> int:
    """What XLA takes for one update with AdamW: arguments, temporaries and results, less the batch."""
    graph, moved, held = split(config, trained)
    array, size = jax.ShapeDtypeStruct, config.vision.image_size
    images = {"front": array((B, T, size, size, 3), jnp.uint8)}
    prompt = (array((B, N), jnp.int32), array((B, N), bool))
    steps, fed = array((B, T), bool), array((B, T, M - 1, config.language.width), jnp.float32)
    tx = optax.adamw(1e-3)

    def update(
        moved: Any, moments: Any, held: Any, images: Any, prompt: Any, steps: Any, fed: Any
    ) -> Any:
        def loss_of(moved: Any) -> jax.Array:
            mllm = nnx.merge(graph, moved, held).mllm
            key = jax.random.key(0)
            latents = mllm.latents(images, mllm.instruction(*prompt))
            hidden = mllm(*prompt, latents, steps, fed, key=key)
            return hidden.astype(jnp.float32).sum()

        updates, moments = tx.update(jax.grad(loss_of)(moved), moments, moved)
        return optax.apply_updates(moved, updates), moments

    moments = jax.eval_shape(tx.init, moved)
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(
        moved, moments, held, images, prompt, steps, fed
    )
    found = lowered.compile().memory_analysis()
    arguments = found.argument_size_in_bytes - images["front"].size
    return (
        arguments
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


@pytest.mark.parametrize(
    ("config", "trained", "changes"),
    [
        (TINY, presets.EVERYTHING, {}),
        (presets.get("tiny_grid").model, presets.EVERYTHING, {}),
        (WITH_LORA, LORA, {"weight_dtype": "bfloat16", "dtype": "bfloat16", "remat": "full"}),
        (WITH_LORA, LORA, {"weight_dtype": "float8", "remat": "projections"}),
    ],
)
def test_the_estimate_is_within_its_factor_of_what_xla_takes(
    config: MLLMConfig, trained: presets.Rules, changes: dict[str, str]
) -> None:
    config = dataclasses.replace(config, **changes)
    _, moved, held = split(config, trained)
    needed = memory.estimate(config, moved, held, B, 1, T, N, M)
    found = compiled_bytes(config, trained)
    assert found / memory.FACTOR < sum(needed.values()) < found * memory.FACTOR


def test_what_is_split_over_devices_takes_a_part_of_each() -> None:
    _, moved, held = split(TINY, presets.EVERYTHING)
    whole = memory.estimate(TINY, moved, held, 1, 1, 1, N, M)
    mesh = AbstractMesh((1, 4, 1), sharding.AXES)
    parts = [sharding.abstract(tree, mesh) for tree in (moved, held)]
    quarter = memory.estimate(TINY, *parts, 1, 1, 1, N, M)
    for part in ("weights", "optimizer", "gradients"):
        assert whole[part] / 4 < quarter[part] < whole[part] / 3
    assert quarter["activations"] == whole["activations"]


def test_a_run_that_cannot_fit_is_told_its_largest_part_and_the_mends() -> None:
    device = jax.local_devices()[:1]
    there = memory.available(device)
    needed = {"weights": there / 4, "optimizer": 0.0, "gradients": 0.0, "activations": there}
    memory.check(needed, device)  # it may fit: activations are known to within a factor
    assert "may not fit" in memory.table(needed, device)
    with pytest.raises(
        UserError, match=r"GiB, .* of them for activations; try --config.remat=full"
    ):
        memory.check({**needed, "activations": 2 * there}, device)
    with pytest.raises(UserError, match="for weights; try --config.weight_dtype=float8"):
        memory.check({**needed, "weights": 1.1 * there}, device)


def test_the_papers_preset_says_what_it_needs_before_anything_is_made() -> None:
    """7B in bfloat16 are 13 GiB; LoRA, Perceiver and their moments are a small part."""
    preset = presets.get("llava_1_5_7b")
    config = dataclasses.replace(preset.model, remat="full")
    _, moved, held = split(config, preset.trained)
    needed = memory.estimate(config, moved, held, 32, 1, 3, 64, 2)
    assert 13 < needed["weights"] / memory.GIB < 14
    assert needed["optimizer"] == 2 * needed["gradients"] < needed["weights"] / 10
    assert 2 < needed["activations"] / memory.GIB < 40
