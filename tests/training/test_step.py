"""Validation figures: means over steps, tokens and windows, whatever the batches were."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mllm_act.action_tokenizer.autoencoder import TokenizerConfig
from mllm_act.action_tokenizer.fast import FastConfig
from mllm_act.adapters import ADAPTERS
from mllm_act.adapters.base import Adapter, RunFacts, Vocabulary
from mllm_act.adapters.language import Language
from mllm_act.batch import Batch, Observation
from mllm_act.models.language import LanguageConfig
from mllm_act.models.mllm import MLLM
from mllm_act.models.vision import VisionConfig
from mllm_act.normalization import Statistics
from mllm_act.policy.network import PolicyNetwork
from mllm_act.training.step import Recipe, Scores, average, validate, weighted
from tests.action_tokenizer.tables import random_tokenizer
from tests.adapters import discrete
from tests.models import tiny

pytestmark = pytest.mark.slow

WINDOWS, STEPS, PROMPT, DIMS = 10, 3, 4, 2
UNITS = tuple((f"a{d}", "m", 1.0) for d in range(DIMS))
NAMES = ("left", "right", "pick up")


def statistics(low: float, high: float, dims: int) -> Statistics:
    action = discrete.moments((low,) * dims, (high,) * dims)
    return Statistics(action, discrete.moments((), ()), 1, 1, 1, "train", "", ("t",), ("i",))


def make(name: str) -> Adapter:
    """An adapter of chunks of two actions of two dimensions, or of three discrete actions."""
    kind, vocabulary = ADAPTERS[name], Vocabulary(32, tiny.D, 16)
    if issubclass(kind, Language):
        return kind(statistics(0, 2, 1), NAMES, [[1], [2, 3], [2, 4]], 5, vocabulary.size)
    if name == "categorical":
        config = kind.configure({"hidden": 8}, RunFacts(NAMES, None, "", 1))
        return kind.make(config, statistics(0, 2, 1), vocabulary, nnx.Rngs(0))
    of_chunks = statistics(-1, 1, DIMS).chunked(2)
    if name == "fast":
        sizes = FastConfig(DIMS, 2, scale=2.0, low=-3, high=3, merges=4, codes=12, tokens=4)
        return ADAPTERS["fast"](of_chunks, vocabulary, random_tokenizer(0, sizes), nnx.Rngs(0))
    quantizers = {"vq": 1, "rvq": 2}.get(name, 1)
    tokenizer = TokenizerConfig(DIMS, 2, quantizers, codes=8, width=4, hidden=8, layers=2)
    settings = {"regression": {"hidden": 8}, "uniform": {"bins": 8}}.get(name, {})
    config = kind.configure(settings, RunFacts((), tokenizer, "", 2))
    return kind.make(config, of_chunks, vocabulary, nnx.Rngs(0))


def model() -> MLLM:
    """The smallest model that the adapters fit to."""
    return tiny.mllm(
        vision=VisionConfig(image_size=12, patch_size=4, width=8, layers=1, heads=1, mlp_width=8),
        language=LanguageConfig(
            vocabulary=32, action_tokens=16, width=tiny.D, layers=1, heads=2, kv_heads=1, mlp_width=16
        ),
    )  # fmt: skip


def windows(is_discrete: bool) -> Batch:
    """Held-out windows of one to three steps."""
    rng = np.random.default_rng(0)
    shape = (WINDOWS, STEPS, 12, 12, 3)
    action = rng.uniform(-1, 1, (WINDOWS, STEPS, 2 * DIMS))
    if is_discrete:
        action = rng.integers(0, len(NAMES), (WINDOWS, STEPS, 1))
    return Batch(
        Observation(
            images={"top": rng.integers(0, 256, shape, np.uint8)},
            proprio=np.zeros((WINDOWS, STEPS, 0), np.float32),
            mask=np.arange(STEPS) < rng.integers(1, STEPS + 1, (WINDOWS, 1)),
            prompt=rng.integers(0, 16, (WINDOWS, PROMPT)).astype(np.int32),
            prompt_mask=np.arange(PROMPT) < rng.integers(1, PROMPT + 1, (WINDOWS, 1)),
        ),
        action.astype(np.float32),
    )


def cut(tree: Any, size: int) -> list[Any]:
    """Batches as ``EvalBatches`` gives them: the last is padded with windows that have no steps."""
    missing = -WINDOWS % size
    padded = jax.tree.map(lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), tree)
    return [
        jax.tree.map(lambda x, i=i: jnp.asarray(x[i : i + size]), padded)
        for i in range(0, WINDOWS, size)
    ]


def same(found: Mapping[int, Mapping[str, float]]) -> None:
    """Fails unless the figures of all batch sizes agree."""
    first, *others = found.values()
    assert "loss" in first
    for other in others:
        assert other == pytest.approx(first, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ADAPTERS)
def test_means_of_losses_and_metrics_do_not_depend_on_the_batch_size(name: str) -> None:
    adapter = make(name)
    rng, batch = np.random.default_rng(1), windows(adapter.discrete)
    tables = jnp.array(rng.normal(size=(2, 32, tiny.D)), jnp.float32)
    tokens = adapter.encode(jnp.asarray(batch.action))
    shape = (WINDOWS, STEPS, adapter.tokens_per_action, tiny.D)
    hidden = jnp.array(rng.normal(size=shape), jnp.float32)
    adapter = adapter.with_rows(*tables)

    def scores(hidden: jax.Array, tokens: jax.Array, mask: jax.Array) -> Scores:
        loss, metrics = adapter.loss(hidden, tokens, mask, jnp.zeros((*mask.shape, 0)))
        return weighted(adapter, {"loss": loss, **metrics}, tokens, mask)

    parts = (hidden, tokens, batch.observation.mask)
    same({
        size: average([scores(*part) for part in cut(parts, size)]) for size in (1, 3, 16)
    })  # fmt: skip


def test_validation_does_not_depend_on_the_batch_size() -> None:
    """With FAST, whose actions have different numbers of tokens."""
    adapter = make("fast")
    graph, state = nnx.split(PolicyNetwork(model(), {"arm": adapter}))
    recipe = Recipe(
        graph, optax.identity(), jax.random.key(0), {"arm": 1.0}, {"arm": None}, {"arm": UNITS}
    )
    compiled = jax.jit(partial(validate, recipe), static_argnums=2)
    batch, nothing = windows(adapter.discrete), nnx.State({})
    found = {
        size: average([compiled(state, nothing, "arm", part) for part in cut(batch, size)])
        for size in (1, 3, 16)
    }
    same(found)
    assert found[1].keys() == {"loss", "token_accuracy", "tokens", "error_a0_m", "error_a1_m"}
