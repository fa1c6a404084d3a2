"""The list of episodes of a split."""

import pytest

from mllm_act.envs import play
from mllm_act.errors import UserError


def test_every_configuration_of_every_task_is_there_once() -> None:
    found = play.episodes("metaworld", "reach-v3,push-v3", "test", seed=5, videos=True)
    jobs = [tuple(episode.job) for episode in found]
    assert jobs == [(task, c, 5) for task in ("reach-v3", "push-v3") for c in range(40, 50)]
    filmed = [episode.job.task for episode in found if episode.frames is not None]
    assert filmed == ["reach-v3", "push-v3"]


def test_a_split_or_task_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'test'"):
        play.episodes("metaworld", "reach-v3", "tset")
    with pytest.raises(UserError, match="did you mean 'reach-v3'"):
        play.episodes("metaworld", "raech-v3", "test")
