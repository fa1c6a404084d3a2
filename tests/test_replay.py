"""Replay in the real simulator."""

import jax.numpy as jnp
import numpy as np
import pytest

from mllm_act import replay
from mllm_act.action_tokenizer.autoencoder import ActionTokenizer
from mllm_act.envs import play
from mllm_act.envs.play import Episode
from mllm_act.envs.results import summarize
from mllm_act.envs.workers import EnvPool
from tests.action_tokenizer.conftest import model, some_actions, statistics

pytestmark = pytest.mark.slow

__all__ = ["model"]  # a fixture


def two_each() -> list[Episode]:
    """Two test configurations of two tasks."""
    episodes = play.episodes("metaworld", "reach-v3,drawer-close-v3", "test")
    return [episode for episode in episodes if episode.job.configuration < 42]


def test_replay_of_the_expert() -> None:
    """It succeeds by itself, and fails if its actions are replaced by zeros."""
    alone, again, still = two_each(), two_each(), two_each()
    with EnvPool("metaworld", 3, 1, render=False) as pool:
        replay.replay(pool, alone, 150, None)
        replay.replay(pool, again, 150, lambda action: action)
        replay.replay(pool, still, 20, np.zeros_like)
    assert alone == again and all(episode.success for episode in alone)
    assert not any(episode.success for episode in still)
    assert all(episode.steps == 20 for episode in still)
    rows = replay.csv_rows({"replay": summarize(still, "all"), "expert": summarize(alone, "all")})
    columns = "task episodes replay replay_low replay_high expert expert_low expert_high"
    assert list(rows[0]) == columns.split()
    assert [row["task"] for row in rows] == ["reach-v3", "drawer-close-v3", "all"]
    assert rows[-1]["replay"] == 0 and rows[-1]["expert"] == 1 and rows[-1]["episodes"] == 4
    assert rows[0]["expert_low"] < 1


def test_through_the_tokenizer_is_encode_then_decode(model: ActionTokenizer) -> None:
    through = replay.through_tokenizer(model, statistics(), batch=8)
    actions = some_actions()[:5]
    expected = model.decode(model.encode(jnp.asarray(actions)))
    np.testing.assert_allclose(through(actions), expected, atol=1e-6)
