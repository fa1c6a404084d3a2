"""The memory that a training step needs on each device, estimated before anything is compiled.

    weights       the parameters, trained and frozen, as they are split over the devices
    optimizer     AdamW's two float32 moments of trained parameters
    gradients     float32, of trained parameters
    activations   what the forward pass keeps for the backward pass, and the working set of one layer

Activations are not estimated by a formula: JAX differentiates the model on abstract arrays of one device's share of
the batch, and what it would keep is counted, so that LoRA, remat, float8 and the attention kernel count as they are.
The working set of the largest layer is added: what its own backward pass keeps, and as much again for gradients; half
of that where no gradient passes, as in a frozen vision encoder. Not counted: the adapter's activations, the batch, and
what the data pipeline and XLA need. What the mesh axis ``tensor`` splits is counted as whole.

Accuracy: weights, optimizer and gradients are exact. The sum is within a factor of 1.5 of XLA's own ``memory_analysis``
of the compiled update, either way, on CPU at tiny sizes (a test holds it). For LLaVA-1.5-7B at the three shapes of
docs/performance.md the estimate is 23.0, 31.0 and 52.1 GiB (on a CPU, with a stand-in for cuDNN's attention); XLA
needed 21.2, 25.7 and 47.9 on an H200.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from mllm_act import parameters
from mllm_act.errors import UserError
from mllm_act.models import float8
from mllm_act.models.language import LanguageBlock
from mllm_act.models.layers import MULTIPLE
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.models.vision import VisionBlock

GIB = 2.0**30
FACTOR = 1.5  # how far off the activations may be

SPLIT = (
    "--config.mesh.fsdp=DEVICES with --config.mesh.data=1, which splits them, or a smaller preset"
)
FIXES = {
    "weights": f"--config.weight_dtype=float8 (or bfloat16) where they are frozen, {SPLIT}",
    "optimizer": f"a lower --config.lora.rank where LoRA is trained, {SPLIT}",
    "gradients": f"a lower --config.lora.rank where LoRA is trained, {SPLIT}",
    "activations": "--config.remat=full, a smaller --config.data.batch_size, more devices along --config.mesh.data, "
    "or a smaller preset",
}


def estimate(
    config: MLLMConfig,
    trained: Any,
    frozen: Any,
    batch_per_device: int,
    cameras: int,
    context: int,
    prompt_tokens: int,
    tokens_per_action: int,
) -> dict[str, float]:
    """Returns bytes by part, for one device. Nothing is computed or compiled.

    Args:
      config: of the model; its parameters have paths under ``mllm/``.
      trained: a tree of ``jax.ShapeDtypeStruct`` with shardings, those of a ``PolicyNetwork``'s trained parameters.
      frozen: the rest of them.
      batch_per_device: windows of one device.
      cameras: how many the model sees.
      context: T.
      prompt_tokens: N.
      tokens_per_action: M.
    """
    moved, held = (parameters.flatten(tree) for tree in (trained, frozen))
    one_each = sum(_count(leaf) * 4.0 for leaf in moved.values())
    weights = sum(_count(leaf) * _stored_bytes(leaf) for leaf in (*moved.values(), *held.values()))
    kept = _kept_by_model(
        config, set(moved), batch_per_device, cameras, context, prompt_tokens, tokens_per_action
    )
    tokens = prompt_tokens + context * (config.latents_per_image * cameras + tokens_per_action)
    tokens += -tokens % MULTIPLE
    images = batch_per_device * context * cameras
    through_vision = any(path.startswith("mllm/vision/") for path in moved)
    working = max(
        (2 if through_vision else 0.5) * _kept_by_vision_block(config, images),
        2 * _kept_by_language_block(config, batch_per_device, tokens),
    )
    return {
        "weights": float(weights),
        "optimizer": 2 * one_each,
        "gradients": one_each,
        "activations": float(kept + working),
    }


def check(needed: Mapping[str, float], devices: Sequence[jax.Device]) -> None:
    """Compares an estimate with the memory of the devices.

    Raises:
      UserError: if it would not fit even with activations ``FACTOR`` times smaller; it names the largest part and the
        fix.
    """
    limit = available(devices)
    if sum(needed.values()) - needed["activations"] * (1 - 1 / FACTOR) > limit:
        largest = max(needed, key=lambda part: needed[part])
        raise UserError(
            f"memory: expected a run that fits into {limit / GIB:.2f} GiB a device, found one that needs about "
            f"{sum(needed.values()) / GIB:.2f} GiB, {needed[largest] / GIB:.2f} of them for {largest}; "
            f"try {FIXES[largest]}"
        )


def available(devices: Sequence[jax.Device]) -> float:
    """Returns the memory of a device in bytes; an equal share of the host's where the device does not report it."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    return min(float((device.memory_stats() or {}).get("bytes_limit", host)) for device in devices)


