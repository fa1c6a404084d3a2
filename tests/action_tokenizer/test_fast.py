"""FAST: decoding inverts encoding up to rounding, and every sequence that can be sampled can be decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.action_tokenizer import fast
from mllm_act.action_tokenizer.byte_pair import END
from mllm_act.action_tokenizer.fast import FastConfig, FastTokenizer
from mllm_act.errors import UserError
from tests.action_tokenizer.tables import random_tokenizer

pytestmark = pytest.mark.slow

A, H, SCALE = 3, 6, 10.0
SMALL = FastConfig(2, 4, 3.0, low=-2, high=2, merges=12, codes=18, tokens=5)

encode = nnx.jit(lambda tokenizer, action: tokenizer.encode(action))
decode = nnx.jit(lambda tokenizer, codes: tokenizer.decode(codes))


def chunks(seed: int, count: int = 400, size: float = 0.25) -> np.ndarray:
    """Random walks in which only some dimensions move."""
    rng = np.random.default_rng(seed)
    step = rng.normal(0, size, (count, H, A)) * (rng.random((count, 1, A)) < 0.6)
    return np.clip(np.cumsum(step, 1), -1, 1).reshape(count, H * A).astype(np.float32)


def coefficients(action: np.ndarray) -> np.ndarray:
    """Scaled coefficients by JAX's own transform, unrounded."""
    steps = action.reshape(-1, H, A)
    scaled = jax.scipy.fft.dct(jnp.array(steps), norm="ortho", axis=1) * SCALE
    return np.array(scaled.reshape(-1, H * A))


def code_count(tokenizer: FastTokenizer, codes: jax.Array) -> np.ndarray:
    """The number of codes of a chunk, including END."""
    return np.array((tokenizer.room(codes)[..., :-1] > 0).sum(-1))


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return fast.fit(chunks(0), A, H, vocabulary=128, scale=SCALE)


@pytest.mark.parametrize("chunk", [1, 2, 7, 8])
def test_the_transform_is_the_orthonormal_dct(chunk: int) -> None:
    steps = np.random.default_rng(0).normal(size=(5, chunk, 4)).astype(np.float32)
    expected = jax.scipy.fft.dct(jnp.array(steps), norm="ortho", axis=1)
    rounded = fast.quantize(jnp.array(steps.reshape(5, -1)), 4, 1000.0)
    np.testing.assert_allclose(rounded.reshape(steps.shape), 1000 * expected, atol=0.51)
    back = fast.dequantize(rounded, 4, 1000.0).reshape(steps.shape)
    np.testing.assert_allclose(back, steps, atol=0.5e-3 * chunk)


def test_training_chunks_are_decoded_up_to_rounding(tokenizer: FastTokenizer) -> None:
    """None is cut or clipped: each coefficient is off by at most half a step, and encoding again changes nothing."""
    codes = encode(tokenizer, chunks(0))
    assert codes.dtype == jnp.int32 and codes.shape == (400, tokenizer.config.tokens)
    assert 0 <= int(codes.min()) and int(codes.max()) < tokenizer.config.codes <= 128
    decoded = decode(tokenizer, codes)
    assert decoded.dtype == jnp.float32
    error = coefficients(np.array(decoded)) - coefficients(chunks(0))
    assert np.abs(error).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(encode(tokenizer, decoded), codes)


def test_the_number_of_tokens_is_that_of_the_longest_training_chunk(
    tokenizer: FastTokenizer,
) -> None:
    count = np.array((encode(tokenizer, chunks(0)) != END).sum(-1))
    assert count.max() == tokenizer.config.tokens and count.min() < count.max()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(1, 2**16), size=st.floats(0.01, 3))
def test_unseen_chunks_that_are_neither_cut_nor_clipped(
    tokenizer: FastTokenizer, seed: int, size: float
) -> None:
    action, config = chunks(seed, 50, size), tokenizer.config
    codes = encode(tokenizer, action)
    decoded = np.array(decode(tokenizer, codes))
    assert np.isfinite(decoded).all()
    before, after = coefficients(action), coefficients(decoded)
    inside = (before > config.low - 0.49) & (before < config.high + 0.49)
    cut = np.array(codes[:, -1] != END)
    whole = inside.all(-1) & ~cut
    assert np.abs(after - before)[whole].max(initial=0) <= 0.5 + 1e-3
    np.testing.assert_array_equal(encode(tokenizer, jnp.array(decoded))[whole], codes[whole])
    # A clipped coefficient becomes the nearest one available; the others are not affected.
    nearest = np.clip(before, config.low, config.high)
    assert np.abs(after - nearest)[~cut].max(initial=0) <= 0.5 + 1e-3


def test_a_chunk_that_needs_too_many_codes_is_cut(tokenizer: FastTokenizer) -> None:
    """Its highest frequencies become zeros; the others are kept."""
    action = chunks(7, 200, 3.0) * np.where(np.arange(H * A) % 2, -1, 1).astype(np.float32)
    codes = encode(tokenizer, action)
    cut = np.array(tokenizer.room(codes)[:, -1] > 0)
    before, after = coefficients(action)[cut], coefficients(np.array(decode(tokenizer, codes)))[cut]
    assert cut.sum() > 10
    for row, (x, y) in enumerate(zip(before, after, strict=True)):
        written = H * A - int(tokenizer.room(codes)[cut][row, -1])
        np.testing.assert_allclose(y[written:], 0, atol=1e-3)
        expected = np.clip(x[:written], tokenizer.config.low, tokenizer.config.high)
        assert np.abs(y[:written] - expected).max() <= 0.5 + 1e-3


