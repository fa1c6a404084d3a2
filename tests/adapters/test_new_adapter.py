"""A new adapter is one class and one line in ``ADAPTERS``: it trains, is saved, loads and acts."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int

from mllm_act import train
from mllm_act.adapters import ADAPTERS
from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.adapters.base import Vocabulary
from mllm_act.config import load_config
from mllm_act.normalization import Statistics
from mllm_act.policy import Policy
from tests.data_pipelines import tiny_rlds

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class LevelsConfig:
    """The settings."""

    levels: int = 3


class Levels(ActionTokenAdapter):
    """Each dimension is rounded to one of a few levels from -1 to 1."""

    Config = LevelsConfig

    @classmethod
    def make(
        cls, config: LevelsConfig, statistics: Statistics, vocabulary: Vocabulary, rngs: nnx.Rngs
    ) -> "Levels":
        return cls(statistics, vocabulary, len(statistics.action.min), config.levels, rngs)

    def to_codes(self, action: Float[Array, "... A"]) -> Int[Array, "... A"]:
        code = jnp.round((action + 1) / 2 * (self.codes - 1))
        return jnp.clip(code, 0, self.codes - 1).astype(jnp.int32)

    def from_codes(self, codes: Int[Array, "... A"]) -> Float[Array, "... A"]:
        return codes / (self.codes - 1) * 2 - 1


def test_a_new_adapter_trains_is_saved_loads_and_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ADAPTERS, "levels", Levels)
    root = Path(__file__).parents[2]
    config = load_config(f"{root}/configs/policy/metaworld.py:levels")
    assert config.adapter.to_dict() == {"name": "levels", "levels": 3}
    config.update_from_flattened_dict({
        "data.directory": str(tiny_rlds.write_lengths(tmp_path / "data", [[5, 4]])), "adapter.levels": 5,
        "data.batch_size": 2, "steps": 2, "validation_windows": 2,
    })  # fmt: skip
    train.main(config, tmp_path / "run")
    assert "Actions of tiny: 4 dimensions, normalised by range\n" in capsys.readouterr().out

    policy = Policy.load(tmp_path / "run")
    assert policy.embodiment.adapter_config == LevelsConfig(levels=5)
    images = {"corner4": np.zeros((1, 16, 16, 3), np.uint8)}
    action, _ = policy.act(
        images, np.zeros((1, 3), np.float32), ["do task 1"], np.array([True]), policy.start(1)
    )
    low, high = (
        np.array(policy.meta["statistics"]["tiny"]["action"][key]) for key in ("min", "max")
    )
    levels = (action[0] - low) / (high - low) * 4
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)
