"""Reads and checks episodes from the TFRecord files of an RLDS dataset."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from data_pipelines.reading.records import FIX
from data_pipelines.reading.rlds import ACTION, EPISODE, IMAGE, INSTRUCTION, PROPRIO, Dataset, Split
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError
from mllm_act.normalization import expect_chunk

# What a stage that reads records raises. TensorFlow's message may quote a damaged record, which then is no UTF-8.
READ_ERRORS = (tf.errors.OpError, UnicodeDecodeError)


@dataclasses.dataclass(frozen=True)
class Actions:
    """All steps of a split in file order, without images: E episodes, n steps.

    A segment is the steps of one episode under one instruction, which may change inside an episode: S segments.
    """

    action: Float[np.ndarray, "n A"]  # float32, in the environment's own units
    proprio: Float[np.ndarray, "n P"]  # float32
    episode: Int[np.ndarray, " n"]  # int32, index of the step's episode, below E
    segment: Int[np.ndarray, " n"]  # int32, index of the step's segment, below S
    tasks: tuple[str, ...]  # [E]
    instructions: tuple[str, ...]  # [S]
    configurations: Int[np.ndarray, " E"]  # int32
    lengths: Int[np.ndarray, " E"]  # int32, steps per episode

    def chunked(self, chunk: int) -> Float[np.ndarray, "n C"]:
        """Returns each step's action and the ``chunk`` - 1 that follow it, one row per step: float32[n, chunk * A].

        Time is the first axis: ``row.reshape(chunk, A)``. Past the end of an episode, or of its instruction, the last
        action is repeated, as in the batches of the pipeline. Host memory: 8 ``chunk`` A bytes per step, twice the size
        of the result.

        Raises:
          UserError: ``chunk`` is below 1.
        """
        expect_chunk(chunk)
        step, last = (
            np.arange(len(self.action)),
            np.cumsum(np.bincount(self.segment))[self.segment] - 1,
        )
        columns = [self.action[np.minimum(step + offset, last)] for offset in range(chunk)]
        return np.concatenate(columns, axis=1)

    def windows(self, context: int) -> Int[np.ndarray, " E"]:
        """Returns how many windows of ``context`` steps each episode is cut into, from its first step on."""
        of_segment = -(-np.bincount(self.segment) // context)
        begins = np.flatnonzero(np.diff(self.segment, prepend=-1))
        return np.bincount(self.episode[begins], weights=of_segment).astype(np.int64)


def read_actions(dataset: Dataset, split: str) -> Actions:
    """Reads the actions and proprioception of a whole split, without images.

    Host memory: 4 (A + P + 1) bytes per step.

    Raises:
      UserError: a record is corrupt, or an action or proprioception is not finite.
    """
    records = read_episodes(dataset, dataset.split(split), images=False)
    episodes = [episode for _, episode in records]
    lengths = np.array([len(episode["action"]) for episode in episodes], np.int32)
    begins = np.concatenate([_begins_segment(episode["instruction"]) for episode in episodes])
    texts = np.concatenate([episode["instruction"] for episode in episodes])
    return Actions(
        action=np.concatenate([episode["action"] for episode in episodes]),
        proprio=np.concatenate([episode["proprio"] for episode in episodes]),
        episode=np.repeat(np.arange(len(episodes), dtype=np.int32), lengths),
        segment=np.cumsum(begins, dtype=np.int32) - 1,
        tasks=tuple(episode["task"].decode() for episode in episodes),
        instructions=tuple(text.decode() for text in texts[begins]),
        configurations=np.array([episode["configuration"] for episode in episodes], np.int32),
        lengths=lengths,
    )


def _begins_segment(instruction: np.ndarray) -> Bool[np.ndarray, " L"]:
    """Returns at which steps of an episode another instruction begins; the first step is one of them."""
    return np.concatenate([[True], instruction[1:] != instruction[:-1]])


def parse(record: tf.Tensor, dataset: Dataset, images: bool = True) -> dict[str, Any]:
    """Parses one episode of L steps, as tensors. Images stay encoded.

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
    values = tf.io.parse_single_example(record, spec)
    return {
        "images": {camera: values[IMAGE + camera] for camera in cameras},
        "action": values[ACTION],
        "proprio": values[PROPRIO],
        "instruction": values[INSTRUCTION],
        "task": values[EPISODE + "task"],
        "configuration": values[EPISODE + "configuration"],
        "episode": values[EPISODE + "episode"],
    }


