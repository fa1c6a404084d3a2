"""Acting with chunks against lists in plain Python, kept for each step of time as ACT's evaluation keeps them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.policy import chunks
from mllm_act.policy.chunks import Plan

Decide = Callable[[Plan, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Plan]]


def stepper(decay: float | None) -> Decide:
    @jax.jit
    def step(plan: Plan, new: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array, Plan]:
        plan = chunks.forget(plan, first)
        due = chunks.due(plan)
        action, plan = chunks.take(chunks.push(plan, new, due), decay)
        return action, due, plan

    return step


class Queue:
    """One episode whose chunks are carried out one after the other."""

    def __init__(self) -> None:
        self.left: list[np.ndarray] = []

    def act(self, new: np.ndarray) -> tuple[np.ndarray, bool]:
        due = not self.left
        if due:
            self.left = list(new)
        return self.left.pop(0), due


class Ensemble:
    """One episode with temporal ensembling: what was said of each step of time, the oldest first."""

    def __init__(self, decay: float) -> None:
        self.decay, self.said, self.now = decay, {}, 0

    def act(self, new: np.ndarray) -> tuple[np.ndarray, bool]:
        for ahead, action in enumerate(new):
            self.said.setdefault(self.now + ahead, []).append(action.astype(np.float64))
        said = np.array(self.said[self.now])
        weights = np.exp(-self.decay * np.arange(len(said)))
        self.now += 1
        return (said * (weights / weights.sum())[:, None]).sum(axis=0), True


def play(
    firsts: np.ndarray, chunk: int, actions: int, decay: float | None, seed: int
) -> tuple[list[tuple], list[tuple]]:
    """What the plan and what the lists say at each step: actions [B, A] and due [B]."""
    random, batch = np.random.default_rng(seed), firsts.shape[1]
    episode = Queue if decay is None else lambda: Ensemble(decay)
    plan, lists = chunks.start(batch, chunk, actions, decay is not None), [None] * batch
    step, found, expected = stepper(decay), [], []
    for first in firsts:
        new = random.normal(size=(batch, chunk, actions)).astype(np.float32)
        lists = [episode() if begins else one for begins, one in zip(first, lists, strict=True)]
        acted = [one.act(said) for one, said in zip(lists, new, strict=True)]
        expected.append(tuple(np.array(part) for part in zip(*acted, strict=True)))
        action, due, plan = step(plan, new.reshape(batch, -1), first)
        assert action.dtype == jnp.float32
        found.append((np.asarray(action), np.asarray(due)))
    assert step._cache_size() == 1  # compiled once, whatever begins or is due
    return found, expected


@st.composite
def begins(draw: st.DrawFn) -> np.ndarray:
    """bool[steps, B], all True at the first step."""
    steps, batch = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rows = st.lists(st.sampled_from([False, False, False, True]), min_size=batch, max_size=batch)
    firsts = np.array(draw(st.lists(rows, min_size=steps, max_size=steps)))
    firsts[0] = True
    return firsts


@settings(max_examples=20, deadline=None)
@given(begins(), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_one_after_the_other_is_a_queue_to_the_bit(
    firsts: np.ndarray, chunk: int, actions: int, seed: int
) -> None:
    for found, expected in zip(*play(firsts, chunk, actions, None, seed), strict=True):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


@settings(max_examples=20, deadline=None)
@given(begins(), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99), st.floats(-1, 3))
def test_ensembling_is_the_mean_over_lists(
    firsts: np.ndarray, chunk: int, actions: int, seed: int, decay: float
) -> None:
    for found, expected in zip(*play(firsts, chunk, actions, decay, seed), strict=True):
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
        assert found[1].all()


@pytest.mark.parametrize("decay", [None, 0.01])
def test_chunk_of_one_is_the_decision_to_the_bit(decay: float | None) -> None:
    step, plan = stepper(decay), chunks.start(2, 1, 3, ensembling=decay is not None)
    for number in range(5):
        new = np.random.default_rng(number).normal(size=(2, 3)).astype(np.float32)
        action, due, plan = step(plan, new, np.array([number == 0, number == 3]))
        np.testing.assert_array_equal(action, new)
        assert due.all()


def test_weights_of_the_oldest_and_the_newest() -> None:
    """Two chunks of two actions: the second step is said 1 by the older, 2 by the newer."""
    step, plan = stepper(0.01), chunks.start(1, 2, 1, ensembling=True)
    action, _, plan = step(plan, np.array([[0.0, 1.0]]), np.array([True]))
    assert action.tolist() == [[0.0]]  # alone: to the bit
    action, _, plan = step(plan, np.array([[2.0, 9.0]]), np.array([False]))
    newer = np.exp(-0.01)
    np.testing.assert_allclose(action, [[(1 + 2 * newer) / (1 + newer)]], rtol=1e-6)


def test_index_of_a_discrete_action_passes() -> None:
    step, plan = stepper(None), chunks.start(1, 3, 1, ensembling=False)
    indices = np.array([[6.0, 0.0, 2.0]], np.float32)
    for expected in (6.0, 0.0, 2.0, 6.0):
        action, _, plan = step(plan, indices, np.array([False]))
        assert action.tolist() == [[expected]]


def test_what_is_not_a_number_goes_with_its_episode() -> None:
    step, plan = stepper(0.01), chunks.start(1, 3, 1, ensembling=True)
    action, _, plan = step(plan, np.full((1, 3), np.nan, np.float32), np.array([True]))
    assert np.isnan(action).all()
    action, _, plan = step(plan, np.ones((1, 3), np.float32), np.array([True]))
    assert action.tolist() == [[1.0]]


def test_a_negative_decay_favours_the_newest_of_many() -> None:
    step, plan = stepper(-5.0), chunks.start(1, 40, 1, ensembling=True)
    for number in range(50):
        new = np.full((1, 40), number, np.float32)
        action, _, plan = step(plan, new, np.array([number == 0]))
    np.testing.assert_allclose(action, [[49.0]], atol=0.01)
