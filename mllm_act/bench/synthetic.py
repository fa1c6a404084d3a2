"""A policy's network and batch at a preset's real shapes, with random numbers made on the device.

Speed hardly depends on the values of weights, so benchmarks need no download. Shapes are those of Meta-World: actions
and proprioception of four numbers, tokenizers with 512 codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mllm_act import parameters
from mllm_act.action_tokenizer.autoencoder import TokenizerConfig
from mllm_act.adapters.vector_quantized import VectorQuantizedConfig
from mllm_act.batch import Batch, Observation
from mllm_act.models import presets
from mllm_act.models.mllm import MLLMConfig
from mllm_act.normalization import Moments, Statistics
from mllm_act.policy.network import (
    EmbodimentConfig,
    NetworkConfig,
    PolicyNetwork,
    build_network,
)
from mllm_act.policy.prompt import Prompt, train_text_tokenizer
from mllm_act.training import sharding

NAME, CAMERA = "synthetic", "camera"
ACTIONS = 4


def statistics() -> Statistics:
    """Returns statistics of actions that fill [-1, 1]."""
    low, middle, high = (-1.0,) * ACTIONS, (0.0,) * ACTIONS, (1.0,) * ACTIONS
    moments = Moments(
        mean=middle, std=high, min=low, max=high, q01=low, q99=high, two_valued=(False,) * ACTIONS
    )
    return Statistics(moments, moments, 1, 1, 1, "train", "", ("none",), ("none",))


def network_config(flags: Any) -> NetworkConfig:
    """Returns the network that a benchmark's flags name, with a residual VQ adapter of ``flags.tokens`` tokens."""
    sizes = TokenizerConfig(ACTIONS, quantizers=flags.tokens)
    adapter = VectorQuantizedConfig(dataclasses.asdict(sizes))
    embodiment = EmbodimentConfig("rvq", adapter, (CAMERA,), context=flags.context, chunk=1)
    trained = presets.get(flags.preset).trained
    return NetworkConfig(flags.preset, model(flags), trained, {NAME: embodiment})


def with_layers(config: NetworkConfig, layers: int) -> NetworkConfig:
    """Returns a network with so many layers of the vision encoder and of the language model."""
    model = config.model
    vision = dataclasses.replace(model.vision, layers=layers)
    language = dataclasses.replace(model.language, layers=layers)
    return dataclasses.replace(
        config, model=dataclasses.replace(model, vision=vision, language=language)
    )


def initialize(
    config: NetworkConfig, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Makes a network on the device or a mesh; returns its structure, its trained and its frozen parameters."""

    def make() -> PolicyNetwork:
        return build_network(config, {NAME: statistics()}, nnx.Rngs(0))

    graph, *states = parameters.split(nnx.eval_shape(make), config.trained)
    shardings = None if mesh is None else sharding.of_parameters(tuple(states), mesh)
    split = jax.jit(lambda: parameters.split(make(), config.trained)[1:], out_shardings=shardings)
    return graph, *split()


def batch(
    config: MLLMConfig, size: int, context: int, prompt_tokens: int, steps: int | None = None
) -> Batch:
    """Returns a random batch on the device; images have the size that the model sees.

    The first ``steps`` steps of each window exist; all of them by default.
    """
    rng = np.random.default_rng(0)
    pixels = config.vision.image_size
    observation = Observation(
        images={
            CAMERA: jax.random.bits(
                jax.random.key(0), (size, context, pixels, pixels, 3), jnp.uint8
            )
        },
        proprio=jnp.array(rng.normal(size=(size, context, ACTIONS)), jnp.float32),
        mask=jnp.arange(context) < jnp.full((size, 1), context if steps is None else steps),
        prompt=jnp.array(rng.integers(0, config.language.action_tokens, (size, prompt_tokens))),
        prompt_mask=jnp.ones((size, prompt_tokens), bool),
    )
    actions = rng.uniform(-1, 1, (size, context, ACTIONS))
    return Batch(observation, jnp.array(actions, jnp.float32))


def prompt(length: int) -> Prompt:
    """Returns a prompt that is just the instruction, one token per letter."""
    return Prompt("{instruction}", train_text_tokenizer([], 256), length)


def letters(length: int) -> str:
    """Returns an instruction of ``length`` tokens."""
    return ("abcdefghijklmnopqrstuvwxyz" * length)[:length]


def model(flags: Any) -> MLLMConfig:
    """Returns the sizes of the model that a benchmark's flags name."""
    config = presets.get(flags.preset).model
    language = config.language
    if language.lora is not None:
        lora = dataclasses.replace(language.lora, targets=flags.lora_targets)
        language = dataclasses.replace(language, lora=lora)
    return dataclasses.replace(
        config,
        language=language,
        bridge=tuple(flags.bridge.split(",")),
        weight_dtype=flags.weight_dtype or config.weight_dtype,
        remat=flags.remat or config.remat,
    )
