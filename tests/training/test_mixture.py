"""A mixture's batches and loss are the same on any mesh: padding makes the parts equal, and counts for nothing."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipelines.reading.pipeline import TrainBatches
from mllm_act.config import load_config
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.policy.network import NetworkConfig, build_network
from mllm_act.policy.prompt import train_text_tokenizer
from mllm_act.training import embodiments
from mllm_act.training.setup import set_up
from tests.data_pipelines import tiny_rlds

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = {"tiny": 4, "tiny7": 7}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("mixture")
    config = load_config(f"{ROOT}/configs/policy/mixture.py:metaworld=uniform")
    part = config.mixture.metaworld.copy_and_resolve_references()
    parts = {}
    for weight, (name, dimensions) in enumerate(NAMES.items(), 1):
        data = tiny_rlds.write_lengths(home / name, [[9, 6], [7]], action_dim=dimensions)
        parts[name] = part.copy_and_resolve_references()
        parts[name].update_from_flattened_dict({
            "data.directory": str(data), "weight": float(weight), "adapter.bins": 8
        })  # fmt: skip
    with config.unlocked():
        config.mixture = parts
        config.steps = 2
    return config


def make(
    config: Any, batch_size: int, shards: int, part: tuple[int, int] = (0, 1)
) -> dict[str, embodiments.Embodiment]:
    sources, model = embodiments.open_sources(config), presets.get("tiny").model
    text = train_text_tokenizer(embodiments.texts(sources.values()), model.language.action_tokens)
    return embodiments.make_embodiments(sources, model, text, batch_size, shards, part)


def test_windows_and_weights_do_not_follow_the_mesh(config: Any) -> None:
    for shards in (1, 2, 4, 8):
        robots = make(config, batch_size=32, shards=shards)
        assert {name: robot.share for name, robot in robots.items()} == {"tiny": 11, "tiny7": 21}
        for robot in robots.values():
            assert robot.rows % shards == 0 and robot.share <= robot.rows < robot.share + shards
    assert set_up(config).recipe.shares == {"tiny": 1 / 3, "tiny7": 2 / 3}


def test_a_dataset_too_small_for_a_batch_of_every_process(config: Any) -> None:
    with pytest.raises(UserError, match="config.data.batch_size: .* of tiny for each of 3 proc"):
        make(config, batch_size=6, shards=3, part=(0, 3))


def test_padding_does_not_change_the_loss(config: Any) -> None:
    name, preset = "tiny7", presets.get("tiny")
    whole, padded = (make(config, batch_size=8, shards=shards)[name] for shards in (1, 4))
    network_config = NetworkConfig("tiny", preset.model, preset.trained, {name: whole.config})
    network = build_network(network_config, {name: whole.source.statistics}, nnx.Rngs(0))
    arrays = next(whole.train_batches(seed=0, shuffle_megabytes=1))
    assert len(arrays["mask"]) == whole.share == padded.share == 5
    losses = []
    for robot in (whole, padded):
        batch = jax.tree.map(jnp.asarray, robot.to_batch(arrays))
        assert len(batch.action) == robot.rows
        losses.append(nnx.jit(lambda network, batch: network.loss(name, batch)[0])(network, batch))
    assert (whole.rows, padded.rows) == (5, 8)
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_processes_share_the_windows(config: Any) -> None:
    counts = []
    for index in range(2):
        robot = make(config, batch_size=8, shards=2, part=(index, 2))["tiny7"]
        assert (robot.share, robot.rows) == (5, 6)
        batches = robot.train_batches(seed=0, shuffle_megabytes=1)
        assert isinstance(batches, TrainBatches)
        arrays = next(batches)
        counts.append(len(arrays["mask"]))
        batch = robot.to_batch(arrays)
        assert len(batch.action) == 3 and int(batch.observation.mask.any(1).sum()) == counts[-1]
    assert counts == [2, 3]


def test_all_faults_of_a_mixture_are_in_one_error(config: Any, tmp_path: Path) -> None:
    config = config.copy_and_resolve_references()
    for name, unit in zip(NAMES, ("m", "cm"), strict=True):
        (tmp_path / f"{name}.py").write_text(
            "from data_pipelines.mapping import DataMapping, Part\n"
            "MAPPING = DataMapping('arm', {'front': 'observation/image/corner4'}, "
            f"(Part('action', ('x', 'y'), {unit!r}),))\n"
        )
        config.mixture[name].data.mapping = str(tmp_path / f"{name}.py")
    units = r"found 'arm' in both mappings, whose action_units are \['m', 'm'\] and \['cm', 'cm'\]"
    with pytest.raises(UserError, match=rf"mixture.tiny7: .* than config.mixture.tiny, {units}"):
        embodiments.open_sources(config)
    for name in NAMES:
        config.mixture[name].data.directory = f"/no/{name}"
    with pytest.raises(UserError, match="/no/tiny: no such .*; /no/tiny7: no such directory"):
        embodiments.open_sources(config)


def test_a_held_out_instruction_longer_than_those_of_training_is_named(config: Any) -> None:
    robot = make(config, batch_size=8, shards=1)["tiny"]
    arrays = dict(next(robot.train_batches(seed=0, shuffle_megabytes=1)))
    arrays["instruction"] = np.array([b"z9" * 500] * len(arrays["mask"]))
    with pytest.raises(UserError, match=r"prompt_tokens: expected prompts of at most \d+ tokens"):
        robot.to_batch(arrays)
