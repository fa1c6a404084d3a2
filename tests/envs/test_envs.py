"""Environments by name: tasks, groups, actions and imports."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_act import envs
from mllm_act.envs.base import check_action
from mllm_act.errors import UserError

SPEC = envs.spec("metaworld")


def test_task_and_group_names_are_expanded_in_order_without_duplicates() -> None:
    selected = envs.select_tasks("metaworld", "reach-v3, ml5,reach-v3,door-lock-v3")
    assert selected[0] == "reach-v3"
    assert set(selected[1:]) == set(envs.select_tasks("metaworld", "ml5"))
    assert len(envs.select_tasks("metaworld", "ml45,ml5")) == 50


@pytest.mark.parametrize(
    ("tasks", "hint"), [("raech-v3", "'reach-v3'"), ("ml-45", "'ml45'"), (" ,", "no task named")]
)
def test_the_error_of_an_unknown_task_suggests_the_nearest(tasks: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        envs.select_tasks("metaworld", tasks)


def test_the_error_of_an_unknown_environment_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="'metaworld'"):
        envs.make("meta-world")


def test_the_splits_are_disjoint_and_cover_the_configurations() -> None:
    splits = envs.splits("metaworld")
    assert sorted([*splits["train"], *splits["test"]]) == list(range(50))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4))
def test_any_finite_action_is_clipped_to_the_bounds(action: list[float]) -> None:
    clipped = check_action(SPEC, np.array(action), "here")
    assert clipped.dtype == np.float32
    assert (clipped >= SPEC.action_low).all() and (clipped <= SPEC.action_high).all()
    np.testing.assert_array_equal(check_action(SPEC, clipped, "here"), clipped)


@given(st.integers(0, 3), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_an_action_that_is_not_finite_is_an_error(index: int, value: float) -> None:
    action = np.zeros(4, np.float32)
    action[index] = value
    with pytest.raises(UserError, match="step 3: the action is not finite"):
        check_action(SPEC, action, "step 3")


def test_an_action_of_another_dimension_is_an_error() -> None:
    with pytest.raises(UserError, match=r"shape \(4,\), found \(7,\)"):
        check_action(SPEC, np.zeros(7), "here")


def test_environments_import_neither_jax_nor_tensorflow() -> None:
    program = (
        "import sys; from mllm_act import envs; from mllm_act.envs import workers;"
        "envs.make('metaworld', render=False).reset('reach-v3', 0, 0);"
        "sys.exit(bool({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
