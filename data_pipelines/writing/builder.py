"""What the TFDS builders of all environments share: recorded demonstrations into an RLDS dataset.

A builder has a folder of its own because TFDS looks for a dataset's metadata in the builder's
folder.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.writing import recording
from mllm_act.envs import EnvSpec, spec
from mllm_act.envs.base import metadata

import tensorflow_datasets as tfds  # isort: skip


class Demonstrations(tfds.core.GeneratorBasedBuilder):
    """The builder of the environment that its class is named for, in lower case."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def __init__(self, splits: Mapping[str, Sequence[Path]], **kwargs: Any) -> None:
        """``splits``: for each split the files that `data_pipelines.writing.recording` wrote."""
        self._files = splits
        self._spec = spec(self.name)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=features(self._spec),
            metadata=tfds.core.MetadataDict(metadata(self._spec)),
        )

    def _split_generators(self, download: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del download
        return {
            split: map(_example, tqdm(files, desc=f"writing {split}", unit="episode"))
            for split, files in self._files.items()
        }

    def _generate_examples(self, **_: Any) -> Any:
        raise NotImplementedError("the splits are generators already")


def features(env: EnvSpec) -> tfds.features.FeaturesDict:
    """The RLDS features of an environment's episodes.

    ``action`` is the label (the expert's, before the noise), ``executed_action`` what the simulator
    got and ``reward`` what it gave for that. Both are in the environment's own numbers; physical
    units are these times ``action_scale`` in ``metadata.json``. A discrete action is the index of
    its name in ``choices`` there, as float32[1]: exact, and read by the same program. Every step
    has an action: ``is_last`` too.
    """
    side = env.image_size
    image = tfds.features.Image(shape=(side, side, 3), encoding_format="jpeg")
    action = tfds.features.Tensor(shape=(len(env.action_names),), dtype=np.float32)
    proprio = tfds.features.Tensor(shape=(len(env.proprio_names),), dtype=np.float32)
    return tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(
                {
                    "observation": {"image": dict.fromkeys(env.cameras, image), "proprio": proprio},
                    "action": action,
                    "executed_action": action,
                    "reward": tfds.features.Scalar(np.float32),
                    "discount": tfds.features.Scalar(np.float32),
                    "is_first": tfds.features.Scalar(np.bool_),
                    "is_last": tfds.features.Scalar(np.bool_),
                    "is_terminal": tfds.features.Scalar(np.bool_),
                    "language_instruction": tfds.features.Text(),
                }
            ),
            "episode_metadata": {
                "task": tfds.features.Text(),
                "episode": tfds.features.Scalar(np.int32),
                "configuration": tfds.features.Scalar(np.int32),
                "seed": tfds.features.Scalar(np.int64),
                "success": tfds.features.Scalar(np.bool_),
            },
        }
    )


def _example(path: Path) -> tuple[str, dict[str, Any]]:
    """Turns ``<task>/<episode>.npz`` into (key, example); JPEG bytes stay as they are."""
    task, episode = path.parent.name, int(path.stem)
    arrays = recording.load(path)
    cameras = [key.partition("/")[2] for key in arrays if key.startswith("jpeg/")]
    ends = {camera: np.cumsum(arrays[f"jpeg_sizes/{camera}"]) for camera in cameras}
    instruction = str(arrays["instruction"])
    length = len(arrays["action"])

    def jpeg(camera: str, step: int) -> io.BytesIO:  # what TFDS stores unchanged
        start = ends[camera][step] - arrays[f"jpeg_sizes/{camera}"][step]
        return io.BytesIO(arrays[f"jpeg/{camera}"][start : ends[camera][step]].tobytes())

    steps = [
        {
            "observation": {
                "image": {camera: jpeg(camera, step) for camera in cameras},
                "proprio": arrays["proprio"][step],
            },
            "action": arrays["action"][step],
            "executed_action": arrays["executed_action"][step],
            "reward": arrays["reward"][step],
            "discount": np.float32(step < length - 1),  # success ends the task
            "is_first": step == 0,
            "is_last": step == length - 1,
            "is_terminal": step == length - 1,
            "language_instruction": instruction,
        }
        for step in range(length)
    ]
    about = {"task": task, "episode": episode} | {
        key: arrays[key] for key in ("configuration", "seed", "success")
    }
    return f"{task}-{episode:06d}", {"steps": steps, "episode_metadata": about}


def write(kind: type[Demonstrations], splits: Mapping[str, Sequence[Path]], folder: Path) -> Path:
    """Writes the dataset below ``folder``, returns its own one. Equal input, equal bytes."""
    tfds.disable_progress_bar()
    builder = kind(splits=splits, data_dir=folder)
    # Files small enough that the processes of a large run have some each, and a shuffle mixes many.
    config = tfds.download.DownloadConfig(try_download_gcs=False, max_shard_size=32 * 2**20)
    with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads
        builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)
