"""Measures updates of a policy at real shapes, with random weights and pictures made on the device.

    python -m mllm_act.bench train                                    # the paper's Meta-World shape, LLaVA-1.5-7B
    python -m mllm_act.bench train --context=12                       # its CALVIN shape
    python -m mllm_act.bench train --bridge=projector --lora_targets='q|k|v|o|gate|up|down' --batch_size=16 --context=1
    python -m mllm_act.bench train --preset=smollm2_vit_s --context=32 --batch_size=64 --episode=10     # BabyAI's shape
    python -m mllm_act.bench train --weight_dtype=float8 ...          # frozen matrices held and multiplied in 8 bits

The last line is JSON. Operations, also of steps that do not exist, are counted by mllm_act/bench/flops.py; a step is
timed on the host over ``--steps`` updates that the device does one after the other. ``--trace`` lists the kernels by
time.
"""

import argparse
import json
import time

import jax
import optax
from flax import nnx

from mllm_act.batch import Batch
from mllm_act.bench import flops, synthetic, trace
from mllm_act.models import presets
from mllm_act.models.layers import unstack
from mllm_act.training import memory


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mllm_act.bench train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_flags(parser)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--episode", type=int, help="steps of a window that exist; the others are passed over"
    )
    parser.add_argument("--remat", default="", help="none, projections or full; default: preset's")
    parser.add_argument("--lora_targets", default="q|k|v")
    parser.add_argument("--scan", action="store_true", help="layers stacked, not unrolled")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trace", action="store_true", help="list the kernels by time")
    flags = parser.parse_args(argv)
    print(json.dumps(measure(flags)))


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what both benchmarks of models ask."""
    parser.add_argument("--preset", default="llava_1_5_7b")
    parser.add_argument("--context", type=int, default=3, help="T, steps a window")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2, help="M, tokens an action")
    parser.add_argument("--bridge", default="perceiver", help="parts in their order, with commas")
    parser.add_argument(
        "--weight_dtype", default="", help="float32, bfloat16 or float8; default: preset's"
    )


def measure(flags: argparse.Namespace) -> dict[str, object]:
    """Runs the updates and returns what is reported."""
    config = synthetic.model(flags)
    trained_rules = presets.get(flags.preset).trained
    graph, trained, frozen = synthetic.initialize(
        synthetic.maker(config, flags.tokens), trained_rules
    )
    estimated = memory.estimate(
        config,
        trained,
        frozen,
        flags.batch_size,
        1,
        flags.context,
        flags.prompt_tokens,
        flags.tokens,
    )
    frozen = frozen if flags.scan else unstack(frozen, backward=True)
    batch = synthetic.batch(
        config, flags.batch_size, flags.context, flags.prompt_tokens, flags.episode
    )
    padded_parts = None if flags.episode is None else 1
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4))
    state = (trained, jax.jit(tx.init)(trained))

    def update(
        state: tuple[nnx.State, optax.OptState], frozen: nnx.State, batch: Batch, key: jax.Array
    ) -> tuple[tuple[nnx.State, optax.OptState], jax.Array]:
        def loss_of(trained: nnx.State) -> jax.Array:
            network = nnx.merge(graph, trained, frozen)
            return network.embodied(synthetic.NAME).loss(batch, key, padded_parts)[0]

        loss, gradients = jax.value_and_grad(loss_of)(state[0])
        updates, optimizer = tx.update(gradients, state[1], state[0])
        return (optax.apply_updates(state[0], updates), optimizer), loss

    key = jax.random.key(0)
    started = time.perf_counter()
    compiled = jax.jit(update, donate_argnums=0).lower(state, frozen, batch, key).compile()
    compiling = time.perf_counter() - started
    analysis = compiled.memory_analysis()
    assert analysis is not None
    needed = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )

    losses = []
    for _ in range(3):
        state, loss = compiled(state, frozen, batch, key)
        losses.append(float(loss))
    started = time.perf_counter()
    for _ in range(flags.steps):
        state, loss = compiled(state, frozen, batch, key)
    loss.block_until_ready()
    seconds = (time.perf_counter() - started) / flags.steps

    if flags.trace:

        def run() -> None:
            done = state
            for _ in range(3):
                done, loss = compiled(done, frozen, batch, key)
            loss.block_until_ready()

        print(trace.table(trace.kernels(run), runs=3))
    operations = flops.train(
        config, flags.batch_size, flags.context, flags.prompt_tokens, flags.tokens
    )
    return {
        "benchmark": "train",
        **vars(flags),
        "step_ms": round(1e3 * seconds, 2),
        "samples_per_s": round(flags.batch_size / seconds, 1),
        "supervised_actions_per_s": round(flags.batch_size * flags.context / seconds, 1),
        "tflop_per_s": round(operations / seconds / 1e12, 1),
        "tflop": round(operations / 1e12, 2),
        "memory_gib": round(needed / 2**30, 2),
        "estimated_gib": round(sum(estimated.values()) / 2**30, 2),
        "compile_s": round(compiling, 1),
        "losses": losses,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
