"""Whatever the codes and hidden states, every continuous adapter decodes to actions that the demonstrations support."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.reading.statistics import moments
from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.action_tokenizer.fast import FastConfig
from mllm_act.adapters import ADAPTERS, adapter_class
from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.adapters.base import Adapter, RunFacts, Vocabulary
from mllm_act.normalization import NORMALIZATIONS, Statistics
from tests.action_tokenizer.tables import random_tokenizer

pytestmark = pytest.mark.slow

CONTINUOUS = [name for name, kind in ADAPTERS.items() if not kind.discrete]
FIRST, WIDTH, PROPRIO = 100, 8, 2
COLUMNS = ("constant", "binary", "heavy", "one-sided", "ordinary")


@functools.cache
def demonstrations(seed: int) -> np.ndarray:
    """float32[60, 5], one column of each kind, at a random scale and place."""
    rng = np.random.default_rng(seed)
    n = 60
    heavy = rng.normal(size=n)
    heavy[rng.integers(n)] = 1000.0
    columns = [
        np.zeros(n),
        np.arange(n) % rng.integers(2, 30) == 0,
        heavy,
        rng.exponential(size=n),
        rng.normal(size=n),
    ]
    scale, place = 10.0 ** rng.uniform(-3, 3, 5), rng.normal(size=5)
    return (scale * np.stack(columns, axis=1) + place).astype(np.float32)


@functools.cache
def make(name: str, normalization: str, chunk: int, seed: int) -> Adapter:
    """An adapter whose tokenizer, if it has one, decodes far beyond [-1, 1]."""
    of_actions, of_proprio = (
        moments(demonstrations(seed)),
        moments(np.eye(PROPRIO, dtype=np.float32)),
    )
    statistics = Statistics(
        of_actions, of_proprio, 60, 1, 1, "train", "", ("t",), ("i",), normalization=normalization
    )
    sizes: TokenizerConfig | FastConfig | None = None
    if name == "fast":
        sizes = FastConfig(5, chunk, scale=0.01, low=-3, high=3, merges=4, codes=12, tokens=4)
    elif adapter_class(name).needs_tokenizer:
        quantizers = 1 if name == "vq" else 2
        sizes = TokenizerConfig(5, chunk, quantizers, codes=8, width=4, hidden=8, layers=2)
    kind = adapter_class(name)
    settings = {"hidden": 8} if name == "regression" else {}
    config = kind.configure(settings, RunFacts((), sizes, "", chunk))
    vocabulary = Vocabulary(FIRST + 512, WIDTH, FIRST)
    adapter = kind.make(config, statistics.chunked(chunk), vocabulary, nnx.Rngs(seed))
    if isinstance(sizes, FastConfig):
        adapter.tokenizer = random_tokenizer(seed, sizes)
    elif sizes is not None:
        assert isinstance(adapter.tokenizer, ActionTokenizer)
        books = adapter.tokenizer.codebooks
        books[...] = 1e4 * jax.random.normal(jax.random.key(seed), books.shape)
    return adapter


def check(action: jax.Array, seed: int) -> None:
    """Fails unless every action is one that the demonstrations support."""
    found = np.asarray(action).reshape(-1, len(COLUMNS))
    data = demonstrations(seed)
    assert found.dtype == np.float32
    assert ((found >= data.min(0)) & (found <= data.max(0))).all()
    for column in (0, 1):  # constant and binary: exactly values that occur
        assert np.isin(found[:, column], data[:, column]).all()


cases = st.tuples(
    st.sampled_from([(name, kind) for name in CONTINUOUS for kind in adapter_class(name).normalizations]),
    st.sampled_from([1, 3]),
    st.integers(0, 1),
)  # fmt: skip
extreme = st.sampled_from([-np.inf, -3e38, -1e6, -1.0, 0.0, 1e-30, 1.0, 2.0, 1e6, np.inf, np.nan])


@settings(max_examples=30, deadline=None)
@given(cases, st.integers(0, 2**16), extreme)
def test_any_codes_are_valid_actions(
    case: tuple[tuple[str, str], int, int], draw: int, number: float
) -> None:
    (name, normalization), chunk, seed = case
    adapter = make(name, normalization, chunk, seed)
    if isinstance(adapter, ActionTokenAdapter):
        codes = np.random.default_rng(draw).integers(
            0, adapter.codes, (6, adapter.tokens_per_action)
        )
        codes[0], codes[1] = 0, adapter.codes - 1
        tokens = jnp.array(FIRST + codes, jnp.int32)
    else:
        tokens = jnp.full((6, chunk * len(COLUMNS)), number, jnp.float32)
    check(adapter.decode(tokens), seed)


@settings(max_examples=12, deadline=None)
@given(cases, extreme, st.booleans())
def test_any_hidden_state_gives_a_valid_action(
    case: tuple[tuple[str, str], int, int], number: float, drawn: bool
) -> None:
    """Greedy and drawn tokens are of the reserved ids, and stand for valid actions."""
    (name, normalization), chunk, seed = case
    adapter = make(name, normalization, chunk, seed)
    sign = jnp.where(jnp.arange(WIDTH) % 2 == 0, 1.0, -1.0)
    hidden = jnp.stack([number * sign, jnp.full(WIDTH, number)]).astype(jnp.float32)
    key = jax.random.key(seed) if drawn else None
    tokens = adapter.sample(
        hidden, jnp.zeros((2, PROPRIO)), lambda x, s: (hidden + x, s), None, key
    )
    if isinstance(adapter, ActionTokenAdapter):
        assert tokens.shape == (2, adapter.tokens_per_action)
        assert ((tokens >= FIRST) & (tokens < FIRST + adapter.codes)).all()
    check(adapter.decode(tokens), seed)


@pytest.mark.parametrize("name", ["regression", "uniform"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_values_of_constant_and_binary_dimensions_come_back(name: str, normalization: str) -> None:
    if normalization not in adapter_class(name).normalizations:
        return
    for seed in range(3):
        data = demonstrations(seed)
        adapter = make(name, normalization, 1, seed)
        decoded = adapter.decode(adapter.encode(jnp.array(data)))
        np.testing.assert_array_equal(decoded[:, :2], data[:, :2])
