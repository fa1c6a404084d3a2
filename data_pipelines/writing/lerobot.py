"""Reads what a LeRobot dataset says about itself: features, tasks, and where each episode is.

Layouts, as in https://github.com/huggingface/lerobot at 7427f31 (docs/source/lerobot-dataset-v3.mdx,
src/lerobot/datasets, and src/lerobot/scripts/convert_dataset_v21_to_v30.py, which names the differences):

    meta/info.json              codebase_version, fps, features {key: dtype, shape, names}, data_path, video_path
    meta/tasks.jsonl            v2: task_index, task; v3: tasks.parquet, whose index has the sentences
    meta/episodes.jsonl         v2: episode_index, length; each episode has a parquet file, and an mp4 for each camera
    meta/episodes/*/*.parquet   v3: also the files that it shares with other episodes, and its part of each mp4
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.writing.lerobot_features import Feature, read_features
from mllm_act.errors import UserError
from mllm_act.files import read_json

VERSIONS = (
    "v2.0",
    "v2.1",
    "v3.0",
)  # of ``codebase_version``; v2.1 differs from v2.0 in its statistics alone
FIX = "download the dataset again, or repair it"
_PATHS = {
    "v2": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    "v3": (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}
_LARGEST_LINES = 1_000_000_000  # bytes of a .jsonl file


Shapes = dict[str, tuple[int, ...]]  # camera's key -> (height, width)


@dataclasses.dataclass(frozen=True)
class Clip:
    """An episode's part of a video file: the frames from ``start`` to before ``end``, in seconds."""

    file: str
    start: float = 0.0
    end: float = math.inf


@dataclasses.dataclass(frozen=True)
class Episode:
    """Where an episode is: a parquet file, and for each video feature a clip. ``length`` is in rows."""

    index: int
    length: int
    data: str
    clips: Mapping[str, Clip]


@dataclasses.dataclass(frozen=True)
class Source:
    """A LeRobot dataset.

    Attributes:
      folder: of the dataset; the files of episodes are relative to it.
      robot: its name.
      fps: rows per second.
      features: what is imported.
      left_out: features that are not, with the reason.
      tasks: sentences by ``task_index``.
      episodes: in the order of their index.
      splits: name to the indices of episodes.
      digest: SHA-256 of the metadata.
    """

    folder: Path
    robot: str
    fps: float
    features: tuple[Feature, ...]
    left_out: tuple[str, ...]
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...]
    splits: Mapping[str, tuple[int, ...]]
    digest: str

    @property
    def cameras(self) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if f.kind in ("video", "image"))

    def first(self, keys: tuple[str, ...]) -> Feature | None:
        """Returns the first number among some keys that the dataset has."""
        numbers = {f.key: f for f in self.features if f.kind == "number"}
        return next((numbers[key] for key in keys if key in numbers), None)


def open_source(folder: Path) -> Source:
    """Reads the files in ``meta``.

    Raises:
      UserError: a package of the extra ``lerobot`` is missing; there is no dataset, or one of another version; or the
        metadata has faults, all of which are listed.
    """
    for package in ("pyarrow", "av"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"data_pipelines.import_lerobot: expected the package {package}, found it not installed; "
                "pip install 'mllm-act[data,lerobot]'"
            )
    path = folder / "meta/info.json"
    try:
        info = read_json(path, FIX)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: expected this file of a LeRobot dataset, found none; name the folder that contains meta, data "
            "and videos with --source"
        ) from None
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise UserError(
            f"{path}: codebase_version: expected one of {', '.join(VERSIONS)}, found {version!r:.100}; convert the "
            "dataset with the scripts of lerobot"
        )
    problems: list[str] = []
    fps: Any = info.get("fps")
    if type(fps) not in (int, float) or not 0 < fps < math.inf:
        problems.append(f"meta/info.json: fps: expected rows per second, found {fps!r:.100}")
    features, left_out = read_features(info.get("features"), problems)
    files = [path, *_metadata_files(folder, "tasks"), *_metadata_files(folder, "episodes")]
    tasks = _tasks(folder, problems)
    videos = [f.key for f in features if f.kind == "video"]
    episodes = _episodes(folder, version[:2], info, videos, problems)
    splits = _splits(info.get("splits"), [episode.index for episode in episodes], problems)
    total = info.get("total_episodes", len(episodes))
    if total != len(episodes) and not any("meta/episodes" in problem for problem in problems):
        problems.append(
            f"meta/episodes: expected {total!r:.100} episodes as in meta/info.json, found {len(episodes)}"
        )
    if problems:
        raise faulty(folder, problems)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    robot = info.get("robot_type")
    named = isinstance(robot, str) and robot not in ("", "unknown")
    name = str(robot) if named else folder.resolve().name
    return Source(
        folder,
        name,
        float(fps),
        features,
        left_out,
        tasks,
        episodes,
        splits,
        digest.hexdigest(),
    )


