"""Writes imported episodes of a LeRobot dataset as RLDS."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data_pipelines.writing import builder, recording
from data_pipelines.writing.lerobot import Source
from data_pipelines.writing.lerobot_features import REWARDS, Feature


class LeRobot(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of an imported dataset."""

    VERSION = tfds.core.Version("1.0.0")
    name = "lerobot"

    def __init__(
        self, source: Source, files: dict[int, Path], metadata: dict[str, Any], **kwargs: Any
    ) -> None:
        """``files`` has those that ``data_pipelines.writing.lerobot_episode`` wrote, by the index of the episode."""
        self._source, self._files, self._metadata = source, files, metadata
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        arrays = recording.load(next(iter(self._files.values())))
        return self.dataset_info_from_configs(
            description=f"Imported from a LeRobot dataset of {self._source.robot}.",
            features=features(self._source, arrays),
            metadata=tfds.core.MetadataDict(self._metadata),
        )

    def _split_generators(self, download: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del download
        return {
            split: self._generate_examples(split, indices)
            for split, indices in self._source.splits.items()
        }

    def _generate_examples(self, split: str, indices: Sequence[int]) -> Any:
        for index in tqdm(indices, desc=f"writing {split}", unit="episode"):
            arrays = recording.load(self._files[index])
            yield f"{index:09d}", example(self._source.features, index, arrays)

    def _example_writer(self) -> Any:
        return builder.EqualBytes(self.info.file_format)


def features(source: Source, arrays: dict[str, Any]) -> tfds.features.FeaturesDict:
    """Returns the RLDS features; ``arrays`` of an episode have the sizes of the images."""
    steps: dict[str, Any] = {
        "observation": {},
        "language_instruction": tfds.features.Text(),
        **dict.fromkeys(("is_first", "is_last", "is_terminal"), np.bool_),
        **dict.fromkeys(REWARDS, np.float32),
    }
    for feature in source.features:
        place, name = _place(steps, feature)
        if feature.kind == "text":
            place[name] = tfds.features.Text()
        elif feature.kind == "number":
            place[name] = tfds.features.Tensor(shape=feature.shape, dtype=np.dtype(feature.dtype))
        else:
            height, width = arrays[f"image_shape/{feature.key}"].tolist()
            jpeg = arrays[f"image/{feature.key}"][:2].tobytes() == b"\xff\xd8"
            place[name] = tfds.features.Image(
                shape=(height, width, 3), encoding_format="jpeg" if jpeg else "png"
            )
    episode = {"task": tfds.features.Text(), "episode": tfds.features.Scalar(np.int64)}
    return tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(steps), "episode_metadata": episode}
    )


def example(features: Sequence[Feature], index: int, arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns an episode of ``arrays`` as TFDS takes it. Images are files of bytes, which TFDS stores unchanged."""
    length = len(arrays["instruction"])
    steps: list[dict[str, Any]] = [
        {
            "observation": {},
            "language_instruction": str(arrays["instruction"][step]),
            "is_first": step == 0,
            "is_last": step == length - 1,
            "is_terminal": step == length - 1,
            "reward": 0.0,
            "discount": float(step < length - 1),
        }
        for step in range(length)
    ]
    for feature in features:
        if feature.kind in ("number", "text"):
            values = arrays[f"{feature.kind}/{feature.key}"]
        else:
            ends = np.cumsum(arrays[f"image_sizes/{feature.key}"])[:-1]
            values = np.split(arrays[f"image/{feature.key}"], ends)
        for step, value in zip(steps, values, strict=True):
            place, name = _place(step, feature)
            is_image = feature.kind in ("video", "image")
            place[name] = io.BytesIO(value.tobytes()) if is_image else value
            if feature.kind == "text":
                place[name] = str(value)
    task = str(arrays["instruction"][0])
    return {"steps": steps, "episode_metadata": {"task": task, "episode": index}}


def _place(step: dict[str, Any], feature: Feature) -> tuple[dict[str, Any], str]:
    """Returns the dictionary that a feature belongs to, and its name there."""
    inside, _, name = feature.path.rpartition("/")
    return (step[inside] if inside else step), name


def write(source: Source, files: dict[int, Path], metadata: dict[str, Any], folder: Path) -> Path:
    """Writes the dataset below ``folder`` and returns its own folder. Raises as ``builder.prepare`` does."""
    return builder.prepare(LeRobot(source, files, metadata, data_dir=folder))
