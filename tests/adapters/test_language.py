"""SemLang and Lang: the model's own rows, in a real model; sequences of any length; what cannot be is refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mllm_act.adapters import action_words
from mllm_act.adapters.action_words import digit_sequences
from mllm_act.adapters.language import Language
from mllm_act.errors import UserError
from mllm_act.models.language import LanguageConfig
from mllm_act.models.mllm import MLLM
from mllm_act.policy import prompt
from tests.adapters.discrete import D, V, extend, language, rows, statistics
from tests.models import tiny

BABYAI = ("left", "right", "forward", "pick", "drop", "toggle")
TEMPLATE = "Prompt: use left, right, forward and pick. USER: {instruction} ASSISTANT: "
DIGITS = tuple(range(20, 30))

# Of tiny.mllm's 32 ids; the first is the beginning of the second, and the end's token is inside the last.
ACTIONS = [(5,), (5, 6), (7, 8, 9), (7, 8, 10), (5, 31, 9)]
END = 31


def tokenizer_json() -> str:
    return prompt.train_text_tokenizer([TEMPLATE, "go to the red ball", "pick up the key"], 320)


def lent(adapter: Language, mllm: MLLM) -> Language:
    head = mllm.language.embedding if mllm.language.head is None else mllm.language.head
    return adapter.with_rows(mllm.language.embedding[...], head[...])


def make() -> Language:
    names = [f"action {i}" for i in range(len(ACTIONS))]
    return Language(statistics(0, len(names) - 1), names, ACTIONS, END, 32)


def loss_of(adapter: Language, mllm: MLLM, tokens: jax.Array, inputs: dict[str, Any]) -> jax.Array:
    """The teacher-forced loss of action tokens at every step, as a policy computes it."""
    adapter = lent(adapter, mllm)
    hidden = mllm(**{**inputs, "fed": adapter.embed(tokens)[..., :-1, :]})
    return adapter.loss(hidden, tokens, inputs["step_mask"], jnp.zeros((tiny.B, tiny.T, 0)))[0]


@pytest.mark.parametrize("tied", [True, False])
def test_decoding_with_a_model_is_its_own_head_under_the_filter(tied: bool) -> None:
    """Each token is the likeliest of the whole vocabulary's logits that continues some action; cached or not."""
    sizes = LanguageConfig(
        vocabulary=32, action_tokens=16, width=tiny.D, layers=2, heads=4, kv_heads=2, mlp_width=48, tied=tied
    )  # fmt: skip
    adapter, mllm, inputs = make(), tiny.mllm(language=sizes), tiny.sequence(fed=0)

    def act(mllm: MLLM, prompt: Any, prompt_mask: Any, latents: Any, step_mask: Any) -> jax.Array:
        fed = jnp.zeros((tiny.B, tiny.T, 0, tiny.D))
        hidden, state = mllm.prefill(mllm.read(prompt, prompt_mask), latents, step_mask, fed)
        return lent(adapter, mllm).sample(hidden, jnp.zeros((tiny.B, 0)), mllm.extend, state)

    keys = ("prompt", "prompt_mask", "latents", "step_mask")
    tokens = np.array(tiny.jit(act)(mllm, *(inputs[key] for key in keys)))

    every_step = jnp.broadcast_to(jnp.array(tokens)[:, None], (tiny.B, tiny.T, 3))
    fed = mllm.language.embed(every_step, jnp.float32)[..., :-1, :]
    forward = tiny.jit(lambda mllm, inputs: mllm.language.logits(mllm(**inputs)))
    logits = np.array(forward(mllm, {**inputs, "fed": fed}))[:, -1]
    whole = [sequence + (END,) * (3 - len(sequence)) for sequence in ACTIONS]
    for b in range(tiny.B):
        for j in range(3):
            after = sorted({s[j] for s in whole if s[:j] == tuple(tokens[b, :j])})
            assert tokens[b, j] == after[logits[b, j, after].argmax()]


