"""Reads episodes from the TFRecord files of an RLDS dataset, and names what is wrong with one."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from data_pipelines.reading.records import MEND
from data_pipelines.reading.rlds import ACTION, EPISODE, IMAGE, INSTRUCTION, PROPRIO, Dataset, Split
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError
from mllm_act.normalization import expect_chunk


@dataclasses.dataclass(frozen=True)
class Actions:
    """All steps of a split in the order of its files, without images; E episodes, n steps."""

    action: Float[np.ndarray, "n A"]  # float32, in the environment's own numbers
    proprio: Float[np.ndarray, "n P"]  # float32
    episode: Int[np.ndarray, " n"]  # int32, which of the E episodes the step belongs to
    tasks: tuple[str, ...]  # [E]
    instructions: tuple[str, ...]  # [E], of the first step
    configurations: Int[np.ndarray, " E"]  # int32
    lengths: Int[np.ndarray, " E"]  # int32, steps

    def chunked(self, chunk: int) -> Float[np.ndarray, "n C"]:
        """Returns of each step its action and the ``chunk`` - 1 that follow in one row, float32[n, chunk * A].

        Time comes first: ``row.reshape(chunk, A)``. Past its end an episode's last action is repeated, as in the
        pipeline's batches. Host memory: twice the 4 ``chunk`` A bytes a step of the result.

        Raises:
          UserError: if ``chunk`` is below 1.
        """
        expect_chunk(chunk)
        step, last = np.arange(len(self.action)), np.cumsum(self.lengths)[self.episode] - 1
        ahead = [self.action[np.minimum(step + further, last)] for further in range(chunk)]
        return np.concatenate(ahead, axis=1)


def read_actions(dataset: Dataset, split: str) -> Actions:
    """Reads the actions and proprioception of a whole split; images are neither decoded nor kept.

    Host memory: 4 (A + P + 1) bytes a step.

    Raises:
      UserError: a corrupt record; a NaN or infinite action or proprioception.
    """
    episodes = [one for _, one in read_episodes(dataset, dataset.split(split), images=False)]
    lengths = np.array([len(one["action"]) for one in episodes], np.int32)
    return Actions(
        action=np.concatenate([one["action"] for one in episodes]),
        proprio=np.concatenate([one["proprio"] for one in episodes]),
        episode=np.repeat(np.arange(len(episodes), dtype=np.int32), lengths),
        tasks=tuple(one["task"].decode() for one in episodes),
        instructions=tuple(one["instruction"][0].decode() for one in episodes),
        configurations=np.array([one["configuration"] for one in episodes], np.int32),
        lengths=lengths,
    )


def parse(record: tf.Tensor, dataset: Dataset, images: bool = True) -> dict[str, Any]:
    """Parses one episode of L steps; images stay encoded.

    Returns:
      ``images`` {camera: string[L]}, ``action`` float32[L, A], ``proprio`` float32[L, P],
      ``instruction`` string[L], ``task`` string[], ``configuration`` and ``episode`` int64[].
    """

    def steps(shape: tuple[int, ...], dtype: tf.DType) -> tf.io.FixedLenSequenceFeature:
        return tf.io.FixedLenSequenceFeature(shape, dtype, allow_missing=True)

    spec = {
        ACTION: steps((dataset.action_dim,), tf.float32),
        PROPRIO: steps((dataset.proprio_dim,), tf.float32),
        INSTRUCTION: steps((), tf.string),
        EPISODE + "task": tf.io.FixedLenFeature((), tf.string),
        EPISODE + "configuration": tf.io.FixedLenFeature((), tf.int64),
        EPISODE + "episode": tf.io.FixedLenFeature((), tf.int64),
    }
    cameras = dataset.cameras if images else ()
    spec.update({IMAGE + camera: steps((), tf.string) for camera in cameras})
    found = tf.io.parse_single_example(record, spec)
    return {
        "images": {camera: found[IMAGE + camera] for camera in cameras},
        "action": found[ACTION],
        "proprio": found[PROPRIO],
        "instruction": found[INSTRUCTION],
        "task": found[EPISODE + "task"],
        "configuration": found[EPISODE + "configuration"],
        "episode": found[EPISODE + "episode"],
    }


def read_episodes(
    dataset: Dataset, split: Split, images: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, episode) as numpy, file by file in order, each checked.

    Raises:
      UserError: naming file and record, and the key, task, episode and step where there is one.
    """
    for path in split.files:
        records = tf.data.TFRecordDataset(str(path))
        parsed = iter(records.map(lambda record: parse(record, dataset, images)).prefetch(2))
        number = -1
        while True:
            number += 1
            where = f"{path}: record {number}"
            try:
                one = tf.nest.map_structure(lambda tensor: tensor.numpy(), next(parsed))
            except StopIteration:
                break
            except tf.errors.DataLossError as error:
                raise UserError(f"{where} is corrupt: {_line(error)}; {MEND}") from None
            except tf.errors.InvalidArgumentError as error:
                raise UserError(
                    f"{where}: expected what features.json says, found {_line(error)}; {MEND}"
                ) from None
            _check(where, one)
            yield where, one


def _check(where: str, episode: dict[str, Any]) -> None:
    where = f"{where} (task {episode['task'].decode()!r}, episode {episode['episode']})"
    per_step = {ACTION: episode["action"], PROPRIO: episode["proprio"]}
    lengths = {key: len(values) for key, values in per_step.items()}
    lengths[INSTRUCTION] = len(episode["instruction"])
    lengths |= {IMAGE + camera: len(encoded) for camera, encoded in episode["images"].items()}
    if len(set(lengths.values())) != 1 or not lengths[ACTION]:
        found = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise UserError(
            f"{where}: expected the same number of steps, at least one, of each key, "
            f"found {found}; {MEND}"
        )
    for key, values in per_step.items():
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            step, dimension = bad[0]
            raise UserError(
                f"{where}, step {step}: {key}[{dimension}]: expected a finite number, found "
                f"{values[step, dimension]}; write the dataset anew with "
                "python -m data_pipelines.generate"
            )


def explain(dataset: Dataset, split: Split, error: Exception) -> UserError:
    """Finds the record that stopped the pipeline, by reading the split once more, and names it."""
    try:
        for where, episode in read_episodes(dataset, split):
            for camera, frames in episode["images"].items():
                _check_images(where, camera, frames, dataset.image_shapes[camera])
    except UserError as found:
        return found
    return UserError(
        f"{dataset.directory}: reading split {split.name!r} failed, found {_line(error)}; "
        "every record read well a second time: look at the disk, then start again"
    )


def _check_images(where: str, camera: str, frames: Any, shape: tuple[int, int, int]) -> None:
    for step, encoded in enumerate(frames):
        try:
            found = str(tuple(tf.io.decode_jpeg(encoded).shape))
        except tf.errors.InvalidArgumentError as error:
            found = _line(error)
        if found != str(shape):
            raise UserError(
                f"{where}, step {step}: {IMAGE}{camera}: expected a JPEG image of shape {shape}, "
                f"found {found}; {MEND}"
            )


def _line(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    return message.strip().splitlines()[0].split(" [Op:")[0]
