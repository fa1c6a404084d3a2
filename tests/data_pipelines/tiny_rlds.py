"""Writes small, real TFDS datasets of the project's layout, with random images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from data_pipelines.tensorflow_cpu import tf

METADATA = {
    "name": "tiny",
    "action_names": ["dx", "dy", "dz", "gripper"],
    "action_units": ["m", "m", "m", "effort"],
    "action_scale": [0.01, 0.01, 0.01, 1.0],
}


def metadata(action_dim: int) -> dict[str, Any]:
    """Returns the metadata of an environment with ``action_dim`` actions."""
    if action_dim == 4:
        return METADATA
    return {
        "name": f"tiny{action_dim}",
        "action_names": [f"a{dimension}" for dimension in range(action_dim)],
        "action_units": ["m"] * action_dim,
        "action_scale": [0.01] * action_dim,
    }


def features(action_dim: int = 4, size: int = 16) -> tfds.features.FeaturesDict:
    vector = tfds.features.Tensor(shape=(action_dim,), dtype=np.float32)
    image = tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg")
    return tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(
                {
                    "observation": {
                        "image": {"corner4": image},
                        "proprio": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                    },
                    "action": vector,
                    "executed_action": vector,
                    "reward": np.float32,
                    "discount": np.float32,
                    "is_first": np.bool_,
                    "is_last": np.bool_,
                    "is_terminal": np.bool_,
                    "language_instruction": tfds.features.Text(),
                }
            ),
            "episode_metadata": {
                "task": tfds.features.Text(),
                "configuration": np.int32,
                "seed": np.int64,
                "success": np.bool_,
                "episode": np.int32,
            },
        }
    )


def episode(index: int, length: int, action_dim: int = 4, size: int = 16) -> dict[str, Any]:
    """Returns an episode whose proprioception is (episode, step, noise), so that tests can identify each step."""
    rng = np.random.default_rng(index)
    return {
        "steps": [
            {
                "observation": {
                    "image": {"corner4": rng.integers(0, 255, (size, size, 3), np.uint8)},
                    "proprio": np.array([index, step, rng.normal()], np.float32),
                },
                "action": rng.uniform(-1, 1, action_dim).astype(np.float32),
                "executed_action": np.zeros(action_dim, np.float32),
                "reward": 0.0,
                "discount": 1.0,
                "is_first": step == 0,
                "is_last": step == length - 1,
                "is_terminal": False,
                "language_instruction": f"do task {index % 2}",
            }
            for step in range(length)
        ],
        "episode_metadata": {
            "task": f"task-{index % 2}",
            "configuration": index,
            "seed": 7,
            "success": True,
            "episode": index,
        },
    }


def write(
    directory: Path,
    splits: Mapping[str, Sequence[Sequence[dict[str, Any]]]],
    action_dim: int = 4,
    size: int = 16,
) -> Path:
    """Writes ``{split: [episodes of a file, ...]}`` as TFDS does."""
    directory.mkdir(parents=True, exist_ok=True)
    layout = features(action_dim, size)
    serializer = example_serializer.ExampleSerializer(layout.get_serialized_info())
    infos = []
    for split, files in splits.items():
        num_bytes = 0
        for number, episodes in enumerate(files):
            name = f"tiny-{split}.tfrecord-{number:05d}-of-{len(files):05d}"
            with tf.io.TFRecordWriter(str(directory / name)) as writer:
                for example in episodes:
                    record = serializer.serialize_example(layout.encode_example(example))
                    writer.write(record)
                    num_bytes += len(record)
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name="tiny", split=split, filetype_suffix="tfrecord"
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(episodes) for episodes in files],
                num_bytes=num_bytes,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=layout,
        split_infos=infos,
        metadata=tfds.core.MetadataDict(metadata(action_dim)),
    )
    return directory


def write_lengths(
    directory: Path, lengths: Sequence[Sequence[int]], size: int = 16, action_dim: int = 4
) -> Path:
    """Writes a ``train`` split with one file per list of episode lengths, and a ``val`` split of one episode."""
    index = iter(range(10_000))
    files = [
        [episode(next(index), length, action_dim, size) for length in file] for file in lengths
    ]
    val = [[episode(next(index), 5, action_dim, size)]]
    return write(directory, {"train": files, "val": val}, action_dim, size)