def test_the_models_rows_learn_where_the_model_does_and_the_adapter_has_no_parameters() -> None:
    adapter, mllm, inputs = make(), tiny.mllm(), tiny.sequence(fed=0)
    assert jax.tree.leaves(adapter) == []
    tokens = adapter.encode(jnp.arange(9.0).reshape(tiny.B, tiny.T, 1) % len(ACTIONS))
    inputs["prompt"] = jnp.zeros_like(
        inputs["prompt"]
    )  # so that no prompt touches the actions' rows

    def gradient(mllm: MLLM, inputs: Any) -> Any:
        return nnx.grad(lambda m: loss_of(adapter, m, tokens, inputs))(mllm)

    found = tiny.jit(gradient)(mllm, inputs)
    moved = np.flatnonzero(np.abs(found["language"]["head"][...]).sum(-1))
    # Where nothing else can follow, nothing is to be learnt.
    np.testing.assert_array_equal(moved, [5, 6, 7, 9, 10, 31])
    fed = np.flatnonzero(np.abs(found["language"]["embedding"][...]).sum(-1))
    np.testing.assert_array_equal(fed, [0, 5, 7, 8, 31])


def test_the_model_is_run_only_while_something_is_open() -> None:
    """After the last open place the tokens are known: "toggle" costs no further pass for its second token."""
    runs = []

    def extend(embedding: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        runs.append(embedding.shape)
        return embedding, state

    for sequences, expected in (
        ([(1,), (2,), (3, 4, 5)], 0),
        ([(1,), (1, 2), (3, 4, 5)], 1),
        ([(1, 2)], 0),
    ):
        runs.clear()
        adapter = language(sequences).with_rows(*rows(0))
        tokens = adapter.sample(jnp.ones((2, D)), jnp.zeros((2, 0)), extend, None)
        assert tokens.shape == (2, adapter.tokens_per_action) and len(runs) == expected


def test_masked_steps_do_not_count_and_the_loss_is_the_mean_log_probability() -> None:
    adapter = language([(1,), (1, 2), (3, 4, 5)]).with_rows(*rows(0))
    hidden = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 3, D)), jnp.float32)
    tokens = adapter.encode(jnp.arange(8.0).reshape(2, 4, 1) % 3)
    mask = jnp.arange(4) < jnp.array([[2], [4]])
    loss, metrics = adapter.loss(hidden, tokens, mask, jnp.zeros((2, 4, 0)))
    other = jnp.where(mask[..., None, None], hidden, 7.0)
    assert loss == adapter.loss(other, tokens, mask, jnp.zeros((2, 4, 0)))[0]
    log_prob = adapter.log_prob(hidden, tokens)
    np.testing.assert_allclose(loss, -log_prob[mask].mean() / 3, rtol=1e-5)
    assert sorted(metrics) == [f"token_accuracy_{j}" for j in range(3)]


def test_an_action_that_is_in_no_list_is_not_taken_for_another() -> None:
    adapter = language([(1,), (1, 2), (3, 4)]).with_rows(*rows(0))
    tokens = adapter.encode(jnp.array([[[3.0], [-1.0]]]))
    assert (tokens == -1).all() and (adapter.decode(tokens) == -1).all()
    hidden = jnp.ones((1, 2, 2, D))
    assert adapter.loss(hidden, tokens, jnp.ones((1, 2), bool), jnp.zeros((1, 2, 0)))[0] == jnp.inf