def table(needed: Mapping[str, float], devices: Sequence[jax.Device]) -> str:
    """Returns an estimate as text."""
    lines = [f"  {part:<12} {size / GIB:8.2f} GiB" for part, size in needed.items()]
    total, limit = sum(needed.values()), available(devices)
    lines.append(f"  {'total':<12} {total / GIB:8.2f} GiB of {limit / GIB:.2f}")
    if total > limit:
        lines.append("  this may not fit; the estimate of activations is within a factor of 1.5")
    return "\n".join(lines)


def _count(leaf: jax.ShapeDtypeStruct | jax.Array) -> int:
    """Returns how many elements of an array one device holds."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape)


def _stored_bytes(leaf: jax.ShapeDtypeStruct | jax.Array) -> int:
    """Returns the bytes of an element; float8 matrices may be stored once for products and once for gradients."""
    return 2 if leaf.dtype == float8.DTYPE else leaf.dtype.itemsize


def _kept(function: Callable[..., Any], *args: Any) -> int:
    """Returns the bytes that a call keeps for the gradient of its first argument, besides the arguments."""

    def backward(first: Any, rest: tuple) -> Any:
        return jax.vjp(lambda first: function(first, *rest), first)[1]

    jaxpr = jax.make_jaxpr(backward)(args[0], args[1:]).jaxpr
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - set(jaxpr.invars)
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)


def _kept_by_model(
    config: MLLMConfig,
    trained: set[str],
    b: int,
    cameras: int,
    t: int,
    n: int,
    tokens_per_action: int,
) -> int:
    """Returns the bytes that teacher-forced training keeps for one device's share of a batch."""
    abstract = nnx.eval_shape(lambda: MLLM(config, nnx.Rngs(0)))
    chosen = nnx.All(nnx.Param, lambda path, _: f"mllm/{parameters.name(path)}" in trained)
    graph, moved, held = nnx.split(abstract, chosen, ...)  # type: ignore[misc]
    fed = tokens_per_action - (config.history == "observations")
    size, array = config.vision.image_size, jax.ShapeDtypeStruct
    images = {str(c): array((b, t, size, size, 3), jnp.uint8) for c in range(cameras)}
    sequence = (array((b, n), jnp.int32), array((b, n), bool), array((b, t), bool))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def forward(moved: Any, held: Any, images: Any, sequence: Any, key: Any) -> jax.Array:
        mllm = nnx.merge(graph, moved[0], held)
        prompt, prompt_mask, step_mask = sequence
        latents = mllm.latents(images, mllm.instruction(prompt, prompt_mask))
        return mllm(prompt, prompt_mask, latents, step_mask, moved[1], key=key)

    embeddings = array((b, t, fed, config.language.width), jnp.float32)
    return _kept(forward, (moved, embeddings), held, images, sequence, key)


def _kept_by_vision_block(config: MLLMConfig, images: int) -> int:
    block = nnx.eval_shape(lambda: VisionBlock(config.vision, config.weight_dtype, nnx.Rngs(0)))
    graph, state = nnx.split(block)
    x = jax.ShapeDtypeStruct((images, 1 + config.vision.patches, config.vision.width), config.dtype)
    return _kept(lambda x, state: nnx.merge(graph, state)(x, x.shape[1]), x, state)


def _kept_by_language_block(config: MLLMConfig, batch: int, tokens: int) -> int:
    block = nnx.eval_shape(lambda: LanguageBlock(config.language, config.weight_dtype, nnx.Rngs(0)))
    graph, state = nnx.split(block)
    array = jax.ShapeDtypeStruct
    x = array((batch, tokens, config.language.width), config.dtype)
    positions, mask = array((batch, tokens), jnp.int32), array((batch, tokens, tokens), bool)

    def forward(x: Any, state: Any, positions: Any, mask: Any) -> Any:
        return nnx.merge(graph, state)(x, positions, mask, (), None)

    return _kept(forward, x, state, positions, mask)
