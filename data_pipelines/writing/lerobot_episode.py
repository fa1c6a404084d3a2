"""Reads one episode of a LeRobot dataset: rows from parquet files, frames from mp4 files. Worker processes run this."""

import functools
import io
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import av
import numpy as np
import pyarrow as pa
from jaxtyping import Float
from PIL import Image
from pyarrow import compute, parquet

from data_pipelines.writing import recording
from data_pipelines.writing.lerobot import Clip, Episode, Shapes, Source, image_shapes, stamp
from data_pipelines.writing.lerobot_features import ACTION, REWARDS, STATE, Feature

FORMATS = ("JPEG", "PNG")  # of images in parquet files, which are copied unchanged
MODES = ("1", "L", "P", "RGB", "RGBA")  # of theirs: what decodes to 8-bit colours
_LARGEST_EPISODE = 2**31 - 2**24  # bytes; a record is one protocol buffer
_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,  # PIL raises it for a broken PNG
    pa.ArrowException,
    av.FFmpegError,
    Image.DecompressionBombError,
)
_T = TypeVar("_T")


def serve(source: Source) -> Callable[[tuple[Episode, str]], tuple[list[str], Shapes]]:
    """Returns a worker's handler (see ``mllm_act.envs.processes``): (episode, file) writes the arrays of an episode.

    The answer is the faults of the episode and the shapes of its images. The file is written, whole or not at all, if
    there are no faults.
    """

    def handle(request: tuple[Episode, str]) -> tuple[list[str], Shapes]:
        episode, file = request
        arrays, faults = read(source, episode)
        if faults:
            return faults, {}
        recording.save(Path(file), arrays)
        return [], image_shapes(arrays)

    return handle


