"""The list of episodes of a split."""

import pytest

from mllm_act.envs import play
from mllm_act.errors import UserError


def test_every_configuration_of_every_task_is_listed_once() -> None:
    episodes = play.episodes("metaworld", "reach-v3,push-v3", "test", seed=5, videos=True)
    jobs = [tuple(episode.job) for episode in episodes]
    assert jobs == [(task, c, 5) for task in ("reach-v3", "push-v3") for c in range(40, 50)]
    filmed = [episode.job.task for episode in episodes if episode.frames is not None]
    assert filmed == ["reach-v3", "push-v3"]


def test_the_error_of_an_unknown_split_or_task_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'test'"):
        play.episodes("metaworld", "reach-v3", "tset")
    with pytest.raises(UserError, match="did you mean 'reach-v3'"):
        play.episodes("metaworld", "raech-v3", "test")
    with pytest.raises(UserError, match="--seed: expected 0 or more, found -1"):
        play.episodes("metaworld", "reach-v3", "test", seed=-1)
