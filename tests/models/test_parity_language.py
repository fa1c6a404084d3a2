"""The language model against Transformers' Llama in PyTorch: float32, random weights, small sizes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.models import generate
from mllm_act.models.language import LanguageConfig, LanguageModel
from tests.models import hugging_face

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS = (9, 4, 1)  # of three texts
STEPS = 8


class Pair(NamedTuple):
    """The same model twice, and texts [B, N] padded on the right."""

    theirs: Any
    ours: LanguageModel
    tokens: np.ndarray


@pytest.fixture(
    scope="module",
    params=[(4, False, 1e4), (2, True, 1e5), (1, False, 5e5)],
    ids=["full heads, untied", "grouped heads, tied", "one key head, large theta"],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    kv_heads, tied, theta = request.param
    config = hugging_face.llama_config(kv_heads, tied=tied, theta=theta)
    theirs = hugging_face.randomized(transformers.LlamaForCausalLM(config))
    ours = LanguageModel(
        LanguageConfig(
            vocabulary=40, action_tokens=30, width=32, layers=3, heads=4, kv_heads=kv_heads,
            mlp_width=48, rope_theta=theta, tied=tied,
        ),
        "float32",
        nnx.Rngs(0),
    )  # fmt: skip
    hugging_face.put(ours, hugging_face.llama(theirs))
    return Pair(theirs, ours, np.random.default_rng(0).integers(0, 40, (3, max(LENGTHS))))


def padded(tokens: np.ndarray, left: tuple[bool, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Moves the texts of some rows to the right end, and returns what exists beside them."""
    rows, exists = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row, (length, at_end) in enumerate(zip(LENGTHS, left, strict=True)):
        place = slice(tokens.shape[1] - length, None) if at_end else slice(0, length)
        rows[row, place], exists[row, place] = tokens[row, :length], True
    return rows, exists


@nnx.jit
def logits(language: LanguageModel, tokens: jax.Array, exists: jax.Array) -> jax.Array:
    positions, mask = generate.layout(exists)
    hidden, _ = language(language.embed(tokens, jnp.dtype("float32")), positions, mask)
    return language.logits(hidden)


@pytest.mark.parametrize("left", [True, False], ids=["padded left", "padded right"])
def test_logits_equal_llamas_with_the_same_padding(pair: Pair, left: bool) -> None:
    tokens, exists = padded(pair.tokens, (left,) * 3)
    with torch.no_grad():
        expected = pair.theirs(torch.tensor(tokens), attention_mask=torch.tensor(exists).long())
    found = logits(pair.ours, jnp.array(tokens), jnp.array(exists))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[exists], expected.logits.numpy()[exists], atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(left=st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_padding_on_any_side_of_any_text_changes_nothing(
    pair: Pair, left: tuple[bool, ...]
) -> None:
    tokens, exists = padded(pair.tokens, left)
    found = logits(pair.ours, jnp.array(tokens), jnp.array(exists))
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            alone = pair.theirs(torch.tensor(pair.tokens[row : row + 1, :length])).logits[0]
        np.testing.assert_allclose(found[row][exists[row]], alone.numpy(), atol=1e-4)


def test_generation_with_our_cache_equals_generation_with_theirs(pair: Pair) -> None:
    """Theirs takes padding on the left alone; ours takes it on either side."""
    tokens, exists = padded(pair.tokens, (True,) * 3)
    expected = pair.theirs.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(exists).long(), max_new_tokens=STEPS,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    written = expected.sequences[:, tokens.shape[1] :].numpy()
    assert len(np.unique(written)) > 3  # no text that says one word for ever
    decode = nnx.jit(generate.decode, static_argnames="steps")
    for left in (True, False):
        tokens, exists = padded(pair.tokens, (left,) * 3)
        x = pair.ours.embed(jnp.array(tokens), jnp.dtype("float32"))
        found, chosen_by = decode(pair.ours, x, jnp.array(exists), steps=STEPS)
        np.testing.assert_array_equal(found, written)
        np.testing.assert_allclose(
            chosen_by.swapaxes(0, 1), torch.stack(expected.logits).numpy(), atol=1e-4
        )
