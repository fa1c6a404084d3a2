"""Measures one decision of a policy at real shapes, with random weights and pictures.

    python -m mllm_act.bench act                 # LLaVA-1.5-7B, one robot, 3 steps of context, two tokens an action
    python -m mllm_act.bench act --context=12

What is timed is what ``Policy.act`` does: the picture goes to the device, is encoded, past pictures' latents are kept,
the sequence is read, M tokens are decoded, the action comes back. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_act.bench import synthetic, trace
from mllm_act.bench.train import add_model_flags
from mllm_act.models import presets
from mllm_act.models.acting import for_acting


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mllm_act.bench act", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_flags(parser)
    parser.add_argument("--batch_size", type=int, default=1, help="episodes acted in at once")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--trace", action="store_true", help="list the kernels by time")
    flags = parser.parse_args(argv)
    flags.lora_targets, flags.remat = "q|k|v", ""
    print(json.dumps(measure(flags)))


def measure(flags: argparse.Namespace) -> dict[str, object]:
    """Times decisions and returns what is reported."""
    config = synthetic.model(flags)
    graph, trained, frozen = synthetic.initialize(
        synthetic.maker(config, flags.tokens), presets.get(flags.preset).trained
    )
    network = nnx.merge(graph, trained, frozen)
    del trained, frozen
    network.mllm = for_acting(network.mllm)
    graph, state = nnx.split(network)
    parameters, structure = jax.tree.flatten(
        state
    )  # hundreds of arrays: flat, they cost the host least
    del network, state
    b, t = flags.batch_size, flags.context
    batch = synthetic.batch(config, b, t, flags.prompt_tokens)
    seen = batch.observation
    past = jnp.zeros((b, t, flags.tokens), jnp.int32) + config.language.action_tokens

    @jax.jit
    def act(
        parameters: list[jax.Array], image: jax.Array, latents: jax.Array, past: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        network = nnx.merge(graph, jax.tree.unflatten(structure, parameters))
        newest = network.mllm.latents({synthetic.CAMERA: image[:, None]})
        latents = jnp.concatenate([latents[:, 1:], newest], axis=1)
        tokens = network.act(
            seen.prompt, seen.prompt_mask, latents, seen.mask, seen.proprio[:, -1], past
        )
        return network.adapter.decode(tokens), latents

    count = config.latents_per_image
    latents = jnp.zeros((b, t, count, config.language.width), config.dtype)
    image = np.asarray(seen.images[synthetic.CAMERA][:, -1])
    started = time.perf_counter()
    jax.block_until_ready(act(parameters, image, latents, past))
    compiling = time.perf_counter() - started
    times = []
    for _ in range(5 + flags.steps):
        started = time.perf_counter()
        action, latents = act(parameters, image, latents, past)
        np.asarray(action)
        times.append(1e3 * (time.perf_counter() - started))

    if flags.trace:

        def run() -> None:
            for _ in range(5):
                act(parameters, image, latents, past)[0].block_until_ready()

        print(trace.table(trace.kernels(run), runs=5))
    return {
        "benchmark": "act",
        **vars(flags),
        "ms": round(statistics.median(times[5:]), 2),
        "ms_min": round(min(times[5:]), 2),
        "ms_max": round(max(times[5:]), 2),
        "compile_s": round(compiling, 1),
        "weights_gib": round(sum(x.nbytes for x in parameters) / 2**30, 2),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
