"""Writes small RLDS sets in the layouts of public datasets, with ``tensorflow_datasets`` itself and random content."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer

from data_pipelines.tensorflow_cpu import tf

F = tfds.features


def jpeg(height: int, width: int) -> F.Image:
    return F.Image(shape=(height, width, 3), encoding_format="jpeg")


def vector(size: int, dtype: Any = np.float32) -> F.Tensor:
    return F.Tensor(shape=(size,), dtype=dtype)


def steps(observation: dict[str, Any], **more: Any) -> F.FeaturesDict:
    """Returns the features of episodes, with the fields that all RLDS sets have."""
    flags = dict.fromkeys(("is_first", "is_last", "is_terminal"), np.bool_)
    fields = {"observation": observation, "reward": np.float32, "discount": np.float32, **flags}
    return F.FeaturesDict({
        "steps": F.Dataset({**fields, **more}),
        "episode_metadata": {"file_path": F.Text()},
    })  # fmt: skip


LAYOUTS: dict[str, F.FeaturesDict] = {
    "bridge": steps(
        {**{f"image_{i}": jpeg(16, 16) for i in range(2)}, "state": vector(7)},
        action=vector(7), language_instruction=F.Text(), language_embedding=vector(8),
    ),
    "rt1": steps(
        {
            "image": jpeg(16, 20), "natural_language_instruction": F.Text(), "base_pose_tool_reached": vector(7),
            "gripper_closed": vector(1), "natural_language_embedding": vector(8),
        },
        action={
            "world_vector": vector(3), "rotation_delta": vector(3), "gripper_closedness_action": vector(1),
            "base_displacement_vector": vector(2), "terminate_episode": vector(3, np.int32),
        },
    ),
    "droid": steps(
        {
            "exterior_image_1_left": jpeg(9, 16), "exterior_image_2_left": jpeg(9, 16), "wrist_image_left": jpeg(9, 16),
            "joint_position": vector(7, np.float64), "gripper_position": vector(1, np.float64),
        },
        action=vector(7, np.float64),
        action_dict={"joint_velocity": vector(7, np.float64), "gripper_position": vector(1, np.float64)},
        **{f"language_instruction{i}": F.Text() for i in ("", "_2", "_3")},
    ),
    "libero": steps(
        {"image": jpeg(16, 16), "wrist_image": jpeg(12, 12), "state": vector(8), "joint_state": vector(7)},
        action=vector(7), language_instruction=F.Text(),
    ),
    "aloha": steps(
        {
            **{name: jpeg(12, 16) for name in ("image", "left_wrist_image", "right_wrist_image")},
            "state": vector(14),
        },
        action=vector(14), language_instruction=F.Text(),
    ),
    # The template of rlds_dataset_builder: PNG images, and an embedding beside the text.
    "template": steps(
        {
            "image": F.Image(shape=(16, 16, 3), encoding_format="png"), "wrist_image": F.Image(shape=(8, 8, 3)),
            "state": vector(10),
        },
        action=vector(10), language_instruction=F.Text(),
    ),
    "tensors": steps(
        {"camera": F.Tensor(shape=(10, 12, 3), dtype=np.uint8), "pose": {"arm": vector(3, np.int64)}},
        command=F.Tensor(shape=(2, 2), dtype=np.float64, encoding="zlib"), closed=np.bool_,
    ),
}  # fmt: skip


def random_episode(features: F.FeaturesDict, length: int, seed: int) -> dict[str, Any]:
    """Returns an example of random content with ``length`` steps."""
    rng = np.random.default_rng(seed)

    def one(feature: Any) -> Any:
        if isinstance(feature, F.FeaturesDict):
            return {name: one(child) for name, child in feature.items()}
        if isinstance(feature, F.Text):
            return ("push", "pull")[rng.integers(2)]
        if isinstance(feature, F.Image):
            return rng.integers(0, 256, feature.shape, np.uint8)
        if feature.np_dtype == np.uint8:
            return rng.integers(0, 256, feature.shape, np.uint8)
        return rng.normal(size=feature.shape).astype(feature.np_dtype)

    inside = features["steps"].feature
    result = {name: one(child) for name, child in features.items() if name != "steps"}
    return {**result, "steps": [one(inside) for _ in range(length)]}


def write(
    directory: Path,
    features: F.FeaturesDict,
    episodes: Sequence[dict[str, Any]],
    split: str = "train",
    file_format: str = "tfrecord",
) -> Path:
    """Writes one split of one file."""
    directory.mkdir(parents=True, exist_ok=True)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    records = [serializer.serialize_example(features.encode_example(x)) for x in episodes]
    path = directory / f"robot-{split}.tfrecord-00000-of-00001"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name="robot", split=split, filetype_suffix="tfrecord"
    )
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(records)],
        num_bytes=sum(map(len, records)),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(data_dir=directory, features=features, split_infos=[info])
    if file_format == "array_record":
        array = ArrayRecordWriter(str(path).replace("tfrecord", file_format), "group_size:1")
        for record in records:
            array.write(record)
        array.close()
        path.unlink()
        path = directory / "dataset_info.json"
        path.write_text(
            path.read_text().replace('"fileFormat": "tfrecord"', '"fileFormat": "array_record"')
        )
    return directory


def write_random(
    directory: Path,
    layout: str,
    lengths: Sequence[int] = (5, 3, 4),
    change: Callable[[dict[str, Any]], None] = lambda episode: None,
    file_format: str = "tfrecord",
) -> Path:
    """Writes random episodes in one of ``LAYOUTS``, each changed by ``change`` before."""
    episodes = [random_episode(LAYOUTS[layout], n, seed) for seed, n in enumerate(lengths)]
    for episode in episodes:
        change(episode)
    return write(directory, LAYOUTS[layout], episodes, file_format=file_format)
