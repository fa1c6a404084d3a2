"""The whole model at sizes that take no time: two cameras, grouped heads, LoRA whose factors do something."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_act.models.bridge.film import FilmConfig
from mllm_act.models.bridge.perceiver import PerceiverConfig
from mllm_act.models.language import PROJECTIONS, LanguageConfig
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.models.vision import VisionConfig

CAMERAS = ("front", "wrist")
B, T, N, D = 3, 3, 5, 32  # batch, steps, prompt tokens, width
PROMPTS = (5, 3, 1)  # tokens of each prompt


def mllm(**changes: Any) -> MLLM:
    """Makes a model of 9 patches an image and 4 latents after a Perceiver; ``changes`` are fields of its config."""
    config = {
        "vision": VisionConfig(
            image_size=12, patch_size=4, width=16, layers=2, heads=2, mlp_width=32
        ),
        "bridge": ("perceiver",),
        "sizes": (
            ("perceiver", PerceiverConfig(width=16, heads=2, mlp_width=32, layers=1)),
            ("film", FilmConfig(width=8, blocks=1, instruction_layer=1, queries=3, mlp_width=16)),
        ),
        "language": LanguageConfig(
            vocabulary=32, action_tokens=16, width=D, layers=2, heads=4, kv_heads=2, mlp_width=48,
            lora=LoRA(targets="q|down", rank=2, alpha=4.0),
        ),
        "dtype": "float32",
        **changes,
    }  # fmt: skip
    model = MLLM(MLLMConfig(**config), nnx.Rngs(0))
    for i, name in enumerate(PROJECTIONS):
        linear = getattr(model.language.blocks, name)
        if linear.lora is not None:  # its second factor is zero at first
            draw = jax.random.normal(jax.random.key(i), linear.lora_b.shape)
            linear.lora_b[...] = 0.3 * draw
    return model


def jit(call: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles ``call(module, ...)``.

    Other than with ``nnx.jit`` the program does not hold what it does not use, so that models which differ in that
    alone share it in the compilation cache.
    """

    @partial(jax.jit, static_argnums=0)
    def pure(graph: nnx.GraphDef, state: nnx.State, *args: Any) -> Any:
        return call(nnx.merge(graph, state), *args)

    return lambda module, *args: pure(*nnx.split(module), *args)


def images(size: int = 12, cameras: tuple[str, ...] = CAMERAS) -> dict[str, jax.Array]:
    """Images [B, T, size, size, 3] of each camera; the program that encodes them grows with their number."""
    rng = np.random.default_rng(1)
    shape = (B, T, size, size, 3)
    return {name: jnp.array(rng.integers(0, 256, shape), jnp.uint8) for name in cameras}


def sequence(fed: int, latents: int = 8) -> dict[str, jax.Array]:
    """What ``MLLM.__call__`` takes: prompts of several lengths, ``latents`` and ``fed`` tokens a step."""
    rng = np.random.default_rng(0)
    return {
        "prompt": jnp.array(rng.integers(0, 16, (B, N))),
        "prompt_mask": jnp.arange(N) < jnp.array(PROMPTS)[:, None],
        "latents": jnp.array(rng.normal(size=(B, T, latents, D)), jnp.float32),
        "step_mask": jnp.ones((B, T), bool),
        "fed": jnp.array(rng.normal(size=(B, T, fed, D)), jnp.float32),
    }
