"""Mixtures: the share of each dataset in a batch, and the batches themselves."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_pipelines.reading.mixture import MixedBatches, shares
from data_pipelines.reading.pipeline import TrainBatches
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError
from tests.data_pipelines import tiny_rlds

pytestmark = pytest.mark.slow

ACTIONS = {"arm": 4, "hand": 7}

weights_of = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.floats(1e-3, 1e3), min_size=1, max_size=6
)


@given(weights_of, st.integers(1, 40))
def test_shares_are_positive_and_in_order_of_weight(
    weights: dict[str, float], batch_size: int
) -> None:
    assume(batch_size >= len(weights))
    result = shares(weights, batch_size)
    assert list(result) == list(weights) and sum(result.values()) == batch_size
    assert min(result.values()) > 0
    for a in weights:
        for b in weights:
            assert weights[a] <= weights[b] or result[a] >= result[b]


@given(weights_of, st.integers(1, 40))
def test_shares_are_proportional_within_one_window(
    weights: dict[str, float], batch_size: int
) -> None:
    """The exact shares are c * weight, or one window if that is less; c by bisection."""
    assume(batch_size >= len(weights))
    result = shares(weights, batch_size)
    low, high = 0.0, batch_size / min(weights.values())
    for _ in range(200):
        c = (low + high) / 2
        above = sum(max(1.0, c * weight) for weight in weights.values()) > batch_size
        low, high = (low, c) if above else (c, high)
    for name, weight in weights.items():
        assert abs(result[name] - max(1.0, low * weight)) < 1 + 1e-6


@given(weights_of, st.randoms())
def test_shares_do_not_depend_on_the_order(weights: dict[str, float], random: Any) -> None:
    names = list(weights)
    random.shuffle(names)
    again = shares({name: weights[name] for name in names}, 16)
    assert again == shares(weights, 16)


@pytest.mark.parametrize(
    ("weights", "batch_size", "expected"),
    [
        ({"a": 1, "b": 1}, 8, {"a": 4, "b": 4}),
        ({"a": 0.1, "b": 0.3}, 8, {"a": 2, "b": 6}),
        ({"a": 1, "b": 2}, 32, {"a": 11, "b": 21}),
        ({"a": 1, "b": 1, "c": 1}, 8, {"a": 3, "b": 3, "c": 2}),
        ({"a": 1000, "b": 1, "c": 1}, 32, {"a": 30, "b": 1, "c": 1}),
        ({"a": 1e300, "b": 1e-300}, 2, {"a": 1, "b": 1}),
        ({"a": 2.5}, 6, {"a": 6}),
    ],
)
def test_shares_by_hand(
    weights: dict[str, float], batch_size: int, expected: dict[str, int]
) -> None:
    assert shares(weights, batch_size) == expected


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf, None, "much", True])
def test_invalid_weight(weight: Any) -> None:
    with pytest.raises(UserError, match=r"config\.mixture\.hand\.weight: expected .* above 0"):
        shares({"arm": 1.0, "hand": weight}, 8)


@pytest.mark.parametrize(("names", "batch_size", "fix"), [("ab", 1, "pass 2"), ("", 0, "pass 1")])
def test_batch_too_small(names: str, batch_size: int, fix: str) -> None:
    with pytest.raises(UserError, match=f"config.data.batch_size: .* {fix}"):
        shares(dict.fromkeys(names, 1.0), batch_size)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rlds")
    lengths = {"arm": [[4, 1], [7, 3]], "hand": [[2, 5]]}
    return {
        name: tiny_rlds.write_lengths(folder / name, lengths[name], action_dim=dimensions)
        for name, dimensions in ACTIONS.items()
    }


def part(directory: Path, **changes: Any) -> TrainBatches:
    more = {"batch_size": 4, "context": 3, "seed": 0, "shuffle_megabytes": 1, **changes}
    return TrainBatches(open_dataset(directory), "train", **more)


def mixed(directories: dict[str, Path]) -> MixedBatches:
    arm, hand = part(directories["arm"], chunk=2), part(directories["hand"], batch_size=2)
    return MixedBatches({"arm": arm, "hand": hand})


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(tf.nest.flatten(tf.nest.map_structure(np.array_equal, left, right)))


def test_each_keeps_its_own_order_sizes_and_chunk(directories: dict[str, Path]) -> None:
    together = mixed(directories)
    alone = {
        "arm": part(directories["arm"], chunk=2),
        "hand": part(directories["hand"], batch_size=2),
    }
    for _ in range(6):
        batch = next(together)
        assert batch["arm"]["action"].shape == (4, 3, 2 * 4)
        assert batch["hand"]["action"].shape == (2, 3, 7)
        assert same(batch, {name: next(batches) for name, batches in alone.items()})
    assert together.host_memory_megabytes == sum(
        batches.host_memory_megabytes for batches in alone.values()
    )


@pytest.mark.parametrize("taken", [0, 1, 6])  # 6 batches are more than an epoch of either
def test_restored_mixture_continues_bit_for_bit(directories: dict[str, Path], taken: int) -> None:
    whole = mixed(directories)
    for _ in range(taken):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    resumed = mixed(directories)
    resumed.restore(state)
    assert resumed.state() == state
    for _ in range(4):
        assert same(next(whole), next(resumed))
        assert whole.state() == resumed.state()


def test_restore_rejects_other_datasets(directories: dict[str, Path]) -> None:
    state = mixed(directories).state()
    with pytest.raises(UserError, match="state: expected the datasets arm, hand .* found arm;"):
        MixedBatches({"arm": part(directories["arm"])}).restore(state)
    with pytest.raises(UserError, match="expected the datasets .*fingerprint.* found arm, hand;"):
        mixed(directories).restore(state["arm"])  # of a run without a mixture
    swapped = {"arm": state["hand"], "hand": state["arm"]}
    with pytest.raises(UserError, match="^arm: data iterator state: fingerprint: expected"):
        mixed(directories).restore(swapped)


def test_mixture_of_nothing() -> None:
    with pytest.raises(UserError, match="config.mixture: expected at least one dataset"):
        MixedBatches({})


def test_more_memory_than_the_host_has(directories: dict[str, Path]) -> None:
    """Each of them fits, all together do not."""
    hand = part(directories["hand"])
    hand.host_memory_megabytes = 10**9
    with pytest.raises(UserError, match="expected to need at most the host's"):
        MixedBatches({"arm": part(directories["arm"]), "hand": hand})
