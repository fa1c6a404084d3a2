"""The terms of PPO's loss (Schulman et al. 2017, arXiv 1707.06347), of each step; means over steps are the caller's."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# How a value's change is limited. "none"; "clipped": the larger of the errors with and without the limit, as in most
# code; "replaced": the error with the limit where the value has changed by more, as in LLaRP.
VALUE_LOSSES = ("none", "clipped", "replaced")
LOG_PROBS = ("sum", "mean")  # over the tokens of an action


def surrogate(
    ratio: Float[Array, "*B"], advantage: Float[Array, "*B"], clip: float
) -> Float[Array, "*B"]:
    """Returns the clipped surrogate objective as a loss."""
    limited = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.minimum(ratio * advantage, limited * advantage)


def value_loss(
    value: Float[Array, "*B"],
    old: Float[Array, "*B"],
    target: Float[Array, "*B"],
    clip: float,
    kind: str,
) -> Float[Array, "*B"]:
    """Returns half the squared error of values; ``kind`` is one of ``VALUE_LOSSES``, ``old`` the value before."""
    plain = 0.5 * jnp.square(value - target)
    if kind == "none":
        return plain
    limited = 0.5 * jnp.square(old + jnp.clip(value - old, -clip, clip) - target)
    if kind == "clipped":
        return jnp.maximum(plain, limited)
    return jnp.where(jnp.abs(value - old) >= clip, limited, plain)


def log_prob(
    log_probs: Float[Array, "B T M V"], column: Int[Array, "B T M"], kind: str
) -> Float[Array, "B T"]:
    """Returns the log-probability of actions from those of their tokens; ``kind`` is one of ``LOG_PROBS``.

    The sum is the policy's. The mean is what LLaRP takes: with M tokens it limits the M-th root of the ratio.
    """
    chosen = jnp.take_along_axis(log_probs, column[..., None], axis=-1)[..., 0]
    return chosen.sum(-1) if kind == "sum" else chosen.mean(-1)


def entropy(log_probs: Float[Array, "B T M V"], actions: float) -> Float[Array, "B T"]:
    """Returns the entropy of the action as a share of the highest possible, the logarithm of the number of actions.

    By the chain rule, the sum over tokens of each one's entropy after the tokens before it is an unbiased estimate of
    an action's entropy. It is in [0, 1] on average over actions that the policy draws.

    Args:
      log_probs: of the tokens that may follow, -inf for others.
      actions: the logarithm of the number of valid actions.
    """
    finite = jnp.where(jnp.isfinite(log_probs), log_probs, 0)  # 0 log 0 = 0, and so is its gradient
    per_token = -jnp.where(jnp.isfinite(log_probs), jnp.exp(finite) * finite, 0).sum(-1)
    return per_token.sum(-1) / max(actions, 1e-6)


def divergence(log_ratio: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns Schulman's estimate of the KL divergence of the old policy from the new one, never below 0: r - 1 - log r
    (joschu.net/blog/kl-approx.html).
    """
    return jnp.expm1(log_ratio) - log_ratio


def normalized(
    advantage: Float[np.ndarray, "*B"], exists: Bool[np.ndarray, "*B"]
) -> Float[np.ndarray, "*B"]:
    """Returns advantages with mean 0 and variance 1 over the steps that exist."""
    chosen = advantage[exists]
    return (advantage - chosen.mean()) / (chosen.std() + 1e-5)


def explained_variance(values: Float[np.ndarray, " N"], returns: Float[np.ndarray, " N"]) -> float:
    """Returns the share of the returns' variance that the values explain: 1 is all, 0 is no more than a constant."""
    variance = returns.var()
    return float("nan") if variance == 0 else float(1 - (returns - values).var() / variance)


def mean_over(x: Float[Array, "B T"], exists: Bool[Array, "B T"], count: Array) -> Array:
    """Returns the sum over the steps that exist, divided by ``count``."""
    return jnp.where(exists, x, 0).sum() / count
