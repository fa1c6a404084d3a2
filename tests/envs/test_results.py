"""Wilson's interval."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_act.envs.results import wilson


def test_known_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I: 81/263 and 15/148 by the score method."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_holds_the_rate_within_zero_and_one(counts: tuple[int, int]) -> None:
    won, n = counts
    low, high = wilson(won, n)
    assert 0 <= low <= won / n <= high <= 1
    assert low < high
    assert wilson(n - won, n) == pytest.approx((1 - high, 1 - low))


def test_nothing_is_known_of_no_trials() -> None:
    assert wilson(0, 0) == (0, 1)


def test_more_successes_than_trials() -> None:
    with pytest.raises(ValueError, match="found 3 of 2"):
        wilson(3, 2)
