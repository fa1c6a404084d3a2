"""Writes recorded demonstrations as an RLDS dataset, with one TFDS builder for all environments."""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.tensorflow_cpu import tf
from data_pipelines.writing import recording
from mllm_act.envs import EnvSpec, spec
from mllm_act.envs.base import metadata

import tensorflow_datasets as tfds  # isort: skip
from tensorflow_datasets.core.writer import ExampleWriter  # isort: skip


class EqualBytes(ExampleWriter):
    """Writes records with their keys in order, so that equal episodes are equal bytes.

    Protobuf orders the keys of a map by a hash that differs in each process, unless it is told not to.
    """

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """See ``ExampleWriter``; ``examples`` are pairs of a key and a serialised ``tf.train.Example``."""
        parse = tf.train.Example.FromString
        ordered = ((key, parse(e).SerializeToString(deterministic=True)) for key, e in examples)
        return super().write(path, ordered)


class Demonstrations(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of one environment's dataset.

    TFDS derives the name of a dataset from its class. Here the instance sets it to the name of the environment.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def __init__(self, env: str, splits: Mapping[str, Sequence[Path]], **kwargs: Any) -> None:
        """``splits`` has the files of each split, as ``data_pipelines.writing.recording`` wrote them."""
        self.name = env
        self._files = splits
        self._spec = spec(env)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=f"Successful demonstrations by the scripted experts of {self.name}.",
            features=features(self._spec),
            metadata=tfds.core.MetadataDict(metadata(self._spec)),
        )

    def _split_generators(self, download: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del download
        return {
            split: map(example, tqdm(files, desc=f"writing {split}", unit="episode"))
            for split, files in self._files.items()
        }

    def _example_writer(self) -> ExampleWriter:
        return EqualBytes(self.info.file_format)

    def _generate_examples(self, **_: Any) -> Any:
        raise NotImplementedError("_split_generators returns generators")


def prepare(builder: tfds.core.GeneratorBasedBuilder, beam_options: Any = None) -> Path:
    """Writes the dataset of a builder and returns its folder; ``beam_options`` are those of one that uses Beam.

    Raises:
      OSError: the folder cannot be written to, or the disk is full.
    """
    tfds.disable_progress_bar()
    # Files are small, so that every process of a large run has several and a shuffle mixes many of them.
    config = tfds.download.DownloadConfig(
        try_download_gcs=False, max_shard_size=32 * 2**20, beam_options=beam_options
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints about downloads
            builder.download_and_prepare(download_config=config)
    except (tf.errors.OpError, RuntimeError) as error:  # TFDS raises RuntimeError from OpError
        cause = error.__cause__ or error
        if not isinstance(cause, tf.errors.OpError):
            raise
        raise OSError(cause.message.partition("\n")[0]) from None
    return Path(builder.data_dir)


def features(env: EnvSpec) -> tfds.features.FeaturesDict:
    """Returns the RLDS features of an environment's episodes.

    ``action`` is the label: the expert's action without noise. ``executed_action`` is what the simulator executed, and
    ``reward`` is the reward for that. Actions are in the environment's own units; multiplied by ``action_scale`` of
    ``metadata.json`` they are in physical units. A discrete action is an index into ``choices`` of ``metadata.json``,
    stored exactly as float32[1]. Every step has an action, the last one too.
    """
    images = {
        camera: tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg")
        for camera, size in ((camera, env.size_of(camera)) for camera in env.cameras)
    }
    action = tfds.features.Tensor(shape=(len(env.action_names),), dtype=np.float32)
    proprio = tfds.features.Tensor(shape=(len(env.proprio_names),), dtype=np.float32)
    return tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(
                {
                    "observation": {"image": images, "proprio": proprio},
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


def example(path: Path) -> tuple[str, dict[str, Any]]:
    """Turns ``<task>/<episode>.npz`` into (key, example). JPEG bytes are copied unchanged."""
    task, episode = path.parent.name, int(path.stem)
    arrays = recording.load(path)
    cameras = [key.partition("/")[2] for key in arrays if key.startswith("jpeg/")]
    ends = {camera: np.cumsum(arrays[f"jpeg_sizes/{camera}"]) for camera in cameras}
    instruction = str(arrays["instruction"])
    length = len(arrays["action"])

    def jpeg(camera: str, step: int) -> io.BytesIO:  # TFDS stores a file of bytes unchanged
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
    episode_metadata = {"task": task, "episode": episode} | {
        key: arrays[key] for key in ("configuration", "seed", "success")
    }
    return f"{task}-{episode:06d}", {"steps": steps, "episode_metadata": episode_metadata}
