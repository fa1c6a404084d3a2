"""The running scale of rewards, against all returns at once."""

import json

import numpy as np
import pytest

from mllm_act.rl.returns import ReturnScale
from mllm_act.rl.segments import Grid

STEPS, COUNT, DISCOUNT = 6, 3, 0.9


def rollouts(number: int) -> list[Grid]:
    rng, grids = np.random.default_rng(0), []
    for _ in range(number):
        grid = Grid.empty(STEPS, COUNT)
        grid.rewards[:] = rng.normal(2, 5, grid.rewards.shape)
        grid.over[:] = rng.random(grid.over.shape) < 0.3
        grid.exists[:] = rng.random(grid.exists.shape) < 0.9
        grids.append(grid)
    return grids


def all_returns(grids: list[Grid]) -> np.ndarray:
    found = []
    for slot in range(COUNT):
        earned = 0.0
        for grid in grids:  # episodes go on from one rollout to the next
            for step in range(STEPS):
                earned = DISCOUNT * earned + grid.rewards[step, slot]
                if grid.exists[step, slot]:
                    found.append(earned)
                if grid.over[step, slot]:
                    earned = 0.0
    return np.array(found)


def test_is_one_over_the_standard_deviation_of_all_returns_so_far() -> None:
    grids, scale = rollouts(4), ReturnScale(COUNT, DISCOUNT)
    for number, grid in enumerate(grids, 1):
        expected = 1 / all_returns(grids[:number]).std()
        assert scale.update(grid) == pytest.approx(expected, rel=1e-5)


def test_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    *first, last = rollouts(3)
    scale = ReturnScale(COUNT, DISCOUNT)
    for grid in first:
        scale.update(grid)
    resumed = ReturnScale(COUNT, DISCOUNT, json.loads(json.dumps(scale.state())))
    assert resumed.update(last) == scale.update(last)
    assert resumed.state() == scale.state()


def test_without_any_reward_it_is_one() -> None:
    grid = Grid.empty(STEPS, COUNT)
    assert ReturnScale(COUNT, DISCOUNT).update(grid) == 1.0
    grid.exists[:] = True
    assert ReturnScale(COUNT, DISCOUNT).update(grid) == 1.0
