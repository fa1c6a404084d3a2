"""Wilson's interval, the summary of episodes and its table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_act.envs import Job
from mllm_act.envs.play import Episode
from mllm_act.envs.results import summarize, table, wilson


def test_known_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I: 81/263 and 15/148 by the score method."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_contains_the_rate_and_stays_within_zero_and_one(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))


def test_no_trials_give_the_whole_interval() -> None:
    assert wilson(0, 0) == (0, 1)


def test_more_successes_than_trials_are_an_error() -> None:
    with pytest.raises(ValueError, match="found 3 of 2"):
        wilson(3, 2)


def episodes() -> list[Episode]:
    """Task ``b`` before ``a``: one success in three episodes, two in two."""
    results = [("b", 7, False), ("b", 3, True), ("a", 4, True), ("b", 7, False), ("a", 6, True)]
    return [Episode(Job(task, i, 0), *result) for i, (task, *result) in enumerate(results)]


def test_summary_by_task_in_order_and_of_all() -> None:
    rows = summarize(episodes(), "all")
    assert [row["task"] for row in rows] == ["b", "a", "all"]
    assert [(row["successes"], row["episodes"]) for row in rows] == [(1, 3), (2, 2), (3, 5)]
    assert [row["steps_to_success"] for row in rows] == [3, 5, pytest.approx(13 / 3)]
    for row in rows:
        assert row["success"] == row["successes"] / row["episodes"]
        assert (row["low"], row["high"]) == wilson(row["successes"], row["episodes"])
    failed = [Episode(Job("a", 0, 0), 7, False)]
    assert summarize(failed)[-1] == summarize(failed)[0] | {"task": "mean"}
    assert summarize(failed)[0]["steps_to_success"] is None


def test_table_of_several_summaries() -> None:
    """A task that a summary lacks leaves its cell empty; different numbers of episodes are all listed."""
    rows = summarize(episodes())
    assert table({"rvq": rows, "vq": summarize(episodes()[:2])}).splitlines() == [
        "| task | rvq                | vq              | episodes |",
        "| ---- | ------------------ | --------------- | -------- |",
        "| b    | 33% (6% to 79%)    | 50% (9% to 91%) | 3, 2     |",
        "| a    | 100% (34% to 100%) |                 | 2        |",
        "| mean | 60% (23% to 88%)   | 50% (9% to 91%) | 5, 2     |",
    ]
