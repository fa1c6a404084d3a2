"""The three normalisations of actions, the actions that they decode to, and what is said of unusual dimensions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipelines.reading.statistics import moments
from mllm_act import normalization
from mllm_act.adapters.base import Vocabulary
from mllm_act.adapters.uniform import Uniform, UniformConfig
from mllm_act.errors import UserError
from mllm_act.normalization import NORMALIZATIONS, Statistics

NAMES = ("constant", "binary", "heavy", "ordinary")


def statistics(action: np.ndarray, kind: str = "range") -> Statistics:
    count = len(action)
    found = moments(action)
    return Statistics(found, found, count, 1, 1, "train", "", ("t",), ("i",), normalization=kind)


def some_actions(seed: int = 0, n: int = 200) -> np.ndarray:
    """float32[n, 4], a column for each of ``NAMES``; the binary one is rarely 3."""
    rng = np.random.default_rng(seed)
    action = np.stack(
        [np.full(n, 0.2), np.where(np.arange(n) == 7, 3.0, -1.0), *rng.uniform(-1, 1, (2, n))], 1
    ).astype(np.float32)
    action[3, 2] = 1000.0
    return action


def test_definitions() -> None:
    action = some_actions()
    x = action[:, 2:].astype(np.float64)
    low, high = x.min(0), x.max(0)
    q01, q99 = np.quantile(x, (0.01, 0.99), axis=0)
    expected = {
        "range": 2 * (x - low) / (high - low) - 1,
        "quantiles": 2 * (x - q01) / (q99 - q01) - 1,
        "meanstd": (x - x.mean(0)) / x.std(0),
    }
    assert expected.keys() == set(NORMALIZATIONS)
    for kind, normal in expected.items():
        found = statistics(action, kind).normalize_action(action)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[:, 2:], normal, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found[:, 0], 0)
    # A rare value is not lost: the two-valued dimension keeps its range.
    for kind in ("range", "quantiles"):
        binary = statistics(action, kind).normalize_action(action)[:, 1]
        np.testing.assert_array_equal(np.unique(binary), [-1, 1])


def test_quantiles_that_coincide_leave_the_range() -> None:
    action = np.zeros((1000, 1), np.float32)
    action[:3] = [[-1.0], [0.5], [1.0]]
    assert not moments(action).two_valued[0]
    found = statistics(action, "quantiles").normalize_action(action)
    np.testing.assert_array_equal(found, action)


def test_two_valued_is_exactly_two_values() -> None:
    columns = {"constant": [2, 2, 2], "two": [1, 5, 1], "three": [1, 5, 5.000001]}
    found = moments(np.array(list(columns.values()), np.float32).T)
    assert found.two_valued == (False, True, False)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_what_was_normalised_comes_back(kind: str) -> None:
    action, result = some_actions(), statistics(some_actions(), kind)
    back = result.unnormalize_action(result.normalize_action(action))
    np.testing.assert_array_equal(back[:, :2], action[:, :2])
    np.testing.assert_allclose(back[:, 2:], action[:, 2:], rtol=1e-5, atol=1e-4)


def test_codes_end_at_the_quantiles_and_regression_does_not() -> None:
    action, result = some_actions(), statistics(some_actions(), "quantiles")
    assert result.normalize_action(action)[3, 2] > 100
    coded = result.normalize_for_codes(action)
    assert coded.min() == -1 and coded.max() == 1
    far = np.full((1, 4), 1e4, np.float32)
    np.testing.assert_allclose(result.unnormalize_codes(far)[0, 2], result.action.q99[2], rtol=1e-6)
    np.testing.assert_array_equal(result.unnormalize_action(far)[0, 2], 1000)


def test_valid_actions_of_single_actions_and_chunks_under_jit() -> None:
    chunks = statistics(some_actions()).chunked(2)
    given = np.array(
        [[5, 0.9, -7, 2], [np.nan] * 4, [np.inf, -np.inf, np.inf, -np.inf]], np.float32
    )
    low, high = (
        np.array(chunks.action.min[:4], np.float32),
        np.array(chunks.action.max[:4], np.float32),
    )
    for valid in (chunks.valid_action, jax.jit(chunks.valid_action)):
        single = np.asarray(valid(given))
        assert single.dtype == np.float32
        np.testing.assert_array_equal(single[:, 0], np.float32(0.2))
        np.testing.assert_array_equal(single[:, 1], [-1, 3, -1])
        np.testing.assert_array_equal(single[[0, 2], 2], [low[2], high[2]])
        np.testing.assert_array_equal(single[[0, 2], 3], [high[3], low[3]])
        assert ((single >= low) & (single <= high)).all()
        np.testing.assert_array_equal(valid(np.tile(given, 2)), np.tile(single, 2))


def test_one_outlier_does_not_cost_the_resolution() -> None:
    """The uniform adapter on held-out actions after training on 200, of which one is 1000.0."""
    rng = np.random.default_rng(0)
    train, held_out = rng.uniform(-1, 1, (2, 200, 1)).astype(np.float32)

    def rmse(kind: str, train: np.ndarray) -> float:
        adapter = Uniform.make(
            UniformConfig(), statistics(train, kind), Vocabulary(600, 4, 88), nnx.Rngs(0)
        )
        decoded = adapter.decode(adapter.encode(jnp.array(held_out)))
        return float(np.sqrt(np.mean((decoded - held_out) ** 2)))

    clean, outlier = rmse("range", train), np.append(train, [[np.float32(1000)]], 0)
    assert clean < 0.003 and rmse("range", outlier) > 0.5
    assert rmse("quantiles", outlier) < 0.005


def test_kept_in_json() -> None:
    result = statistics(some_actions(), "quantiles").chunked(3)
    values = json.loads(json.dumps(result.to_dict()))
    assert Statistics.from_dict(values) == result
    with pytest.raises(UserError, match="normalization: expected one of range.*found 'log'"):
        Statistics.from_dict(values | {"normalization": "log"})


def test_the_policy_takes_the_tokenizers() -> None:
    choose, every = normalization.choose, NORMALIZATIONS
    assert choose("config", "", "rvq", every, "quantiles") == "quantiles"
    assert choose("config", "meanstd", "rvq", every, "meanstd") == "meanstd"
    assert choose("config", "", "regression", every, None) == "range"
    with pytest.raises(UserError) as error:
        choose("config.mixture.arm", "range", "rvq", every, "quantiles")
    assert str(error.value).startswith("config.mixture.arm.normalization: expected 'quantiles'")
    with pytest.raises(UserError, match="expected range or quantiles with the adapter 'uniform'"):
        choose("config", "meanstd", "uniform", ("range", "quantiles"), None)


def test_a_table_of_unusual_dimensions() -> None:
    found = statistics(some_actions())
    first, *rows = normalization.table("config", "arm", NAMES, found).splitlines()
    assert first == "Actions of arm: 4 dimensions, normalised by range"
    constant, binary, heavy = rows  # the ordinary one has none
    assert constant.split() == ["constant", "constant", "0.2"]
    assert binary.split() == ["binary", "two-valued", "-1", "or", "3"]
    assert heavy.startswith("  heavy        heavy-tailed")
    assert heavy.endswith("; try --config.normalization=quantiles")
    by_quantiles = dataclasses.replace(found, normalization="quantiles")
    assert "try" not in normalization.table("config", "arm", NAMES, by_quantiles)
    ordinary = statistics(some_actions()[:, 3:])
    assert len(normalization.table("config", "arm", NAMES[3:], ordinary).splitlines()) == 1
