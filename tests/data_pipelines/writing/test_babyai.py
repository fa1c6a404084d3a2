"""BabyAI demonstrations, generated with the real simulator and read by the pipeline."""

import io
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import shards
from data_pipelines.generate import generate
from data_pipelines.reading.episodes import read_episodes
from data_pipelines.reading.pipeline import TrainBatches
from data_pipelines.reading.rlds import Dataset, open_dataset
from data_pipelines.reading.statistics import dataset_statistics
from data_pipelines.tensorflow_cpu import tf
from data_pipelines.writing import recording
from mllm_act import envs
from mllm_act.envs.babyai import expert
from mllm_act.errors import UserError

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, Any] = {"env": "babyai", "tasks": "all", "episodes": 3, "seed": 5}
SPEC = envs.spec("babyai")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("generate") / "data"
    generate(**ARGUMENTS, out=out, workers=2)
    return open_dataset(out)


def episodes(dataset: Dataset) -> list[dict[str, Any]]:
    spec = {
        f"episode_metadata/{key}": tf.io.FixedLenFeature((), tf.int64)
        for key in ("configuration", "episode")
    }
    result = []
    for split in dataset.splits.values():
        records = split.records(tf.range(len(split), dtype=tf.int64))
        for (_, episode), (_, record) in zip(read_episodes(dataset, split), records, strict=True):
            numbers = tf.io.parse_single_example(record, spec)
            result.append(episode | {key.rpartition("/")[2]: int(x) for key, x in numbers.items()})
    return result


def test_the_layout_is_the_one_of_every_dataset_with_an_index_as_action(dataset: Dataset) -> None:
    assert dataset.name == "babyai"
    assert dataset.action_dim == 1 and dataset.proprio_dim == 1
    assert dataset.image_shapes == {"top": (200, 200, 3)}
    assert dataset.metadata["choices"] == list(SPEC.choices)
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 10,
        "val": 5,
    }


def test_episodes_replay_in_the_simulator_to_their_very_end(dataset: Dataset) -> None:
    env = envs.make("babyai")
    recorded = episodes(dataset)
    assert len(recorded) == 15
    for episode in recorded:
        task, length = episode["task"].decode(), len(episode["action"])
        assert episode["configuration"] == episode["episode"] < 3
        seed = recording.attempt_seed(ARGUMENTS["seed"], task, int(episode["episode"]), 0)
        observation = env.reset(task, int(episode["configuration"]), seed)
        assert {text.decode() for text in episode["instruction"]} == {
            str(observation["instruction"])
        }
        for step in range(length):
            pixels = np.asarray(Image.open(io.BytesIO(episode["images"]["top"][step])), int)
            assert abs(pixels - observation["images"]["top"]).mean() < 3  # JPEG
            np.testing.assert_array_equal(episode["action"][step], env.expert_action())
            assert episode["action"][step, 0] in range(6)  # no noise on an index
            observation, _, success = env.step(episode["action"][step])
            assert success == (step == length - 1)


def test_statistics_have_the_sentences_of_all_episodes(dataset: Dataset) -> None:
    statistics = dataset_statistics(dataset)
    sentences = {str(text.decode()) for e in episodes(dataset)[:10] for text in e["instruction"]}
    assert set(statistics.instructions) == sentences and len(sentences) > 5
    assert statistics.tasks == tuple(sorted(envs.instructions("babyai")))
    assert statistics.proprio.min == statistics.proprio.max == (0.0,)


def test_another_seed_gives_other_episodes_and_workers_change_nothing(
    dataset: Dataset, tmp_path: Path
) -> None:
    generate(**ARGUMENTS, out=tmp_path / "same", workers=1)
    again = contents(tmp_path / "same")
    written = contents(dataset.directory)
    assert again == {name: written[name] for name in again}
    batches = [
        TrainBatches(d, "train", batch_size=2, context=2, seed=0)
        for d in (dataset, open_dataset(tmp_path / "same"))
    ]
    batches[1].restore(batches[0].state())  # a run resumes on data generated again
    other = {**ARGUMENTS, "tasks": "goto", "seed": 6}
    generate(**other, out=tmp_path / "other", workers=1)
    first_images, other_images = (
        {episode["images"]["top"][0] for episode in episodes(d)}
        for d in (dataset, open_dataset(tmp_path / "other"))
    )
    assert not first_images & other_images


def test_what_the_expert_cannot_solve_is_counted_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = recording.serve("babyai", 0)
    record(("goto", 0, str(tmp_path / "solved.npz")))
    solved = recording.summary(tmp_path / "solved.npz")
    assert solved["success"] and solved["attempts"] == 1
    assert solved["frames_drawn"] == solved["steps"] > 0
    monkeypatch.setattr(expert, "ROUNDS", 1)  # too few to make a plan
    record(("goto", 0, str(tmp_path / "failed.npz")))
    failed = recording.summary(tmp_path / "failed.npz")
    assert failed == {
        "success": False,
        "attempts": recording.MAX_ATTEMPTS,
        "steps": 0,
        "frames_drawn": 0,
    }


def test_a_full_disk_while_the_dataset_is_written(tmp_path: Path) -> None:
    episode = tmp_path / "goto" / "000000.npz"
    episode.parent.mkdir()
    recording.serve("babyai", 0)(("goto", 0, str(episode)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError, match="File too large"):
            shards.write("babyai", {"train": [episode]}, tmp_path / "rlds", 1, 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_of_another_environment_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="env: expected metaworld of this command, found babyai"):
        generate("metaworld", "reach-v3", 3, dataset.directory, workers=1, seed=5)
