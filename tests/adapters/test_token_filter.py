"""The filter: whatever the valid sequences and the logits, what comes out is valid and the probabilities are right."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.adapters.token_filter import Trie, choose, filtered_log_softmax
from tests.adapters.discrete import D, V, extend, language, rows, teacher_forced

pytestmark = pytest.mark.slow

END = V - 1
# Of unequal length, one the beginning of another or not, with the end's token inside or not.
SEQUENCES = st.lists(
    st.lists(st.sampled_from([0, 3, 4, 7]), min_size=1, max_size=3).map(tuple),
    min_size=1,
    max_size=6,
    unique=True,
).map(tuple)


def filled_up(sequences: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    longest = max(map(len, sequences))
    return [s + (END,) * (longest - len(s)) for s in sequences]


@settings(max_examples=60, deadline=None)
@given(sequences=SEQUENCES)
def test_a_trie_allows_what_continues_some_sequence_and_nothing_else(
    sequences: tuple[tuple[int, ...], ...],
) -> None:
    whole = filled_up(sequences)
    trie = Trie(tuple(whole))
    assert set(trie.candidates) == {token for s in whole for token in s}
    assert len(trie.follow) == len({s[:j] for s in whole for j in range(len(s))})
    for s in whole:
        node = 0
        for j, token in enumerate(s):
            after = {other[j] for other in whole if other[:j] == s[:j]}
            assert set(trie.candidates[trie.follow[node] >= 0]) == after
            assert len(after) == 1 or j in trie.decisions
            node = trie.follow[node, np.searchsorted(trie.candidates, token)]


@settings(max_examples=25, deadline=None)
@given(
    sequences=SEQUENCES,
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e30, float("inf"), float("nan")]),
)
def test_whatever_the_trie_and_the_logits_only_listed_actions_come_out(
    sequences: tuple[tuple[int, ...], ...], seed: int, scale: float
) -> None:
    """Logits of any size, infinite and no numbers too; greedy and sampled; what is decoded encodes to the same."""
    adapter = language(sequences, END)
    key = jax.random.key(seed)

    @jax.jit
    def act(embedding: jax.Array, head: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        lent, hidden = adapter.with_rows(embedding, head), jax.random.normal(key, (5, D))
        both = [lent.sample(hidden, jnp.zeros((5, 0)), extend, hidden, k) for k in (None, key)]
        tokens = jnp.concatenate(both)
        return tokens, lent.decode(tokens), lent.encode(lent.decode(tokens))

    tokens, action, again = map(np.array, act(*rows(seed, scale), key))
    assert set(map(tuple, tokens.tolist())) <= set(filled_up(sequences))
    assert (action[:, 0] >= 0).all() and (action[:, 0] < len(sequences)).all()
    np.testing.assert_array_equal(again, tokens)


@settings(max_examples=25, deadline=None)
@given(sequences=SEQUENCES, seed=st.integers(0, 2**16), scale=st.floats(0.1, 10))
def test_probabilities_of_all_actions_sum_to_one_along_the_paths_of_the_trie(
    sequences: tuple[tuple[int, ...], ...], seed: int, scale: float
) -> None:
    """Every sequence of every token is tried: those of actions share all probability, the others have none."""
    adapter, whole = language(sequences, END), filled_up(sequences)
    embedding, head = rows(seed, scale)
    every = list(itertools.product([0, 3, 4, 7, END, 1], repeat=len(whole[0])))  # 1 is in none
    first = jax.random.normal(jax.random.key(seed), (D,))

    @jax.jit
    def score(embedding: jax.Array, head: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
        lent = adapter.with_rows(embedding, head)
        hidden = teacher_forced(first, lent.embed(tokens))
        return hidden[0], lent.log_prob(hidden, tokens)[0], lent.decode(tokens)[0, :, 0]

    hidden, log_prob, action = map(np.array, score(embedding, head, jnp.array(every)[None]))
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1.0, rtol=1e-4)
    rows64 = np.array(head, np.float64)
    for i, sequence in enumerate(every):
        if sequence not in whole:
            assert np.isneginf(log_prob[i]) and action[i] == -1
            continue
        path = 0.0
        for j, token in enumerate(sequence):
            after = sorted({other[j] for other in whole if other[:j] == sequence[:j]})
            logits = rows64[after] @ hidden[i, j]
            path += logits[after.index(token)] - np.logaddexp.reduce(logits)
        np.testing.assert_allclose(log_prob[i], path, rtol=1e-3, atol=1e-3)
        assert action[i] == whole.index(sequence)


def test_draws_follow_the_log_probabilities() -> None:
    adapter = language([(3,), (3, 4), (3, 4, 0), (7, 0)]).with_rows(*rows(0))
    first = jax.random.normal(jax.random.key(1), (D,))
    tokens = adapter.encode(jnp.arange(4.0)[None, :, None])
    log_prob = adapter.log_prob(teacher_forced(first, adapter.embed(tokens)), tokens)[0]
    many = jnp.broadcast_to(first, (20_000, D))
    drawn = adapter.decode(
        adapter.sample(many, jnp.zeros((len(many), 0)), extend, many, jax.random.key(2))
    )
    share = np.bincount(np.array(drawn[:, 0], int), minlength=4) / len(many)
    np.testing.assert_allclose(share, np.exp(log_prob), atol=4 * 0.5 / len(many) ** 0.5)


def test_the_filter_is_look_ups_in_a_compiled_program() -> None:
    """One program for all actions: no call to the host, and no loop whose length the data set."""
    adapter = language([(3,), (3, 4), (3, 4, 0), (7, 0)])

    def act(embedding: jax.Array, head: jax.Array, hidden: jax.Array, key: jax.Array) -> jax.Array:
        lent = adapter.with_rows(embedding, head)
        return lent.decode(lent.sample(hidden, jnp.zeros((len(hidden), 0)), extend, hidden, key))

    hidden, key = jnp.ones((2, D)), jax.random.key(0)
    traced = str(jax.make_jaxpr(act)(*rows(0), hidden, key))
    assert "while" not in traced and "callback" not in traced
    jitted = jax.jit(act)(*rows(0), hidden, key)
    np.testing.assert_array_equal(jitted, act(*rows(0), hidden, key))


def test_only_the_candidates_rows_of_the_head_are_computed() -> None:
    adapter = language([(3,), (3, 4), (7, 0)])
    lent = adapter.with_rows(*rows(0))
    assert lent.head is not None and lent.head.shape == (5, D)
    assert adapter.allowed(jnp.zeros((1, 0), int)).shape == (1, 5)


def test_choosing_agrees_with_the_distribution() -> None:
    rng = np.random.default_rng(0)
    logits, allowed = jnp.array(rng.normal(size=(50, 8))), jnp.array(rng.random((50, 8)) < 0.5)
    allowed = allowed.at[:, 3].set(True)
    np.testing.assert_array_equal(
        choose(logits, allowed), filtered_log_softmax(logits, allowed).argmax(-1)
    )
    nowhere = jnp.full((50, 8), -jnp.inf)
    assert allowed[jnp.arange(50), choose(nowhere, allowed, jax.random.key(0))].all()
