"""Measures one decision of a policy at real shapes, with random weights and images.

    python -m mllm_act.bench act                 # LLaVA-1.5-7B, one robot, 3 steps of context, two tokens per action
    python -m mllm_act.bench act --context=12

``Policy.act`` is timed: the image goes to the device and is encoded, the latents of past images are reused, the
language model reads the sequence, M tokens are decoded, and the action comes back. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np
from flax import nnx

from mllm_act.bench import synthetic, trace
from mllm_act.bench.train import add_model_flags
from mllm_act.models.acting.prepare import for_acting
from mllm_act.policy import Policy
from mllm_act.ranges import check_flags


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mllm_act.bench act", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_flags(parser)
    parser.add_argument("--batch_size", type=int, default=1, help="episodes acted in at once")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--trace", action="store_true", help="list the kernels by time")
    flags = parser.parse_args(argv)
    check_flags(flags)
    flags.lora_targets, flags.remat = "q|k|v", ""
    print(json.dumps(measure(flags)))


def measure(flags: argparse.Namespace) -> dict[str, object]:
    """Times decisions and returns the report."""
    network_config = synthetic.network_config(flags)
    config = network_config.model
    graph, trained, frozen = synthetic.initialize(network_config)
    network = nnx.merge(graph, trained, frozen)
    del trained, frozen
    network.mllm = for_acting(network.mllm)
    prompt = synthetic.prompt(flags.prompt_tokens)
    embodiment = network_config.embodiments[synthetic.NAME]
    policy = Policy(network, synthetic.NAME, embodiment, prompt, meta={})
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(network)))
    del network

    b = flags.batch_size
    rng = np.random.default_rng(0)
    pixels = config.vision.image_size
    images = {synthetic.CAMERA: rng.integers(0, 256, (b, pixels, pixels, 3), np.uint8)}
    proprio = rng.normal(size=(b, synthetic.ACTIONS)).astype(np.float32)
    instructions, first = [synthetic.letters(flags.prompt_tokens)] * b, np.zeros(b, bool)
    memory = policy.start(b)
    started = time.perf_counter()
    _, memory = policy.act(images, proprio, instructions, first, memory)
    compiling = time.perf_counter() - started
    times = []
    for _ in range(5 + flags.context + flags.steps):  # the context is full when the clock starts
        started = time.perf_counter()
        _, memory = policy.act(images, proprio, instructions, first, memory)
        times.append(1e3 * (time.perf_counter() - started))
    times = times[5 + flags.context :]

    if flags.trace:

        def run() -> None:
            kept = memory
            for _ in range(5):
                _, kept = policy.act(images, proprio, instructions, first, kept)

        print(trace.table(trace.kernels(trace.events(run)), runs=5))
    return {
        "benchmark": "act",
        **vars(flags),
        "ms": round(statistics.median(times), 2),
        "ms_min": round(min(times), 2),
        "ms_max": round(max(times), 2),
        "compile_s": round(compiling, 1),
        "weights_gib": round(weights / 2**30, 2),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
