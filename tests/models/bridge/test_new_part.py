"""A new bridge part is one class and one line in ``PARTS``."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mllm_act.models.bridge.bridge import PARTS
from mllm_act.models.bridge.part import BridgePart, PartShape
from mllm_act.models.layers import Linear
from mllm_act.models.mllm import MLLMConfig
from tests.models import tiny


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Sizes."""

    latents: int = 3


class Pool(BridgePart):
    """The mean feature, mapped to a few latents."""

    Config = PoolConfig

    def __init__(self, config: PoolConfig, shape: PartShape, rngs: nnx.Rngs) -> None:
        self.map = Linear(shape.inputs, config.latents * shape.outputs, rngs=rngs)
        self.outputs = shape.outputs

    def __call__(self, features: jax.Array, instruction: Any = None, *, remat: str = "none") -> Any:
        return self.map(features.mean(1)).reshape(len(features), -1, self.outputs)

    @staticmethod
    def positions_out(config: PoolConfig, positions: int) -> int:
        return config.latents

    @staticmethod
    def flops(config: PoolConfig, shape: PartShape) -> float:
        return 2.0 * shape.inputs * config.latents * shape.outputs


def test_a_new_part_is_built_from_its_name_and_survives_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PARTS, "pool", Pool)
    model = tiny.mllm(bridge=("projector", "pool"), sizes=(("pool", PoolConfig(latents=2)),))
    assert model.config.latents_per_image == 2
    text = json.dumps(dataclasses.asdict(model.config))
    assert MLLMConfig.from_dict(json.loads(text)) == model.config
    latents = model.latents(tiny.images())
    given = tiny.sequence(fed=0, latents=4)
    assert latents.shape == given["latents"].shape
    hidden = model(**{**given, "latents": latents})
    assert hidden.shape == (tiny.B, tiny.T, 1, tiny.D) and jnp.isfinite(hidden).all()
