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
_LISTED = 20  # faults in an error


@dataclasses.dataclass(frozen=True)
class Actions:
    """All n steps of a split in file order, without images.

    A segment is the steps of one episode under one instruction, which may change inside an episode: S segments.
    """

    action: Float[np.ndarray, "n A"]  # float32, in the environment's own units
    segment: Int[np.ndarray, " n"]  # int32, index of the step's segment, below S

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


def read_actions(dataset: Dataset, split: str) -> Actions:
    """Reads the actions of a whole split, without images.

    Host memory: 4 (A + 2) bytes per step, and twice that of the actions for a moment at the end.

    Raises:
      UserError: see ``read_episodes``.
    """
    actions, begins = [], []
    for _, episode in read_episodes(dataset, dataset.split(split), images=False):
        actions.append(episode["action"])
        begins.append(begins_segment(episode["texts"]))
    return Actions(
        action=np.concatenate(actions),
        segment=np.cumsum(np.concatenate(begins), dtype=np.int32) - 1,
    )


def read_segments(dataset: Dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the episode and the number of steps of each segment of a split, int64[S] both.

    Raises:
      UserError: see ``read_episodes``.
    """
    numbers, steps = [], []
    for number, (_, episode) in enumerate(
        read_episodes(dataset, dataset.split(split), images=False)
    ):
        begins = np.flatnonzero(begins_segment(episode["texts"]))
        steps.append(np.diff(begins, append=len(episode["action"])))
        numbers.append(np.full(len(begins), number))
    return np.concatenate(numbers), np.concatenate(steps)


def begins_segment(texts: np.ndarray) -> Bool[np.ndarray, " L"]:
    """Returns at which steps of an episode another instruction of K begins, [L, K]; the first step is one of them."""
    return np.concatenate([[True], (texts[1:] != texts[:-1]).any(axis=1)])


def read_episodes(
    dataset: Dataset, split: Split, images: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (location, episode) for every record in order, as checked numpy arrays; see ``Layout.parse``.

    The location is the file and the number of the record in it, for error messages. ``instruction`` has one text a
    step, as evaluation chooses it; ``texts`` has all of them, [L, K].

    Raises:
      UserError: a file cannot be read; a record is corrupt or does not match ``features.json``; or records have keys of
        different lengths, numbers that are not finite, or texts that are not UTF-8. After the first record with such a
        fault the rest of the split is read, and all faults are listed with file, record, task, step and key.
    """

    @as_written
    def parse(number: tf.Tensor, record: tf.Tensor) -> dict[str, Any]:
        episode = dataset.layout.parse(record, images)
        texts = episode["instruction"]
        return {**episode, "texts": texts, "instruction": choose_text(texts)}

    faults: list[str] = []
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
        faults += _faults(location, episode)
        if not faults:
            yield location, episode
    if faults:
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise UserError(
            f"{'; '.join(faults[:_LISTED])}{more}; correct the dataset, or generate it again"
        )


def _faults(location: str, episode: dict[str, Any]) -> list[str]:
    """Returns what is wrong with an episode: its lengths, or else the first fault of each key."""
    location = f"{location} (task {episode['task'].decode(errors='replace')!r})"
    numbers = {"action": episode["action"], "proprio": episode["proprio"]}
    lengths = {key: len(values) for key, values in numbers.items()}
    lengths["instruction"] = len(episode["texts"])
    lengths |= {f"camera {name}": len(encoded) for name, encoded in episode["images"].items()}
    if len(set(lengths.values())) != 1 or not lengths["action"]:
        listing = ", ".join(f"{key} {length}" for key, length in lengths.items())
        return [
            f"{location}: expected the same number of steps, at least one, for every key, found {listing}"
        ]
    faults = []
    for key, values in numbers.items():
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            step, dimension = bad[0]
            faults.append(
                f"{location}, step {step}: {key}[{dimension}]: expected a finite number, found "
                f"{values[step, dimension]}"
            )
    texts = {"task": [episode["task"]], "instruction": episode["texts"].flat}
    for key, values in texts.items():
        try:
            b"\n".join(dict.fromkeys(values)).decode()
        except UnicodeDecodeError as error:
            faults.append(f"{location}: {key}: expected UTF-8, found {error.reason}")
    return faults


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
