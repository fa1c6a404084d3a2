"""Reads CALVIN's own files (https://github.com/mees/calvin, arXiv 2112.03227), as its datasets are downloaded.

    training/ validation/          a split each; either may be missing
      episode_0000000.npz, ...     one frame each: rgb_static, rgb_gripper, robot_obs, scene_obs, rel_actions, actions
      ep_start_end_ids.npy         int[n, 2]: the first and last frame of each recording
      lang_annotations/auto_lang_ann.npy   a dictionary: sentences, tasks, and the first and last frame of each
      scene_info.npy               a dictionary: scene to its first and last frame

An episode is the frames of one annotation. Play without a sentence, depth and touch are left out.
"""

import dataclasses
import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from data_pipelines.writing import recording
from mllm_act.errors import UserError

FOLDERS = {"training": "train", "validation": "val"}  # to the splits of the RLDS dataset
CAMERAS = ("rgb_static", "rgb_gripper")
NUMBERS = {"robot_obs": 15, "scene_obs": 24, "rel_actions": 7, "actions": 7}  # and their widths
ANNOTATIONS = "lang_annotations/auto_lang_ann.npy"
RECORDINGS = "ep_start_end_ids.npy"
SCENES = "scene_info.npy"
FIX = "download the dataset again, or repair it"
_LISTED = 20  # faults in an error
_LARGEST = 100_000_000  # bytes; for an array of a frame
# What a pickled numpy array of Python objects is made of. A pickle may name any function, and loading it calls it.
_HARMLESS = {
    ("numpy", "ndarray"), ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Episode:
    """An annotation: the frames from ``first`` to ``last``, both included, of a folder."""

    folder: str
    number: int
    first: int
    last: int
    sentence: str
    task: str
    scene: str

    @property
    def name(self) -> str:
        return f"{self.folder}, annotation {self.number} ({self.sentence!r})"


@dataclasses.dataclass(frozen=True)
class Source:
    """CALVIN's files in ``folder``; ``digest`` is that of the annotations, for which see ``open_source``."""

    folder: Path
    episodes: tuple[Episode, ...]
    digest: str


def open_source(folder: Path) -> Source:
    """Reads the annotations.

    Raises:
      UserError: there is no CALVIN dataset, or its files have faults, all of which are listed.
    """
    folders = [name for name in FOLDERS if (folder / name).is_dir()]
    if not folders:
        raise UserError(
            f"--source={folder}: expected a CALVIN dataset, a folder with training/ or validation/, found neither; "
            "name the folder that contains them, such as task_ABC_D"
        )
    faults: list[str] = []
    digest, episodes = hashlib.sha256(), []
    for name in folders:
        files = [folder / name / file for file in (ANNOTATIONS, RECORDINGS, SCENES)]
        for file in files:
            digest.update(file.read_bytes() if file.is_file() else b"none")
        episodes += _episodes(folder / name, faults)
    if not episodes and not faults:
        faults.append(f"{ANNOTATIONS}: expected at least one annotation, found none")
    if faults:
        raise faulty(folder, faults)
    return Source(folder, tuple(episodes), digest.hexdigest())


def faulty(folder: Path, faults: list[str]) -> UserError:
    """Returns the error that lists the faults of a dataset."""
    more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    return UserError(
        f"{folder}: expected a CALVIN dataset without faults, found {len(faults)}: "
        f"{'; '.join(faults[:_LISTED])}{more}; {FIX}"
    )


def _episodes(folder: Path, faults: list[str]) -> list[Episode]:
    """Returns the annotations of a split; adds what is wrong with them to ``faults``."""
    where = f"{folder.name}/{ANNOTATIONS}"
    try:
        tree = _dictionary(folder / ANNOTATIONS)
        texts = {key: [_text(text) for text in tree["language"][key]] for key in ("ann", "task")}
        ranges = _ranges(tree["info"]["indx"])
        recordings = _ranges(np.load(folder / RECORDINGS))
        scenes = {}
        if (folder / SCENES).exists():  # the dataset of one scene may lack it
            scenes = {str(k): _ranges([v])[0] for k, v in _dictionary(folder / SCENES).items()}
    except Exception as error:  # what numpy and pickle raise for damaged files is not documented
        faults.append(
            f"{folder.name}: expected {ANNOTATIONS} and {RECORDINGS}, found {_line(error)}"
        )
        return []
    if not len(ranges) == len(texts["ann"]) == len(texts["task"]):
        faults.append(
            f"{where}: expected a sentence, a task and a range each, found {len(texts['ann'])}, {len(texts['task'])} "
            f"and {len(ranges)}"
        )
        return []
    episodes = []
    rows = zip(ranges.tolist(), texts["ann"], texts["task"], strict=True)
    for number, ((first, last), sentence, task) in enumerate(rows):
        inside = ((recordings[:, 0] <= first) & (last <= recordings[:, 1])).any()
        if not first <= last or not inside:
            faults.append(
                f"{where}: annotation {number}: expected frames of one recording, found {first} to {last}"
            )
        scene = next((k for k, (low, high) in scenes.items() if low <= first <= high), "")
        episodes.append(Episode(folder.name, number, first, last, sentence, task, scene))
    return episodes


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} in place of a text")
    return str(value)


