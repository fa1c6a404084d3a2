"""The list of episodes of a split."""

import pytest

from mllm_act.envs import SPLITS, play
from mllm_act.errors import UserError


def test_every_configuration_of_every_task_is_there_with_its_seeds() -> None:
    found = play.episodes("metaworld", "reach-v3,push-v3", "test", seed=5, repeats=2, videos=True)
    jobs = [tuple(episode.job) for episode in found]
    assert len(set(jobs)) == len(jobs) == 2 * 2 * len(SPLITS["test"])
    assert {(task, c, s) for task, c, s in jobs} == {
        (task, c, s) for task in ("reach-v3", "push-v3") for c in SPLITS["test"] for s in (5, 6)
    }
    filmed = [episode.job.task for episode in found if episode.frames is not None]
    assert filmed == ["reach-v3", "push-v3"]


def test_a_split_or_task_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'test'"):
        play.episodes("metaworld", "reach-v3", "tset")
    with pytest.raises(UserError, match="did you mean 'reach-v3'"):
        play.episodes("metaworld", "raech-v3", "test")
