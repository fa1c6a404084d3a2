"""Advantages against a plain loop over the definition, and against published figures."""

import numpy as np
import pytest

from mllm_act.rl import gae


def test_equals_the_sum_of_discounted_errors() -> None:
    rng = np.random.default_rng(0)
    rewards, values, following = rng.normal(size=(3, 9, 4)).astype(np.float32)
    last = rng.random((9, 4)) < 0.3
    found = gae.advantages(rewards, values, following, last, 0.97, 0.9)
    for e in range(4):
        for t in range(9):
            expected, weight = 0.0, 1.0
            for s in range(t, 9):
                expected += weight * (rewards[s, e] + 0.97 * following[s, e] - values[s, e])
                weight *= 0.97 * 0.9
                if last[s, e]:
                    break
            assert found[t, e] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (0.0, [-0.904, -0.951, -1.0]),  # a time limit that is terminal: LLaRP, purejaxrl, rejax
        (1.0, [-0.028, -0.019, -0.010]),  # bootstrapped from the observation before the reset
    ],
)
def test_a_cut_after_three_steps_of_value_one(after: float, expected: list[float]) -> None:
    values, following = np.ones((3, 1), np.float32), np.ones((3, 1), np.float32)
    following[2] = after
    last = np.array([[False], [False], [True]])
    found = gae.advantages(0 * values, values, following, last, 0.99, 0.95)
    np.testing.assert_allclose(found[:, 0], expected, atol=5e-4)
