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
from tests.models import hugging_face, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS, ROOM = (9, 4, 1), 11  # of three texts
SIDES = {"padded right": (0, 0, 0), "padded left": tuple(ROOM - length for length in LENGTHS)}
STEPS = 8


class Pair(NamedTuple):
    """The same model twice, texts, and their logits for each text by itself."""

    theirs: Any
    ours: LanguageModel
    texts: list[np.ndarray]
    alone: list[np.ndarray]


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
            mlp_width=48, rope_theta=theta, tied=tied, epsilon=hugging_face.EPSILON,
        ),
        "float32",
        nnx.Rngs(0),
    )  # fmt: skip
    hugging_face.put(ours, hugging_face.llama(theirs))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 40, length) for length in LENGTHS]
    with torch.no_grad():
        alone = [theirs(torch.tensor(text)[None]).logits[0].numpy() for text in texts]
    return Pair(theirs, ours, texts, alone)


def padded(texts: list[np.ndarray], starts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Puts each text at a place in a row of ``ROOM``, and returns what exists beside the rows."""
    rows, exists = np.zeros((len(texts), ROOM), int), np.zeros((len(texts), ROOM), bool)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        place = slice(start, start + len(text))
        rows[row, place], exists[row, place] = text, True
    return rows, exists


@tiny.jit
def logits(language: LanguageModel, tokens: jax.Array, exists: jax.Array) -> jax.Array:
    positions, mask = generate.layout(exists)
    hidden, _ = language(language.embed(tokens, jnp.dtype("float32")), positions, mask)
    return language.logits(hidden)


@tiny.jit
def decode(language: LanguageModel, x: jax.Array, exists: jax.Array) -> tuple[jax.Array, jax.Array]:
    return generate.decode(language, x, exists, STEPS)


@pytest.mark.parametrize("side", SIDES)
def test_logits_equal_llamas_with_the_same_padding(pair: Pair, side: str) -> None:
    tokens, exists = padded(pair.texts, SIDES[side])
    with torch.no_grad():
        expected = pair.theirs(torch.tensor(tokens), attention_mask=torch.tensor(exists).long())
    found = logits(pair.ours, jnp.array(tokens), jnp.array(exists))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[exists], expected.logits.numpy()[exists], atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(starts=st.tuples(*(st.integers(0, ROOM - length) for length in LENGTHS)))
def test_padding_on_any_side_of_any_text_changes_nothing(
    pair: Pair, starts: tuple[int, ...]
) -> None:
    tokens, exists = padded(pair.texts, starts)
    found = logits(pair.ours, jnp.array(tokens), jnp.array(exists))
    for row, expected in enumerate(pair.alone):
        np.testing.assert_allclose(found[row][exists[row]], expected, atol=1e-4)


def test_generation_with_our_cache_equals_generation_with_theirs(pair: Pair) -> None:
    """Theirs takes padding on the left alone; ours takes it on either side."""
    tokens, exists = padded(pair.texts, SIDES["padded left"])
    expected = pair.theirs.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(exists).long(), max_new_tokens=STEPS,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    written = expected.sequences[:, tokens.shape[1] :].numpy()
    assert len(np.unique(written)) > 3  # no text that says one word for ever
    for starts in SIDES.values():
        tokens, exists = padded(pair.texts, starts)
        x = pair.ours.embed(jnp.array(tokens), jnp.dtype("float32"))
        found, chosen_by = decode(pair.ours, x, jnp.array(exists))
        np.testing.assert_array_equal(found, written)
        np.testing.assert_allclose(
            chosen_by.swapaxes(0, 1), torch.stack(expected.logits).numpy(), atol=1e-4
        )
