"""Moments in bounded memory: as numpy's while there is room, in the right bin beyond, whoever reads which block."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from data_pipelines.reading import moments
from data_pipelines.reading.moments import Summary
from mllm_act.normalization import Moments

numbers = st.floats(-(2.0**100), 2.0**100, width=32)
arrays = npst.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=numbers)


def summary(values: np.ndarray, blocks: dict[int, slice]) -> Summary:
    result = Summary(values.shape[1])
    for number, block in blocks.items():
        result.add(number, values[block])
    return result


@settings(deadline=None)
@given(arrays)
def test_small_sets_are_exact(values: np.ndarray) -> None:
    found, exact = summary(values, {0: slice(None)}).moments(), values.astype(np.float64)
    for name, expected in (
        ("mean", exact.mean(0)), ("std", exact.std(0)), ("min", exact.min(0)), ("max", exact.max(0)),
        ("q01", np.quantile(exact, 0.01, axis=0)), ("q99", np.quantile(exact, 0.99, axis=0)),
        ("two_valued", [len(np.unique(column)) == 2 for column in exact.T]),
    ):  # fmt: skip
        np.testing.assert_array_equal(getattr(found, name), expected)


def samples() -> np.ndarray:
    """Of a normal, a heavy-tailed, a two-valued and a constant dimension."""
    rng = np.random.default_rng(0)
    columns = (rng.normal(size=6000), rng.standard_cauchy(6000), rng.integers(2, size=6000))
    return np.stack([*columns, np.full(6000, 0.1)], axis=1).astype(np.float32)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_BINS", 4 * 512)
    monkeypatch.setattr(moments, "_FEWEST_BINS", 512)
    monkeypatch.setattr(moments, "_PENDING", 4 * 700)


def test_large_sets_are_right_to_a_bin(little_room: None) -> None:
    values = samples()
    found = summary(values, {i: slice(500 * i, 500 * (i + 1)) for i in range(12)})
    result, exact = found.moments(), values.astype(np.float64)
    assert all(len(h.keys) <= 512 for h in found._histograms)
    for name, share in (("q01", 0.01), ("q99", 0.99)):
        quantiles = np.quantile(exact, share, axis=0)
        np.testing.assert_allclose(getattr(result, name), quantiles, rtol=0.05)
    np.testing.assert_allclose(result.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.std, exact.std(0), rtol=1e-12, atol=1e-16)
    assert (result.min, result.max) == (tuple(exact.min(0)), tuple(exact.max(0)))
    assert result.two_valued == (False, False, True, False)
    assert result.q01[3] == result.min[3] == result.max[3]


@pytest.mark.parametrize("count", [2, 3])
def test_who_reads_which_block_changes_nothing(little_room: None, count: int) -> None:
    values = samples()
    blocks = {i: slice(500 * i, 500 * (i + 1)) for i in range(12)}
    alone: Moments = summary(values, blocks).moments()
    parts = [
        summary(values, {i: block for i, block in blocks.items() if i % count == index})
        for index in range(count)
    ]
    first, *others = [Summary.of_arrays(part.arrays()) for part in reversed(parts)]
    for other in others:
        first.merge(other)
    assert first.moments() == alone and first.steps == 6000