def read_episodes(
    dataset: Dataset, split: Split, images: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (location, episode) for every record in file order, as checked numpy arrays.

    The location is the file and the number of the record in it, for error messages.

    Raises:
      UserError: a file cannot be read; a record is corrupt, does not match ``features.json``, has keys of different
        lengths, or holds a number that is not finite or a text that is not UTF-8. The message has file and record, and
        task, episode, step and key where they are known.
    """
    for path in split.files:
        records = tf.data.TFRecordDataset(str(path))
        parsed = iter(records.map(lambda record: parse(record, dataset, images)).prefetch(2))
        number = -1
        while True:
            number += 1
            location = f"{path}: record {number}"
            try:
                episode = tf.nest.map_structure(lambda tensor: tensor.numpy(), next(parsed))
            except StopIteration:
                break
            except tf.errors.DataLossError as error:
                raise UserError(f"{location} is corrupt: {_first_line(error)}; {FIX}") from None
            except (tf.errors.InvalidArgumentError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{location}: expected the features of features.json, found {_first_line(error)}; {FIX}"
                ) from None
            except tf.errors.OpError as error:  # deleted, for example, since the dataset was opened
                raise UserError(
                    f"{location}: expected to read it, found {_first_line(error)}; {FIX}"
                ) from None
            _check_episode(location, episode)
            yield location, episode


def _check_episode(location: str, episode: dict[str, Any]) -> None:
    task = episode["task"].decode(errors="replace")
    location = f"{location} (task {task!r}, episode {episode['episode']})"
    per_step = {ACTION: episode["action"], PROPRIO: episode["proprio"]}
    lengths = {key: len(values) for key, values in per_step.items()}
    lengths[INSTRUCTION] = len(episode["instruction"])
    lengths |= {IMAGE + camera: len(encoded) for camera, encoded in episode["images"].items()}
    if len(set(lengths.values())) != 1 or not lengths[ACTION]:
        listing = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise UserError(
            f"{location}: expected the same number of steps, at least one, for every key, found {listing}; {FIX}"
        )
    for key, values in per_step.items():
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            step, dimension = bad[0]
            raise UserError(
                f"{location}, step {step}: {key}[{dimension}]: expected a finite number, found "
                f"{values[step, dimension]}; regenerate the dataset with python -m data_pipelines.generate"
            )
    for step, text in enumerate((episode["task"], *episode["instruction"]), -1):
        try:
            text.decode()
        except UnicodeDecodeError as error:
            key = EPISODE + "task" if step < 0 else f"step {step}: {INSTRUCTION}"
            raise UserError(f"{location}: {key}: expected UTF-8, found {error}; {FIX}") from None
    if not -(2**31) <= episode["configuration"] < 2**31:
        raise UserError(
            f"{location}: {EPISODE}configuration: expected an int32, found {episode['configuration']}; {FIX}"
        )


def explain(dataset: Dataset, split: Split, error: Exception) -> UserError:
    """Reads the split again to find the record that stopped the pipeline; returns the error that describes it."""
    try:
        for location, episode in read_episodes(dataset, split):
            for camera, images in episode["images"].items():
                _check_images(location, camera, images, dataset.image_shapes[camera])
    except UserError as explanation:
        return explanation
    return UserError(
        f"{dataset.directory}: expected to read split {split.name!r}, found {_first_line(error)}; "
        "a second read found no error: check the disk, then start again"
    )


def _check_images(location: str, camera: str, images: Any, shape: tuple[int, int, int]) -> None:
    for step, encoded in enumerate(images):
        try:
            # Before decoding: a few hundred bytes can ask for half a gigabyte.
            height, width, _ = tf.io.extract_jpeg_shape(encoded).numpy().tolist()
            result = str((height, width, 3))  # the decoder turns grey into colour
            if result == str(shape):
                tf.io.decode_jpeg(encoded, channels=3)
        except READ_ERRORS as error:
            result = _first_line(error)
        if result != str(shape):
            raise UserError(
                f"{location}, step {step}: {IMAGE}{camera}: expected a JPEG image of shape {shape}, "
                f"found {result}; {FIX}"
            )


def _first_line(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "a record that cannot be parsed"
    line = message.strip().splitlines()[0].split(" [Op:")[0]
    return re.sub(r"\{\{.*?\}\} ?", "", line)[:300]  # names of nodes in TensorFlow's graph
