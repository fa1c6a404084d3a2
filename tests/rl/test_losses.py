"""The terms of the loss against finite differences and numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_act.rl import losses

ARMS = jnp.array([0, 1, 2, 1])
ADVANTAGES = jnp.array([1.0, -0.5, 2.0, 0.7])
OLD = jax.nn.log_softmax(jnp.array([0.1, 0.3, -0.2]))[ARMS]


def bandit(logits: jax.Array) -> jax.Array:
    ratio = jnp.exp(jax.nn.log_softmax(logits)[ARMS] - OLD)
    return losses.surrogate(ratio, ADVANTAGES, 0.2).mean()


@pytest.mark.parametrize("logits", [[0.1, 0.3, -0.2], [0.3, 0.2, 0.9], [-0.6, 0.9, 0.1]])
def test_the_gradient_of_the_surrogate_on_a_bandit(logits: list[float]) -> None:
    point, step = np.array(logits, np.float32), np.float32(1e-2)
    slopes = [
        (bandit(jnp.array(point + d)) - bandit(jnp.array(point - d))) / (2 * step)
        for d in step * np.eye(3, dtype=np.float32)
    ]
    np.testing.assert_allclose(jax.grad(bandit)(jnp.array(point)), slopes, atol=2e-4)


def test_a_ratio_beyond_the_limit_teaches_nothing_where_it_would_go_further() -> None:
    slope = jax.grad(lambda ratio, advantage: losses.surrogate(ratio, jnp.asarray(advantage), 0.2))
    assert [float(slope(r, a)) for r, a in ((1.3, 1.0), (0.7, -1.0))] == [0.0, 0.0]
    assert [float(slope(r, a)) for r, a in ((1.3, -1.0), (0.7, 1.0), (1.1, 2.0))] == [1, -1, -2]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [0.5, 0.005, 0.005]),
        ("clipped", [0.5, 0.32, 0.005]),
        ("replaced", [0.02, 0.32, 0.005]),
    ],
)
def test_value_losses(kind: str, expected: list[float]) -> None:
    """Values that were 1.0 and may change by 0.2: too far and wrong, too far and right, and within the limit."""
    value, target = jnp.array([2.0, 1.9, 1.1]), jnp.array([1.0, 2.0, 1.2])
    found = losses.value_loss(value, jnp.ones(3), target, 0.2, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_entropy_is_a_share_of_what_is_possible() -> None:
    masked = jnp.array([0.0, 0.0, 0.0, -jnp.inf])  # three of four tokens may follow
    uniform = jax.nn.log_softmax(masked)[None, None, None]
    certain = jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf])[None, None, None]
    tokens = jnp.concatenate([uniform, certain, uniform], axis=2)  # nine actions
    assert float(losses.entropy(tokens, float(np.log(9)))[0, 0]) == pytest.approx(1.0)
    assert float(losses.entropy(certain, 1.0)[0, 0]) == 0.0

    def of(logits: jax.Array) -> jax.Array:
        filtered = jnp.where(jnp.isfinite(masked), logits, -jnp.inf)
        return losses.entropy(jax.nn.log_softmax(filtered)[None, None, None], 1.0).sum()

    slope = jax.grad(of)(jnp.array([0.3, -0.1, 0.2, 5.0]))
    assert np.isfinite(slope).all() and slope[3] == 0


def test_log_probability_is_a_sum_or_llarps_mean() -> None:
    log_probs = jnp.log(jnp.array([[[[0.5, 0.5], [0.25, 0.75]]]]))
    column = jnp.array([[[0, 1]]])
    total = np.log(0.5 * 0.75)
    assert float(losses.log_prob(log_probs, column, "sum")[0, 0]) == pytest.approx(total)
    assert float(losses.log_prob(log_probs, column, "mean")[0, 0]) == pytest.approx(total / 2)


def test_the_estimate_of_the_divergence_is_never_negative_and_right_on_average() -> None:
    old, new = jnp.array([0.2, 0.5, 0.3]), jnp.array([0.3, 0.3, 0.4])
    estimate = losses.divergence(jnp.log(new / old))
    assert (estimate >= 0).all()
    assert float((old * estimate).sum()) == pytest.approx(float((old * jnp.log(old / new)).sum()))


def test_normalized_advantages_and_explained_variance() -> None:
    x, exists = np.array([[1.0, 9.0, 3.0, 5.0]], np.float32), np.array([[True, False, True, True]])
    found = losses.normalized(x, exists)[exists]
    assert found.mean() == pytest.approx(0, abs=1e-6) and found.std() == pytest.approx(1, abs=1e-4)
    returns = np.array([1.0, 2.0, 3.0])
    assert losses.explained_variance(returns, returns) == 1.0
    assert losses.explained_variance(np.full(3, 2.0), returns) == 0.0
    assert np.isnan(losses.explained_variance(returns, np.ones(3)))