def test_in_bfloat16_logits_are_summed_in_float32() -> None:
    """The hidden state and the rows are rounded, the logits are not: they would tie."""
    adapter = language([(0,), (1,), (2,), (3,), (4,)])
    embedding, head = rows(0)
    held = head.astype(jnp.bfloat16)
    hidden = jax.random.normal(jax.random.key(0), (256, D)).astype(jnp.bfloat16)
    tokens = adapter.encode(jnp.zeros((256, 1, 1)))
    found = adapter.with_rows(embedding, held).log_prob(hidden[:, None, None], tokens)
    wide = adapter.with_rows(embedding, held.astype(jnp.float32))
    expected = wide.log_prob(hidden.astype(jnp.float32)[:, None, None], tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_words_and_digits_of_the_models_tokenizer() -> None:
    """SemLang says the words, Lang as many digits of an action's own; both go through a real vocabulary."""
    text = tokenizer_json()
    words, end = action_words.words(text, BABYAI), action_words.end(text)
    tokenizer = Tokenizer.from_str(text)
    assert [tokenizer.decode(ids) for ids in words] == list(BABYAI)
    assert max(map(len, words)) > min(map(len, words))  # "toggle" is in none of the texts
    digits = digit_sequences(BABYAI, words, action_words.digits(text))
    assert list(map(len, digits)) == list(map(len, words))
    said = [tokenizer.decode(ids) for ids in digits]
    assert all(one.isdigit() for one in said) and len(set(said)) == len(BABYAI)
    for sequences in (words, digits):
        adapter = Language(statistics(0, 5), BABYAI, sequences, end, 320)
        index = jnp.arange(6.0)[:, None]
        np.testing.assert_array_equal(adapter.decode(adapter.encode(index)), index)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=30))
def test_lang_is_injective_and_prefix_free_where_it_can_be(lengths: list[int]) -> None:
    names = [str(i) for i in range(len(lengths))]
    find = partial(digit_sequences, names, [(0,) * n for n in lengths], DIGITS)
    if lengths.count(1) > 10:
        with pytest.raises(UserError, match="at most 10 actions of 1 tokens"):
            find()
        return
    found = find()
    assert [len(s) for s in found] == lengths and len(set(found)) == len(found)
    assert {token for s in found for token in s} <= set(DIGITS)
    if sum(10.0**-n for n in lengths) < 1:
        begins = [(a, b) for a in found for b in found if a != b and b[: len(a)] == a]
        assert begins == []


@pytest.mark.parametrize(
    ("names", "sequences", "message"),
    [
        (("go", "stop"), [(1,), ()], "'stop', which has no token"),
        (("go", "stop", "halt"), [(1,), (2, 3), (2, 3)], r"'stop' and 'halt', both \[2, 3\]"),
        (("go", "go\n"), [(1,), (1, V - 1)], r"'go' and 'go\\n'"),
        (("go", "stop"), [(1,), (V,)], f"below {V}, the model's vocabulary, found {V} in 'stop'"),
        ((), [], "found none"),
    ],
)
def test_sequences_that_cannot_stand_for_actions_are_refused(
    names: tuple[str, ...], sequences: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Language(statistics(), names, sequences, V - 1, V)


@pytest.mark.parametrize(("low", "high"), [(0, 2), (-1, 1)])
def test_an_action_outside_the_list_is_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match=f"from 0 to 1 .*go, stop.*found {low} to {high}"):
        Language(statistics(low, high), ("go", "stop"), [(1,), (2,)], V - 1, V)


def test_words_without_a_token_and_vocabularies_without_digits_are_refused() -> None:
    text = Tokenizer(models.BPE({"g": 0, "o": 1, "1": 2}, [])).to_str()
    assert action_words.words(text, ("go", "jump")) == ((0, 1), ())
    with pytest.raises(UserError, match="found none of 0, 2, 3, 4, 5, 6, 7, 8, 9; choose adapter"):
        action_words.digits(text)
    with pytest.raises(UserError, match="newline"):
        action_words.end(text)


def test_without_the_filter_any_token_may_follow() -> None:
    free = Language(statistics(0, 1), ["a", "b"], [(3,), (4, 5)], 9, V, filter=False)
    adapter = free.with_rows(*rows(0))
    keys = jax.random.split(jax.random.key(0), 200)
    hidden = jax.random.normal(jax.random.key(1), (200, D))
    tokens = adapter.sample(hidden, jnp.zeros((200, 0)), extend, hidden, keys)
    assert set(np.unique(tokens)) == set(range(V))
    assert (adapter.decode(tokens) == -1).mean() > 0.8  # 2 of 144 pairs are actions
    assert adapter.decode(jnp.array([[3, 9], [4, 5]])).tolist() == [[0.0], [1.0]]
    log_probs, column = adapter.log_probs(hidden[:, None, None].repeat(2, 2), tokens[:, None])
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(column[:, 0], tokens)
