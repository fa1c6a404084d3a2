"""Reads and checks episodes from the TFRecord files of an RLDS dataset."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from data_pipelines.reading.layout import choose_text, decode_image, image_size
from data_pipelines.reading.records import FIX
from data_pipelines.reading.rlds import Dataset
from data_pipelines.reading.splits import Split
from data_pipelines.tensorflow_cpu import as_written, tf
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
    instructions: tuple[str, ...]  # each once, sorted; "" where there are none
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

    Host memory: 4 (A + P + 2) bytes per step, and twice that of the actions for a moment at the end.

    Raises:
      UserError: a record is corrupt, or an action or proprioception is not finite.
    """
    actions, proprio, begins, tasks = [], [], [], []
    texts: set[bytes] = set()
    for _, episode in read_episodes(dataset, dataset.split(split), images=False):
        actions.append(episode["action"])
        proprio.append(episode["proprio"])
        begins.append(_begins_segment(episode["instruction"]))
        tasks.append(episode["task"].decode())
        texts.update(episode["texts"].flat or [b""])
    lengths = np.array([len(action) for action in actions], np.int32)
    return Actions(
        action=np.concatenate(actions),
        proprio=np.concatenate(proprio),
        episode=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        segment=np.cumsum(np.concatenate(begins), dtype=np.int32) - 1,
        tasks=tuple(tasks),
        instructions=tuple(sorted(text.decode() for text in texts)),
        lengths=lengths,
    )


def _begins_segment(instruction: np.ndarray) -> Bool[np.ndarray, " L"]:
    """Returns at which steps of an episode another instruction begins; the first step is one of them."""
    return np.concatenate([[True], instruction[1:] != instruction[:-1]])


def read_episodes(
    dataset: Dataset, split: Split, images: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (location, episode) for every record in order, as checked numpy arrays; see ``Layout.parse``.

    The location is the file and the number of the record in it, for error messages. ``instruction`` has one text a
    step, as evaluation chooses it; ``texts`` has all of them, [L, K].

    Raises:
      UserError: a file cannot be read; a record is corrupt, does not match ``features.json``, has keys of different
        lengths, or holds a number that is not finite or a text that is not UTF-8. The message has file and record, and
        task, step and key where they are known.
    """

    @as_written
    def parse(number: tf.Tensor, record: tf.Tensor) -> dict[str, Any]:
        episode = dataset.layout.parse(record, images)
        texts = episode["instruction"]
        return {**episode, "texts": texts, "instruction": choose_text(texts)}

    records = split.records(tf.range(len(split), dtype=tf.int64))
    parsed = iter(records.map(parse).prefetch(2))
    for number in range(len(split)):
        location = split.location(number)
        try:
            episode = tf.nest.map_structure(lambda tensor: tensor.numpy(), next(parsed))
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
        except StopIteration:
            raise UserError(
                f"{location}: expected a record, found the end of the file; {FIX}"
            ) from None
        _check_episode(location, episode)
        yield location, episode


def _check_episode(location: str, episode: dict[str, Any]) -> None:
    location = f"{location} (task {episode['task'].decode(errors='replace')!r})"
    numbers = {"action": episode["action"], "proprio": episode["proprio"]}
    lengths = {key: len(values) for key, values in numbers.items()}
    lengths["instruction"] = len(episode["texts"])
    lengths |= {f"camera {name}": len(encoded) for name, encoded in episode["images"].items()}
    if len(set(lengths.values())) != 1 or not lengths["action"]:
        listing = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise UserError(
            f"{location}: expected the same number of steps, at least one, for every key, found {listing}; {FIX}"
        )
    for key, values in numbers.items():
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            step, dimension = bad[0]
            raise UserError(
                f"{location}, step {step}: {key}[{dimension}]: expected a finite number, found "
                f"{values[step, dimension]}; correct the dataset, or generate it again"
            )
    for key, text in (
        ("task", episode["task"]),
        *(("instruction", x) for x in episode["texts"].flat),
    ):
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{location}: {key}: expected UTF-8, found {error}; {FIX}") from None


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
        found = str(shape)
        try:
            height, width = image_size(encoded).numpy().tolist()
            found = str((height, width, 3))
            decode_image(encoded, shape)
        except READ_ERRORS as error:
            found = _first_line(error) if found == str(shape) else found
        if found != str(shape):
            raise UserError(
                f"{location}, step {step}: camera {camera}: expected an image of shape {shape}, found {found}; {FIX}"
            )


def _first_line(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "a record that cannot be parsed"
    line = message.strip().splitlines()[0].split(" [Op:")[0]
    return re.sub(r"\{\{.*?\}\} ?", "", line)[:300]  # names of nodes in TensorFlow's graph
