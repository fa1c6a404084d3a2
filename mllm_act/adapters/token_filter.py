"""The token filter: probabilities over the tokens that may follow, and over no others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def filtered_log_softmax(
    logits: Float[Array, "... V"], allowed: Bool[Array, "... V"]
) -> Float[Array, "... V"]:
    """Returns log-probabilities renormalised over the allowed tokens; -inf elsewhere. Computed in float32.

    At least one token must be allowed.
    """
    masked = jnp.where(allowed, logits.astype(jnp.float32), -jnp.inf)
    return jax.nn.log_softmax(masked, axis=-1)
