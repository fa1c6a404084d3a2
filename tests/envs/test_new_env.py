"""A new environment is one module and one line in ``ENVS``; nothing else knows its name."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from mllm_act import envs
from mllm_act.envs import EnvObservation, Job, play
from mllm_act.envs.play import Episode
from mllm_act.envs.results import summarize
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the line, in this process only: workers have to learn the module from the pool."""
    monkeypatch.setitem(envs.ENVS, "toy", "tests.envs.toy_env")


def test_it_is_available_by_name() -> None:
    assert envs.spec("toy").horizon == 20
    assert envs.select_tasks("toy", "both") == ("left", "right")
    assert envs.splits("toy")["test"] == range(3, 5)
    with pytest.raises(UserError, match="did you mean 'left'"):
        envs.select_tasks("toy", "lefft")


def test_a_pool_steps_it_in_worker_processes() -> None:
    with EnvPool("toy", num_envs=2, num_workers=2) as pool:
        observation = pool.reset([0, 1], [Job("left", 0, 0), Job("right", 0, 0)])
        assert observation["images"]["front"].shape == (2, 8, 8, 3)
        assert observation["instruction"].tolist() == ["go left", "go right"]
        observation, rewards, successes = pool.step(np.array([[-1.0], [0.5]]))
    np.testing.assert_array_equal(observation["proprio"], [[-1], [0.5]])
    assert rewards.tolist() == [1, 0] and successes.tolist() == [True, False]


def test_an_episode_can_be_followed_by_another_in_the_same_simulator() -> None:
    played: list[tuple[int, Job]] = []
    with EnvPool("toy", num_envs=2, num_workers=1) as pool:

        def decide(
            playing: Mapping[int, Episode], started: Sequence[int], observation: EnvObservation
        ) -> np.ndarray:
            played.extend((slot, playing[slot].job) for slot in started)
            return pool.expert_actions(sorted(playing))

        def follow(episode: Episode) -> Episode | None:
            _, configuration, seed = episode.job
            return (
                Episode(Job("right", configuration, seed)) if episode.job.task == "left" else None
            )

        todo = play.episodes("toy", "left", "train")
        done = list(play.play(pool, todo, pool.spec.horizon, decide, "toy", follow))
    assert len(done) == 6 and all(episode.success for episode in done)
    slots = {job: slot for slot, job in played}
    for episode in todo:
        assert slots[episode.job] == slots[Job("right", *episode.job[1:])]


def test_its_expert_is_played_and_summarized() -> None:
    episodes = play.episodes("toy", "both", "test", videos=True)
    with EnvPool("toy", num_envs=3, num_workers=1) as pool:

        def decide(
            playing: Mapping[int, Episode], started: Sequence[int], observation: EnvObservation
        ) -> np.ndarray:
            return pool.expert_actions(sorted(playing))

        played = list(play.play(pool, episodes, pool.spec.horizon, decide, "toy"))
    assert len(played) == 4
    assert [episode.steps for episode in episodes] == [4, 5, 4, 5]  # a metre per step
    assert len(episodes[0].frames or []) == 4 and episodes[1].frames is None
    rows = summarize(episodes)
    assert [(row["task"], row["success"]) for row in rows] == [
        ("left", 1),
        ("right", 1),
        ("mean", 1),
    ]
