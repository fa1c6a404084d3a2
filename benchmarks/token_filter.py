"""The cost of the token filter, compared with the decode step that it filters.

    python benchmarks/token_filter.py                  # the tiny preset's language model, BabyAI's 6 actions
    python benchmarks/token_filter.py --actions=70     # as many as LangR has, up to 4 tokens each

A decode step runs one token through the language model with a cache of 100 positions, and the rows of the head that
the actions use. With the filter, logits are masked by the trie's node, and the chosen token moves the node. Both
versions run 200 steps in one compiled loop in which each step's input is the previous choice, so dispatch and host time
are not measured. The two alternate; the result is the median over ``--pairs``. The filter also runs alone: its time
divided by the step's is the figure to use if the difference is within the noise.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_act.adapters.token_filter import Trie, choose
from mllm_act.models import presets
from mllm_act.models.language import Cache, LanguageModel

STEPS, PAST = 200, 100
BABYAI = ((5, 0), (6, 0), (7, 0), (8, 0), (9, 0), (10, 11))  # one action has two tokens


def trie_of(actions: int) -> Trie:
    """Returns BabyAI's trie for 6 actions, else one of random sequences of 1 to 4 tokens out of 60, padded with 0."""
    if actions == 6:
        return Trie(BABYAI)
    rng, sequences = np.random.default_rng(0), set[tuple[int, ...]]()
    while len(sequences) < actions:
        words = rng.integers(1, 61, rng.integers(1, 5)).tolist()
        sequences.add((*words, *[0] * (4 - len(words))))
    return Trie(tuple(sorted(sequences)))


def loop(
    trie: Trie, filtered: bool, language: LanguageModel, cache: Cache, x: jax.Array
) -> jax.Array:
    """Decodes STEPS tokens of one sequence, each from the same cache; returns the last choice."""
    head = language.embedding if language.head is None else language.head
    rows, ids = head[...][trie.candidates], jnp.asarray(trie.candidates)
    positions = jnp.full((1, 1), PAST, jnp.int32)
    mask = jnp.ones((1, 1, PAST + 1), bool)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, node, _ = carry
        hidden, _ = language(x, positions, mask, past=[cache])
        logits = jnp.matmul(hidden[:, 0], rows.T, preferred_element_type=jnp.float32)
        column = choose(logits, trie.allowed(node)) if filtered else logits.argmax(-1)
        node = trie.step(node, column) if filtered else node
        return language.embed(ids[column][:, None], x.dtype), node, column

    zero = jnp.zeros(1, jnp.int32)
    return jax.lax.fori_loop(0, STEPS, step, (x, zero, zero))[2]


def filter_alone(trie: Trie, logits: jax.Array) -> jax.Array:
    """Chooses STEPS times; each choice changes the logits, so that no step can be optimized away."""

    def step(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        node, logits = carry
        column = choose(logits, trie.allowed(node))
        return trie.step(node, column), logits + column[:, None].astype(jnp.float32)

    return jax.lax.fori_loop(0, STEPS, step, (jnp.zeros(1, jnp.int32), logits))[1]


def microseconds(run: Callable[[], jax.Array]) -> float:
    """Returns the time of one step, in microseconds."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return (time.perf_counter() - start) / STEPS * 1e6


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--actions", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()

    trie, model = trie_of(args.actions), presets.get(args.preset).model
    language = LanguageModel(model.language, model.weight_dtype, nnx.Rngs(0))
    sizes, dtype = model.language, jnp.dtype(model.dtype)
    shape = (sizes.layers, 1, PAST, sizes.kv_heads, sizes.width // sizes.heads)
    keys = [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(2)]
    x = jax.random.normal(jax.random.key(2), (1, 1, sizes.width)).astype(dtype)
    decode = {
        filtered: partial(nnx.jit(partial(loop, trie, filtered)), language, (keys[0], keys[1]), x)
        for filtered in (False, True)
    }
    alone = partial(jax.jit(partial(filter_alone, trie)), jnp.ones((1, len(trie.candidates))))
    for run in (*decode.values(), alone):
        jax.block_until_ready(run())
    times = np.array(
        [
            [microseconds(run) for run in (decode[False], decode[True], alone)]
            for _ in range(args.pairs)
        ]
    )
    plain, filtered, only = np.median(times, axis=0)
    print(
        json.dumps(
            {
                "preset": args.preset,
                "device": jax.devices()[0].device_kind,
                "actions": args.actions,
                "nodes": len(trie.follow),
                "candidates": len(trie.candidates),
                "step_us": round(float(plain), 1),
                "with_filter_us": round(float(filtered), 1),
                "difference_percent": round(
                    float(np.median(times[:, 1] / times[:, 0]) - 1) * 100, 2
                ),
                "filter_alone_us": round(float(only), 2),
                "share_percent": round(float(only / plain) * 100, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