def _ranges(values: Any) -> Int[np.ndarray, "n 2"]:
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"ranges of the shape {array.shape} and dtype {array.dtype}")
    return array.astype(np.int64)


class _Unpickler(pickle.Unpickler):
    """Loads what a pickled numpy array is made of, and nothing that a pickle could do harm with."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(
                f"the name {module}.{name}, which a pickle of numpy arrays does not need"
            )
        return super().find_class(module, name)


def _dictionary(path: Path) -> dict[str, Any]:
    """Returns the dictionary in a .npy file with one Python object."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version} of numpy's format")
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
        if not dtype.hasobject:
            raise ValueError(f"an array of {dtype} in place of a dictionary")
        value = _Unpickler(file).load()
    value = value.item() if isinstance(value, np.ndarray) else value
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} in place of a dictionary")
    return value


def serve(folder: Path) -> Callable[[tuple[Episode, str]], list[str]]:
    """Returns a worker's handler (see ``mllm_act.envs.processes``): (episode, file) writes the arrays of an episode.

    The answer is the faults of the episode. The file is written, whole or not at all, if there are none.
    """

    def handle(request: tuple[Episode, str]) -> list[str]:
        episode, file = request
        arrays, faults = read(folder, episode)
        if not faults:
            recording.save(Path(file), arrays)
        return faults

    return handle


def read(folder: Path, episode: Episode) -> tuple[dict[str, Any], list[str]]:
    """Reads the L frames of an episode.

    Returns:
      The arrays, and the faults found, each in one line. The arrays are ``robot_obs``, ``scene_obs``, ``rel_actions``
      and ``actions``, float32[L, n]; and for each camera ``image/<camera>`` uint8[bytes], all JPEG files concatenated,
      ``image_sizes/<camera>`` int64[L], and ``image_shape/<camera>`` int64[2], height and width.
    """
    faults: list[str] = []
    numbers: dict[str, list[np.ndarray]] = {key: [] for key in NUMBERS}
    jpegs: dict[str, list[bytes]] = {camera: [] for camera in CAMERAS}
    shapes: dict[str, set[tuple[int, ...]]] = {camera: set() for camera in CAMERAS}
    for frame in range(episode.first, episode.last + 1):
        name = f"{episode.folder}/episode_{frame:07d}.npz"
        try:
            with np.load(folder / name) as file:
                largest = max(member.file_size for member in file.zip.infolist())
                if largest > _LARGEST:
                    raise ValueError(f"an array of {largest:,} bytes, more than {_LARGEST:,}")
                for key, width in NUMBERS.items():
                    numbers[key].append(_vector(key, file[key], width))
                if abs(gripper := numbers["rel_actions"][-1][6]) != 1:
                    raise ValueError(f"rel_actions with the gripper at {gripper:g}, not -1 or 1")
                for camera in CAMERAS:
                    image = file[camera]
                    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                        raise ValueError(f"{camera} of {image.dtype} and the shape {image.shape}")
                    jpegs[camera].append(_jpeg(image))
                    shapes[camera].add(image.shape[:2])
        except Exception as error:  # as above; zipfile has its own, too
            faults.append(f"{name}: expected a frame of {episode.name}, found {_line(error)}")
    for camera, found in shapes.items():
        if len(found) > 1:
            faults.append(
                f"{episode.name}: {camera}: expected images of one size, found {sorted(found)}"
            )
    if faults:
        return {}, faults
    arrays: dict[str, Any] = {key: np.stack(values) for key, values in numbers.items()}
    for camera, encoded in jpegs.items():
        arrays[f"image/{camera}"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"image_sizes/{camera}"] = np.array([len(data) for data in encoded])
        arrays[f"image_shape/{camera}"] = np.array(next(iter(shapes[camera])))
    return arrays, []


def _vector(key: str, values: np.ndarray, width: int) -> np.ndarray:
    if values.shape != (width,):
        raise ValueError(f"{key} of the shape {values.shape} in place of ({width},)")
    if not np.isfinite(values).all():
        raise ValueError(f"{key} with {values[~np.isfinite(values)][0]}")
    return values.astype(np.float32)


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=recording.JPEG_QUALITY)
    return buffer.getvalue()


def _line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no {Path(error.filename).name}"
    return str(error).partition("\n")[0][:300] or type(error).__name__