def read(source: Source, episode: Episode) -> tuple[dict[str, Any], list[str]]:
    """Reads the L steps of an episode.

    Returns:
      The arrays, and the faults found, each in one line. The arrays are ``stamp`` str[]; ``instruction`` str[L]; for
      each number ``number/<key>`` [L, *shape] of its dtype; for each text ``text/<key>`` str[L]; and for each camera
      ``image/<key>`` uint8[bytes], all JPEG or PNG files concatenated, ``image_sizes/<key>`` int64[L], and
      ``image_shape/<key>`` int64[2], height and width.
    """
    wanted = [f.key for f in source.features if f.kind != "video"]
    files = {episode.data: None} | {clip.file: None for clip in episode.clips.values()}
    faults = [
        f"{name}: expected this file, found none"
        for name in files
        if not (source.folder / name).is_file()
    ]
    if faults:
        return {}, faults
    where = f"{episode.data}: episode {episode.index}"
    try:
        table = _rows(
            source.folder / episode.data, episode.index, ("timestamp", "task_index", *wanted)
        )
    except (OSError, ValueError, pa.ArrowException) as error:
        return {}, [f"{episode.data}: expected the rows of a LeRobot dataset, found {_line(error)}"]
    if len(table) != episode.length:
        return {}, [
            f"{where}: expected {episode.length} rows as in meta/episodes, found {len(table)}"
        ]

    def attempt(place: str, kind: str, function: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return function(*arguments)
        except _ERRORS as error:
            faults.append(f"{place}: expected {kind}, found {_line(error)}")
            return None

    times = attempt(f"{where}: timestamp", "rising seconds", _times, table["timestamp"])
    sentences = attempt(
        f"{where}: task_index", "an index in meta/tasks", _sentences, table["task_index"], source
    )
    arrays: dict[str, Any] = {"stamp": stamp(source, episode), "instruction": sentences}
    size = 0
    for f in source.features:
        place, key = f"{where}: {f.key}", f"{f.kind}/{f.key}"
        if f.kind == "number":
            kind = f"finite numbers of shape {list(f.shape)}"
            arrays[key] = attempt(place, kind, _numbers, table[f.key], f)
        elif f.kind == "text":
            arrays[key] = attempt(place, "texts", _texts, table[f.key])
        elif f.kind == "image":
            encoded = attempt(place, "images", _images, table[f.key], source.folder)
            size += _pack(arrays, f.key, encoded, place, faults)
        elif times is not None:
            clip = episode.clips[f.key]
            place = f"{clip.file}: episode {episode.index}"
            kind = f"a frame for each of its {episode.length} rows"
            path = source.folder / clip.file
            encoded = attempt(place, kind, _video, path, clip, times, source.fps)
            size += _pack(arrays, f.key, encoded, place, faults)
    if size > _LARGEST_EPISODE:
        faults.append(
            f"{where}: expected at most {_LARGEST_EPISODE:,} bytes of images, found {size:,}; cut the episode"
        )
    return arrays, faults


@functools.lru_cache(maxsize=1)
def _row_group(path: Path, group: int, columns: tuple[str, ...]) -> pa.Table:
    """Returns a part of a file. Consecutive episodes share it, so it is kept."""
    return _row_group_of(path, group, ["episode_index", *columns])


@functools.lru_cache(maxsize=1024)
def _episodes(path: Path, group: int) -> frozenset[Any]:
    """Returns which episodes a part of a file has rows of. (pyarrow aborts the process at damaged statistics of it.)"""
    return frozenset(_row_group_of(path, group, ["episode_index"])["episode_index"].to_pylist())


def _row_group_of(path: Path, group: int, columns: list[str]) -> pa.Table:
    return parquet.ParquetFile(path, pre_buffer=False).read_row_group(
        group, columns, use_threads=False
    )


def _rows(path: Path, episode: int, columns: tuple[str, ...]) -> pa.Table:
    """Returns the rows of an episode, from those parts of the file that may have some."""
    file = parquet.ParquetFile(path)
    missing = sorted({"episode_index", *columns} - set(file.schema_arrow.names))
    if missing:
        raise ValueError(f"none named {', '.join(missing)}")
    tables = []
    for group in range(file.num_row_groups):
        if episode in _episodes(path, group):
            table = _row_group(path, group, columns)
            tables.append(table.filter(compute.equal(table["episode_index"], episode)))
    return pa.concat_tables(tables) if tables else file.schema_arrow.empty_table()


def _times(column: pa.ChunkedArray) -> Float[np.ndarray, " L"]:
    times = _flat(column)[0].astype(np.float64)
    if not np.isfinite(times).all() or not (np.diff(times) > 0).all():
        raise ValueError("times that do not rise from row to row")
    return times


def _sentences(column: pa.ChunkedArray, source: Source) -> np.ndarray:
    indices = column.to_pylist()
    unknown = sorted({str(index) for index in indices if index not in source.tasks})
    if unknown:
        raise ValueError(", ".join(unknown))
    return np.array([source.tasks[index] for index in indices])


def _texts(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([text or "" for text in column.to_pylist()], np.str_)


def _numbers(column: pa.ChunkedArray, feature: Feature) -> np.ndarray:
    """Returns [L, *shape] of the feature's dtype. What a policy learns from must be finite."""
    flat, shape = _flat(column)
    if math.prod(shape[1:]) != math.prod(feature.shape):
        raise ValueError(f"the shape {list(shape[1:])}")
    with np.errstate(over="ignore"):
        values = flat.astype(feature.dtype).reshape(shape[0], *feature.shape)
    if feature.key in (*ACTION, *STATE) or feature.path in REWARDS:
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            raise ValueError(f"{values[tuple(wrong[0])]} in row {wrong[0][0]}")
    return values


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns the numbers of nested lists, and the shape of these, which is the same in all rows."""
    array, shape = pa.concat_arrays(column.chunks), [len(column)]
    while isinstance(array, pa.ExtensionArray):  # of the package datasets, for two and more axes
        array = array.storage
    while pa.types.is_nested(array.type) and not pa.types.is_struct(array.type):
        lengths = compute.unique(compute.list_value_length(array)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise ValueError(f"lists of the lengths {lengths[:5]}")
        shape.append(lengths[0])
        array = array.flatten()
    if array.null_count:
        raise ValueError(f"{array.null_count} empty places")
    return array.to_numpy(zero_copy_only=False), tuple(shape)


def _images(column: pa.ChunkedArray, folder: Path) -> list[bytes]:
    """Returns images that the rows hold, or name as files; each is decoded once to know that it can be."""
    found = []
    for number, row in enumerate(column.to_pylist()):
        data, path = (row or {}).get("bytes"), (row or {}).get("path")
        if data is None and path:
            if path.startswith("/") or ".." in PurePosixPath(path).parts:
                raise ValueError(f"a file outside of the dataset, {path!r:.100}")
            data = (folder / path).read_bytes()
        if not data:
            raise ValueError(f"none in row {number}")
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in FORMATS or image.mode not in MODES:
                raise ValueError(f"{image.format} of mode {image.mode} in row {number}")
            image.load()
        found.append(data)
    return found


def _pack(
    arrays: dict[str, Any], key: str, encoded: list[bytes] | None, place: str, faults: list[str]
) -> int:
    """Adds the arrays of a camera, if its images were read and have one size; returns their bytes."""
    if encoded is None:
        return 0
    shapes = sorted({Image.open(io.BytesIO(data)).size[::-1] for data in encoded})
    if len(shapes) > 1:
        faults.append(f"{place}: expected images of one height and width, found {shapes[:5]}")
    arrays[f"image/{key}"] = np.frombuffer(b"".join(encoded), np.uint8)
    arrays[f"image_sizes/{key}"] = np.array([len(data) for data in encoded])
    arrays[f"image_shape/{key}"] = np.array(shapes[0])
    return len(arrays[f"image/{key}"])


def _video(path: Path, clip: Clip, times: Float[np.ndarray, " L"], fps: float) -> list[bytes]:
    """Returns the frame of each row as JPEG: the one nearest in time, at most half a period away."""
    tolerance = 0.5 / fps
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("a file without video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError(f"a video codec that PyAV {av.__version__} does not decode")
        stream.codec_context.thread_count = 1  # the workers occupy all cores
        first = clip.start + times[0] - 2 * tolerance
        if first > 0:
            container.seek(math.floor(first / stream.time_base), stream=stream)
        frames = _within(container.decode(stream), clip, tolerance)
        shifted = (clip.start + times).tolist()
        jpegs = [
            None if frame is None else _jpeg(frame) for frame in nearest(frames, shifted, tolerance)
        ]
    found = [jpeg for jpeg in jpegs if jpeg is not None]
    if len(found) < len(jpegs):
        raise ValueError(f"{len(found)}, none for row {jpegs.index(None)}")
    return found


def _within(
    frames: Iterable[av.VideoFrame], clip: Clip, tolerance: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields the frames of a clip with their times in seconds; neighbours in the file are other episodes'."""
    for frame in frames:
        if frame.pts is None or frame.time_base is None:
            continue
        time = float(frame.pts * frame.time_base)
        if time >= clip.end - tolerance:
            return
        if time >= clip.start - tolerance:
            yield time, frame


def nearest(
    items: Iterable[tuple[float, _T]], times: Iterable[float], tolerance: float
) -> Iterator[_T | None]:
    """Yields for each time the item nearest to it, of pairs (time, item). Both rise.

    None stands where the nearest is further than ``tolerance``, or was an earlier time's.
    """
    rest = iter(items)
    before, after, used = None, next(rest, None), None
    for time in times:
        while after is not None and after[0] < time:
            before, after = after, next(rest, None)
        around = [item for item in (before, after) if item is not None]
        best = min(around, key=lambda item: abs(item[0] - time), default=None)  # noqa: B023
        if best is None or best is used or abs(best[0] - time) > tolerance:
            yield None
        else:
            used = best
            yield best[1]


def _jpeg(frame: av.VideoFrame) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    image.save(buffer, "jpeg", quality=recording.JPEG_QUALITY)
    return buffer.getvalue()


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300] or type(error).__name__
