"""The residual quantizer: its invariants, and parity with vector-quantize-pytorch."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_act.action_tokenizer import quantizer
from mllm_act.action_tokenizer.quantizer import Codebooks

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
INITIALISE = jax.jit(quantizer.initialise, static_argnums=(2, 3, 4))
seeds = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(quantizers: int, codes: int, width: int, codebooks: np.ndarray) -> Any:
    """ResidualVQ with these codebooks; every code has a count of 1, as after its constructor."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("vector_quantize_pytorch")
    module = library.ResidualVQ(
        dim=width, num_quantizers=quantizers, codebook_size=codes, decay=0.8
    )
    for layer, codebook in zip(module.layers, codebooks, strict=True):
        layer._codebook.embed.data.copy_(torch.from_numpy(codebook)[None])
        layer._codebook.embed_avg.data.copy_(torch.from_numpy(codebook)[None])
    return module


@pytest.mark.parametrize("quantizers", [1, 3])
def test_codes_and_sums_equal_the_reference(quantizers: int) -> None:
    torch = pytest.importorskip("torch")
    codebooks, latents = normal(0, quantizers, 32, 8), normal(1, 200, 8)
    module = reference(quantizers, 32, 8, codebooks).eval()
    with torch.no_grad():
        expected, indices, _ = module(torch.from_numpy(latents))
    codes = quantizer.encode(jnp.array(codebooks), jnp.array(latents))
    np.testing.assert_array_equal(codes, indices.numpy())
    decoded = quantizer.decode(jnp.array(codebooks), codes)
    np.testing.assert_allclose(decoded, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("quantizers", [1, 2])
def test_training_passes_equal_the_reference(quantizers: int) -> None:
    """Codes, commitment loss, averages and codebooks over three batches."""
    torch = pytest.importorskip("torch")
    codebooks = normal(0, quantizers, 16, 8)
    module = reference(quantizers, 16, 8, codebooks).train()
    start = jnp.array(codebooks)
    state = Codebooks(start, jnp.ones(start.shape[:2]), start)
    for batch in range(3):
        latents = normal(10 + batch, 64, 8)
        _, indices, losses = module(torch.from_numpy(latents))
        result = quantizer.quantize(KEY, state, jnp.array(latents), 0.8, 0.0)
        state = result.state
        np.testing.assert_array_equal(result.codes, indices.numpy())
        np.testing.assert_allclose(result.commitment, losses.sum().item(), rtol=1e-5)
        for q, layer in enumerate(module.layers):
            theirs = layer._codebook
            np.testing.assert_allclose(state.counts[q], theirs.cluster_size[0], rtol=1e-5)
            np.testing.assert_allclose(state.sums[q], theirs.embed_avg[0], atol=1e-5)
            np.testing.assert_allclose(state.codes[q], theirs.embed[0], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_decoded_codes_encode_to_themselves(seed: int) -> None:
    """If the second codebook is small compared to the distances within the first."""
    first = 10 * normal(seed, 8, 6)
    gaps = np.linalg.norm(first[:, None] - first[None], axis=-1) + 1e9 * np.eye(8)
    second = normal(seed + 1, 8, 6)
    second *= 0.4 * gaps.min() / np.linalg.norm(second, axis=-1).max()
    codebooks = jnp.array([first, second])
    codes = np.random.default_rng(seed).integers(0, 8, (3, 5, 2)).astype(np.int32)
    codes = jnp.array(codes)
    again = quantizer.encode(codebooks, quantizer.decode(codebooks, codes))
    assert again.dtype == jnp.int32
    np.testing.assert_array_equal(again, codes)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_codes_are_the_nearest(seed: int) -> None:
    codebook, latents = normal(seed, 12, 4), normal(seed + 1, 30, 4)
    distance = np.linalg.norm(latents[:, None] - codebook[None], axis=-1)
    chosen = distance[np.arange(30), quantizer.nearest(jnp.array(latents), jnp.array(codebook))]
    np.testing.assert_allclose(chosen, distance.min(axis=-1), rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_more_codebooks_are_never_worse_on_the_samples(seed: int) -> None:
    samples = jnp.array(normal(seed, 100, 3))
    state = INITIALISE(KEY, samples, 4, 8, 100)
    errors = []
    for q in range(1, 5):
        codebooks = state.codes[:q]
        decoded = quantizer.decode(codebooks, quantizer.encode(codebooks, samples))
        errors.append(float(jnp.mean((decoded - samples) ** 2)))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))


def test_kmeans_finds_clusters() -> None:
    expected = 10 * normal(0, 16, 4)
    samples = np.repeat(expected, 20, axis=0) + 0.01 * normal(1, 320, 4)
    centres, counts = quantizer.kmeans(KEY, jnp.array(samples), 16, 10)
    order = quantizer.nearest(jnp.array(expected), centres)
    np.testing.assert_allclose(centres[order], expected, atol=0.02)
    np.testing.assert_array_equal(counts, np.full(16, 20))


def test_kmeans_of_fewer_samples_than_codes() -> None:
    samples = jnp.array(normal(0, 5, 3))
    centres, counts = quantizer.kmeans(KEY, samples, 8, 3)
    assert np.isfinite(centres).all() and counts.sum() == 5
    np.testing.assert_allclose(centres[quantizer.nearest(samples, centres)], samples, atol=1e-6)


def test_a_dead_code_is_revived_where_the_error_is_largest() -> None:
    """Its statistics are reset, so that the next update does not move it back."""
    codes = jnp.array([[[0.0, 0.0], [1.0, 0.0], [500.0, 0.0]]])
    counts = jnp.array([[10.0, 10.0, 1e-4]])
    state = Codebooks(codes, counts, codes * counts[..., None])
    far = np.array([[0, 50]], np.float32)
    latents = jnp.array(np.concatenate([np.tile([[0, 0], [1, 0]], (10, 1)), np.tile(far, (5, 1))]))
    revived = quantizer.quantize(KEY, state, latents, 0.99, 0.1)
    np.testing.assert_allclose(revived.state.codes[0, 2], far[0])
    assert revived.state.counts[0, 2] == pytest.approx(20 / 3, rel=0.1)
    after = quantizer.quantize(KEY, revived.state, latents, 0.99, 0.1)
    np.testing.assert_allclose(after.state.codes[0, 2], far[0], rtol=1e-3)
    assert set(np.unique(after.codes)) == {0, 1, 2}
    kept = quantizer.quantize(KEY, state, latents, 0.99, 0.0).state  # 0: no revival
    np.testing.assert_allclose(kept.codes[0, 2, 0], 500, rtol=0.1)


def test_gradient_passes_straight_through_to_the_encoder_only() -> None:
    latents, codebooks = jnp.array(normal(0, 9, 4)), jnp.array(normal(1, 2, 8, 4))

    def total(latents: jax.Array, codebooks: jax.Array) -> jax.Array:
        state = Codebooks(codebooks, jnp.ones((2, 8)), codebooks)
        return quantizer.quantize(KEY, state, latents, 0.9, 0.0).latent.sum()

    to_latents, to_codebooks = jax.grad(total, argnums=(0, 1))(latents, codebooks)
    np.testing.assert_array_equal(to_latents, np.ones((9, 4)))
    np.testing.assert_array_equal(to_codebooks, np.zeros((2, 8, 4)))


def test_statistics_are_global_over_a_mesh() -> None:
    """For any number of devices."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    codebooks, latents = jnp.array(normal(0, 2, 8, 4)), normal(1, 8 * len(jax.devices()), 4)
    state = Codebooks(codebooks, jnp.ones((2, 8)), codebooks)
    sharded = jax.device_put(latents, NamedSharding(mesh, PartitionSpec("data")))
    quantize = jax.jit(quantizer.quantize, static_argnums=(3, 4))
    on_one = quantize(KEY, state, jnp.array(latents), 0.9, 0.1)
    on_all = quantize(KEY, state, sharded, 0.9, 0.1)
    np.testing.assert_allclose(on_one.state.sums, on_all.state.sums, rtol=1e-6)


def test_usage() -> None:
    use, perplexity = quantizer.usage(jnp.array([[0, 1], [0, 2], [0, 3], [0, 0]]), 8)
    np.testing.assert_allclose(use, [1 / 8, 4 / 8])
    np.testing.assert_allclose(perplexity, [1, 4], rtol=1e-6)
