"""Writes imported episodes of CALVIN as RLDS."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data_pipelines.writing import builder, recording
from data_pipelines.writing.calvin import CAMERAS, FOLDERS, NUMBERS, Episode


class Calvin(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of an imported dataset."""

    VERSION = tfds.core.Version("1.0.0")
    name = "calvin"

    def __init__(self, files: Mapping[Episode, Path], **kwargs: Any) -> None:
        """``files`` has those that ``data_pipelines.writing.calvin`` wrote."""
        self._files = files
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        arrays = recording.load(next(iter(self._files.values())))
        return self.dataset_info_from_configs(
            description="CALVIN's annotated episodes, with the names of its own files.",
            features=features(arrays),
        )

    def _split_generators(self, download: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del download
        folders = {episode.folder for episode in self._files}
        return {
            split: self._generate_examples(
                split, [episode for episode in self._files if episode.folder == folder]
            )
            for folder, split in FOLDERS.items()
            if folder in folders
        }

    def _generate_examples(self, split: str, episodes: Sequence[Episode]) -> Any:
        for episode in tqdm(episodes, desc=f"writing {split}", unit="episode"):
            yield f"{episode.number:09d}", example(episode, recording.load(self._files[episode]))

    def _example_writer(self) -> Any:
        return builder.EqualBytes(self.info.file_format)


def features(arrays: Mapping[str, Any]) -> tfds.features.FeaturesDict:
    """Returns the RLDS features; ``arrays`` of an episode have the sizes of the images."""

    def vector(key: str) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(NUMBERS[key],), dtype=np.float32)

    def image(camera: str) -> tfds.features.Image:
        shape = (*arrays[f"image_shape/{camera}"].tolist(), 3)
        return tfds.features.Image(shape=shape, encoding_format="jpeg")

    return tfds.features.FeaturesDict({
        "steps": tfds.features.Dataset({
            "observation": {
                **{camera: image(camera) for camera in CAMERAS},
                **{key: vector(key) for key in ("robot_obs", "scene_obs")},
            },
            **{key: vector(key) for key in ("rel_actions", "actions")},
            "language_instruction": tfds.features.Text(),
            **dict.fromkeys(("is_first", "is_last", "is_terminal"), np.bool_),
            **dict.fromkeys(("reward", "discount"), np.float32),
        }),
        "episode_metadata": {
            **dict.fromkeys(("task", "scene"), tfds.features.Text()),
            "first_frame": tfds.features.Scalar(np.int64),
        },
    })  # fmt: skip


def example(episode: Episode, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an episode as TFDS takes it: the annotation ends when its task succeeds, with a reward of 1."""
    length = len(arrays["actions"])
    images = {
        camera: np.split(arrays[f"image/{camera}"], np.cumsum(arrays[f"image_sizes/{camera}"])[:-1])
        for camera in CAMERAS
    }
    steps = [
        {
            "observation": {
                **{camera: io.BytesIO(images[camera][t].tobytes()) for camera in CAMERAS},
                **{key: arrays[key][t] for key in ("robot_obs", "scene_obs")},
            },
            **{key: arrays[key][t] for key in ("rel_actions", "actions")},
            "language_instruction": episode.sentence,
            "is_first": t == 0,
            "is_last": t == length - 1,
            "is_terminal": t == length - 1,
            "reward": float(t == length - 1),
            "discount": float(t < length - 1),
        }
        for t in range(length)
    ]
    metadata = {"task": episode.task, "scene": episode.scene, "first_frame": episode.first}
    return {"steps": steps, "episode_metadata": metadata}


def write(files: Mapping[Episode, Path], folder: Path) -> Path:
    """Writes the dataset below ``folder`` and returns its own folder. Raises as ``builder.prepare`` does."""
    return builder.prepare(Calvin(files, data_dir=folder))