def test_huge_values_are_encoded(tokenizer: FastTokenizer) -> None:
    for number in (1e30, -1e30, np.inf):
        action = jnp.full((2, H * A), number)
        assert jnp.isfinite(decode(tokenizer, encode(tokenizer, action))).all()


def test_a_chunk_of_zeros_is_one_end_and_leading_axes_are_kept(tokenizer: FastTokenizer) -> None:
    codes = encode(tokenizer, jnp.zeros((2, 3, H * A)))
    assert codes.shape == (2, 3, tokenizer.config.tokens) and (codes == END).all()
    decoded = decode(tokenizer, codes)
    assert decoded.shape == (2, 3, H * A) and (decoded == 0).all()
    assert (code_count(tokenizer, codes) == 1).all()
    many = encode(tokenizer, chunks(0)[:6].reshape(2, 3, -1))
    np.testing.assert_array_equal(many.reshape(6, -1), encode(tokenizer, chunks(0)[:6]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_any_codes_can_be_decoded_even_those_that_the_filter_refuses(seed: int) -> None:
    tokenizer = random_tokenizer(seed, SMALL)
    codes = np.random.default_rng(seed).integers(0, SMALL.codes, (40, SMALL.tokens))
    decoded = np.array(decode(tokenizer, jnp.array(codes)))
    assert decoded.shape == (40, 8) and np.isfinite(decoded).all()
    table, lengths = np.array(tokenizer.coefficients[...]), np.array(tokenizer.lengths[...])
    for row, action in zip(codes, decoded, strict=True):
        end = list(row).index(END) if END in row else len(row)
        written = [c for code in row[:end] for c in table[code, : lengths[code]]]
        expected = np.array((written + [0] * 8)[:8])
        inverse = jax.scipy.fft.idct(jnp.array(expected.reshape(4, 2) / 3.0), norm="ortho", axis=0)
        np.testing.assert_allclose(action, inverse.reshape(-1), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_filtered_codes_fit_and_some_code_is_always_allowed(seed: int) -> None:
    tokenizer, rng = random_tokenizer(seed, SMALL), np.random.default_rng(seed)
    lengths = np.array(tokenizer.lengths[...])
    codes = np.zeros((40, 0), np.int32)
    for _ in range(SMALL.tokens):
        allowed = np.array(tokenizer.allowed(jnp.array(codes)))
        used, ended = lengths[codes].sum(-1, keepdims=True), (codes == END).any(-1, keepdims=True)
        fits = (used + lengths <= 8) & ~ended
        fits[:, END] = True
        np.testing.assert_array_equal(allowed, fits)
        logits = np.where(allowed, rng.gumbel(size=allowed.shape), -np.inf)
        codes = np.concatenate([codes, logits.argmax(-1)[:, None]], axis=1)
    assert (lengths[codes].sum(-1) <= 8).all()
    room = np.array(tokenizer.room(jnp.array(codes)))
    for j in range(SMALL.tokens):
        several = np.array(tokenizer.allowed(jnp.array(codes[:, :j]))).sum(-1) > 1
        np.testing.assert_array_equal(several, room[:, j] > 0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_encoded_chunks_pass_the_filter(seed: int) -> None:
    tokenizer = random_tokenizer(seed, SMALL)
    action = jnp.array(np.random.default_rng(seed).normal(size=(40, 8)), jnp.float32)
    codes = np.array(encode(tokenizer, action))
    for j in range(SMALL.tokens):
        allowed = np.array(tokenizer.allowed(jnp.array(codes[:, :j])))
        assert allowed[np.arange(40), codes[:, j]].all()


def test_the_same_chunks_give_the_same_tokenizer_and_its_shapes_follow_from_the_config(
    tokenizer: FastTokenizer,
) -> None:
    again = fast.fit(chunks(0), A, H, vocabulary=128, scale=SCALE)
    empty = FastTokenizer(FastConfig(**again.config.__dict__))
    shapes = nnx.eval_shape(lambda: FastTokenizer(again.config))
    models = (tokenizer, again, empty, shapes)
    states = [nnx.to_pure_dict(nnx.state(model)) for model in models]
    jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
    leaves = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in states]
    assert again.config == tokenizer.config and leaves[0] == leaves[2] == leaves[3]
    assert jax.tree.leaves(nnx.state(tokenizer, nnx.Param)) == []


def test_single_actions() -> None:
    """For one step the transform is the identity."""
    tokenizer = fast.fit(chunks(0).reshape(-1, A)[:300], A, 1, vocabulary=64, scale=SCALE)
    action = chunks(0).reshape(-1, A)[:300]
    assert np.abs(decode(tokenizer, encode(tokenizer, action)) - action).max() <= 0.0501


def test_fits_that_fail_or_are_trivial() -> None:
    with pytest.raises(UserError, match="scale: expected a positive number, found 0"):
        fast.fit(chunks(0), A, H, 128, 0.0)
    with pytest.raises(UserError, match=r"vocabulary: expected more than the \d+ integers.*lower"):
        fast.fit(chunks(0), A, H, 128, 100.0)
    still = fast.fit(np.zeros((5, H * A), np.float32), A, H, 128, SCALE)
    assert still.config.tokens == 1 and still.config.codes == 2 and still.config.merges == 0
    assert (decode(still, encode(still, chunks(0))) == 0).all()