def stamp(source: Source, episode: Episode) -> str:
    """Returns a digest of the names, sizes and times of an episode's files: it changes when one of them is replaced."""
    digest = hashlib.sha256(repr(episode).encode())
    for name in (episode.data, *(clip.file for clip in episode.clips.values())):
        path = source.folder / name
        status = path.stat() if path.is_file() else None
        digest.update(repr(status and (status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def image_shapes(arrays: Mapping[str, Any]) -> Shapes:
    """Returns the (height, width) of each camera's images in the arrays of an episode."""
    return {
        key.partition("/")[2]: tuple(value.tolist())
        for key, value in arrays.items()
        if key.startswith("image_shape/")
    }


def faulty(folder: Path, problems: list[str]) -> UserError:
    """Returns the error that lists the faults of a dataset, each once."""
    found = list(dict.fromkeys(problems))
    more = f"; and {len(found) - 200} more" if len(found) > 200 else ""
    return UserError(
        f"{folder}: expected a LeRobot dataset without faults, found {len(found)}: {'; '.join(found[:200])}{more}; "
        f"{FIX}"
    )


def _metadata_files(folder: Path, name: str) -> list[Path]:
    """Returns the files of ``meta/tasks`` or ``meta/episodes``."""
    meta = folder / "meta"
    found = [meta / f"{name}.parquet", meta / f"{name}.jsonl"]
    single = [path for path in found if path.is_file()][:1]
    return single or sorted(meta.glob(f"{name}/*/*.parquet"))


def _rows(folder: Path, name: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of ``meta/tasks`` or ``meta/episodes``, but for the statistics."""
    files = _metadata_files(folder, name)
    if not files:
        problems.append(
            f"meta/{name}: expected meta/{name}.jsonl (v2) or parquet files (v3), found none"
        )
    for path in files:
        where = path.relative_to(folder)
        if path.suffix == ".jsonl":
            if path.stat().st_size > _LARGEST_LINES:
                problems.append(f"{where}: expected at most {_LARGEST_LINES:,} bytes")
                continue
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except (ValueError, RecursionError) as error:
                    problems.append(f"{where}: line {number}: expected JSON, found {error}")
                    continue
                if isinstance(row, dict) and row:
                    yield row
        else:
            yield from _parquet_rows(path, str(where), problems)


def _parquet_rows(path: Path, where: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path, pre_buffer=False)
        names = [n for n in file.schema_arrow.names if not n.startswith("stats/")]
        yield from file.read(columns=names, use_threads=False).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        problems.append(f"{where}: expected a parquet file, found {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _tasks(folder: Path, problems: list[str]) -> dict[int, str]:
    tasks = {}
    for row in _rows(folder, "tasks", problems):
        # pandas calls an index without a name __index_level_0__.
        sentence = row.get("task", row.get("__index_level_0__"))
        if type(row.get("task_index")) is not int or not isinstance(sentence, str):
            problems.append(f"meta/tasks: expected task_index and task, found {row!r:.100}")
        else:
            tasks[row["task_index"]] = sentence
    return tasks


def _episodes(
    folder: Path, layout: str, info: dict[str, Any], videos: list[str], problems: list[str]
) -> tuple[Episode, ...]:
    data_path, video_path = (
        info.get(key) or default
        for key, default in zip(("data_path", "video_path"), _PATHS[layout], strict=True)
    )
    chunk = info.get("chunks_size", 1000)
    if type(chunk) is not int or chunk < 1:
        problems.append(
            f"meta/info.json: chunks_size: expected a number above 0, found {chunk!r:.100}"
        )
        return ()
    found: dict[int, Episode] = {}
    for row in _rows(folder, "episodes", problems):
        try:
            index, length = int(row["episode_index"]), int(row["length"])
            values = {"episode_index": index, "episode_chunk": index // chunk}
            clips = {}
            for key in videos:
                if layout == "v2":
                    clips[key] = Clip(_fill(video_path, values | {"video_key": key}))
                    continue
                place = {n: row[f"videos/{key}/{n}"] for n in ("chunk_index", "file_index")}
                start, end = (float(row[f"videos/{key}/{n}_timestamp"]) for n in ("from", "to"))
                if not 0 <= start < end < math.inf:
                    raise ValueError(f"the clip of {key} from {start} to {end} s")
                clips[key] = Clip(_fill(video_path, place | {"video_key": key}), start, end)
            if layout == "v3":
                values = {n: row[f"data/{n}"] for n in ("chunk_index", "file_index")}
            if index < 0 or length < 1 or index in found:
                raise ValueError("the same index twice" if index in found else "no rows")
            found[index] = Episode(index, length, _fill(data_path, values), clips)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else _first_line(error)
            problems.append(
                f"meta/episodes: episode {row.get('episode_index')!r:.40}: expected its length and files, found "
                f"{reason}"
            )
    if not found and not any("meta/episodes" in problem for problem in problems):
        problems.append("meta/episodes: expected at least one episode, found none")
    return tuple(found[index] for index in sorted(found))


def _fill(template: Any, values: Mapping[str, Any]) -> str:
    """Returns a path from a template such as ``chunk-{chunk_index:03d}``. (``str.format`` would obey any width.)"""

    def value(match: re.Match[str]) -> str:
        found = values[match[1]]
        return f"{int(found):0{int(match[2])}d}" if match[2] else str(found)

    if not isinstance(template, str):
        raise ValueError(f"{template!r:.100} in place of a path")
    path = re.sub(r"\{(\w+)(?::0?(\d)d)?\}", value, template)
    if path.startswith("/") or ".." in PurePosixPath(path).parts or "{" in path:
        raise ValueError(f"the path {path!r:.100} from {template!r:.100}")
    return path


def _splits(tree: Any, episodes: list[int], problems: list[str]) -> dict[str, tuple[int, ...]]:
    """Returns the splits of ``info.json``; an episode that no other split names belongs to ``train``."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        problems.append(f"meta/info.json: splits: expected an object, found {tree!r:.100}")
        return {}
    place = dict.fromkeys(episodes, "train")
    for name, text in tree.items():
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if match is None or not re.fullmatch(r"[A-Za-z]\w*", name):
            problems.append(
                f"meta/info.json: splits: expected a name and FIRST:END, found {name!r:.40}: {text!r:.40}"
            )
        elif name != "train":
            first, end = int(match[1]), int(match[2])
            place |= {index: name for index in episodes if first <= index < end}
    return {
        name: tuple(i for i in episodes if place[i] == name)
        for name in dict.fromkeys(place.values())
    }
