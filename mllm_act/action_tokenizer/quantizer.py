"""Residual vector quantization with codebooks learned by exponential moving averages.

There are Q codebooks of K codes of width C. Code q is the nearest to the residual that the codes before it leave
(arXiv 2406.07904, section 3.2.2; algorithm 1 of SoundStream, arXiv 2107.03312); plain vector quantization is Q = 1. All
functions are pure. Under ``jax.jit``, sums over a batch that is sharded over a mesh are global.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The nearest code must not depend on the accelerator's reduced precision (TF32, bfloat16 passes).
_EXACT = jax.lax.Precision.HIGHEST


class Codebooks(NamedTuple):
    """State of the quantizer. It receives no gradient and is not part of the optimizer.

    Attributes:
      codes: float32[Q, K, C], the codebooks.
      counts: float32[Q, K], moving average of the number of vectors in a batch that chose the code.
      sums: float32[Q, K, C], moving average of the sum of those vectors.
    """

    codes: Float[Array, "Q K C"]
    counts: Float[Array, "Q K"]
    sums: Float[Array, "Q K C"]


class Quantized(NamedTuple):
    """The result of ``quantize``."""

    latent: Float[Array, "N C"]
    codes: Int[Array, "N Q"]
    commitment: Float[Array, ""]
    state: Codebooks


def nearest(latent: Float[Array, "N C"], codebook: Float[Array, "K C"]) -> Int[Array, " N"]:
    """Returns the index of the nearest code, by one matrix product: ``|x-c|^2 = |x|^2 - 2 (x.c - |c|^2/2)``."""
    half_norm = 0.5 * jnp.sum(codebook * codebook, axis=-1)
    score = jnp.matmul(latent, codebook.T, precision=_EXACT) - half_norm
    return jnp.argmax(score, axis=-1).astype(jnp.int32)


def encode(codebooks: Float[Array, "Q K C"], latent: Float[Array, "... C"]) -> Int[Array, "... Q"]:
    """Returns the greedy residual codes of latents: int32[..., Q] in [0, K)."""
    residual = latent.reshape(-1, latent.shape[-1])
    codes = []
    for codebook in codebooks:
        index = nearest(residual, codebook)
        residual = residual - codebook[index]
        codes.append(index)
    return jnp.stack(codes, axis=-1).reshape(*latent.shape[:-1], len(codebooks))


def decode(codebooks: Float[Array, "Q K C"], codes: Int[Array, "... Q"]) -> Float[Array, "... C"]:
    """Returns the sum of the Q chosen codes: float32[..., C]."""
    chosen = [codebook[codes[..., q]] for q, codebook in enumerate(codebooks)]
    return sum(chosen[1:], chosen[0])


def kmeans(
    key: Array, samples: Float[Array, "N C"], num_codes: int, iterations: int
) -> tuple[Float[Array, "K C"], Float[Array, " K"]]:
    """Lloyd's algorithm with an initialisation like that of k-means++ (Arthur and Vassilvitskii 2007).

    Initial centres are samples drawn with probability proportional to their squared distance to the centres of earlier
    rounds: those with the largest log-weights plus Gumbel noise. An empty cluster moves to a sample far from its
    centre. N may be smaller than K: then some centres coincide and have no samples.

    Returns:
      The centres, and the number of samples of each.
    """
    norm = jnp.sum(samples * samples, axis=-1)
    # Several centres a round: one matrix product instead of many matrix-vector products.
    per_round = math.gcd(num_codes, max(1, num_codes // 32))
    if per_round > len(samples):
        per_round = 1

    def pick(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, distance = carry
        noise = jax.random.gumbel(jax.random.fold_in(key, i), distance.shape)
        chosen = samples[jax.lax.top_k(jnp.log(distance + 1e-12) + noise, per_round)[1]]
        product = jnp.matmul(samples, chosen.T, precision=_EXACT)
        nearer = jnp.min(jnp.sum(chosen * chosen, axis=-1) - 2 * product, axis=-1) + norm
        centres = jax.lax.dynamic_update_slice(centres, chosen, (i * per_round, 0))
        return centres, jnp.clip(nearer, 0, distance)

    empty = jnp.zeros((num_codes, samples.shape[-1]), samples.dtype)
    far = jnp.full_like(norm, jnp.finfo(norm.dtype).max)
    centres, _ = jax.lax.fori_loop(0, num_codes // per_round, pick, (empty, far))

    def lloyd(i: Array, centres: Array) -> Array:
        index = nearest(samples, centres)
        count, total = _statistics(samples, index, num_codes)
        error = jnp.sum((samples - centres[index]) ** 2, axis=-1)
        mean = total / jnp.maximum(count, 1)[:, None]
        empty = count < 0.5
        return _replace(jax.random.fold_in(key, num_codes + i), mean, empty, samples, error)[0]

    centres = jax.lax.fori_loop(0, iterations, lloyd, centres)
    count, _ = _statistics(samples, nearest(samples, centres), num_codes)
    return centres, count


def initialise(
    key: Array,
    samples: Float[Array, "N C"],
    quantizers: int,
    num_codes: int,
    batch_size: int,
    iterations: int = 10,
) -> Codebooks:
    """Initialises the first codebook by k-means of the samples, the second by k-means of their residuals, and so on.

    There should be many more samples than K; otherwise every sample becomes its own code and no residual is left for
    the next codebook. The counts are scaled to a batch of ``batch_size``.
    """
    residual, state = samples, []
    for q in range(quantizers):
        codes, count = kmeans(jax.random.fold_in(key, q), residual, num_codes, iterations)
        residual = residual - codes[nearest(residual, codes)]
        count = count * (batch_size / samples.shape[0])
        state.append(Codebooks(codes, count, codes * count[:, None]))
    return Codebooks(*(jnp.stack(parts) for parts in zip(*state, strict=True)))


def ema_update(
    state: Codebooks,
    latents: Float[Array, "Q N C"],
    codes: Int[Array, "N Q"],
    decay: float,
    epsilon: float = 1e-5,
) -> Codebooks:
    """Updates the moving averages of each code's count and sum; the code is sum over count.

    As in appendix A.1 of VQ-VAE (arXiv 1711.00937), with Laplace smoothing of the counts. ``latents[q]`` is the input
    of codebook q.
    """
    num_codes = state.codes.shape[1]
    statistics = [_statistics(x, codes[:, q], num_codes) for q, x in enumerate(latents)]
    counts = decay * state.counts + (1 - decay) * jnp.stack([count for count, _ in statistics])
    sums = decay * state.sums + (1 - decay) * jnp.stack([total for _, total in statistics])
    total = jnp.sum(counts, axis=-1, keepdims=True)
    smooth = (counts + epsilon) / (total + num_codes * epsilon) * total
    return Codebooks(sums / smooth[..., None], counts, sums)


def revive(
    key: Array,
    state: Codebooks,
    latents: Float[Array, "Q N C"],
    errors: Float[Array, "Q N"],
    threshold: float,
) -> Codebooks:
    """Moves codes used less than ``threshold`` times the mean use to vectors of the batch with a large error.

    ``latents[q]`` is the input of codebook q, ``errors[q]`` its squared error. The code's moving averages are reset
    too; otherwise the next update would move it back. ``threshold`` is relative, so it does not depend on batch size
    and K.
    """
    num_codes = state.codes.shape[1]
    parts = []
    for q in range(state.codes.shape[0]):
        codes, counts, sums = state.codes[q], state.counts[q], state.sums[q]
        mean_use = jnp.sum(counts) / num_codes
        dead = counts < threshold * mean_use
        key_q = jax.random.fold_in(key, q)
        codes, moved = _replace(key_q, codes, dead, latents[q], errors[q])
        counts = jnp.where(moved, mean_use, counts)
        sums = jnp.where(moved[:, None], codes * counts[:, None], sums)
        parts.append(Codebooks(codes, counts, sums))
    return Codebooks(*(jnp.stack(part) for part in zip(*parts, strict=True)))


def quantize(
    key: Array,
    state: Codebooks,
    latent: Float[Array, "N C"],
    decay: float,
    revive_below: float,
) -> Quantized:
    """One training pass; returns straight-through latents, codes, commitment loss and the next state.

    The commitment loss is the mean squared distance between a codebook's input and the chosen code, summed over the
    codebooks. Its gradient reaches the encoder only.
    """
    residual, residuals, indices, commitment = latent, [], [], jnp.zeros((), latent.dtype)
    for codebook in state.codes:
        index = nearest(jax.lax.stop_gradient(residual), codebook)
        chosen = codebook[index]
        commitment = commitment + jnp.mean((residual - chosen) ** 2)
        residuals.append(jax.lax.stop_gradient(residual))
        indices.append(index)
        residual = residual - chosen
    codes = jnp.stack(indices, axis=-1)
    # latent - residual is the sum of the codes; the gradient of the result is that of the latent.
    quantized = latent - jax.lax.stop_gradient(residual)
    inputs = jnp.stack(residuals)
    state = ema_update(state, inputs, codes, decay)
    if revive_below > 0:
        after = jnp.stack([*residuals[1:], jax.lax.stop_gradient(residual)])
        errors = jnp.sum(after * after, axis=-1)
        state = revive(key, state, inputs, errors, revive_below)
    return Quantized(quantized, codes, commitment, state)


def usage(
    codes: Int[Array, "... Q"], num_codes: int
) -> tuple[Float[Array, " Q"], Float[Array, " Q"]]:
    """Returns for each codebook the fraction of its codes in use, and the perplexity (in [1, K])."""
    flat = codes.reshape(-1, codes.shape[-1])
    counts = jax.vmap(lambda c: jnp.bincount(c, length=num_codes), in_axes=1)(flat)
    share = counts / jnp.sum(counts, axis=-1, keepdims=True)
    entropy = -jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0), -1)
    return jnp.mean(counts > 0, axis=-1), jnp.exp(entropy)


def _statistics(
    samples: Float[Array, "N C"], index: Int[Array, " N"], num_codes: int
) -> tuple[Float[Array, " K"], Float[Array, "K C"]]:
    """Count and sum of the samples of each code, by a matrix product, which is faster than a scatter."""
    one_hot = jax.nn.one_hot(index, num_codes, dtype=samples.dtype)
    return jnp.sum(one_hot, axis=0), jnp.matmul(one_hot.T, samples, precision=_EXACT)


def _replace(
    key: Array,
    codes: Float[Array, "K C"],
    dead: Array,
    samples: Float[Array, "N C"],
    error: Float[Array, " N"],
) -> tuple[Float[Array, "K C"], Array]:
    """Moves the dead codes to distinct samples, drawn with probability proportional to their squared error.

    Returns:
      The codes, and a mask of those moved: at most as many as there are samples.
    """
    noise = jax.random.gumbel(key, error.shape)
    count = min(codes.shape[0], samples.shape[0])
    _, order = jax.lax.top_k(jnp.log(error + 1e-12) + noise, count)
    rank = jnp.cumsum(dead) - 1
    moved = dead & (rank < count)
    samples = samples[order[jnp.clip(rank, 0, count - 1)]]
    return jnp.where(moved[:, None], samples, codes), moved
