"""Writes small LeRobot datasets with pyarrow and PyAV: v2, and v3 with both episodes in each file."""

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

FPS = 10
LENGTHS = (7, 12)
SENTENCES = ("stack the blocks", "räum den Tisch ab")
CAMERAS = {"observation.images.front": (48, 64), "observation.images.wrist": (32, 32)}
NAMES = ["x", "y", "gripper"]
INDICES = ("frame_index", "episode_index", "index", "task_index")


def info(version: str, **changes: Any) -> dict[str, Any]:
    def vector(dtype: str, size: int, names: Any = None) -> dict[str, Any]:
        return {"dtype": dtype, "shape": [size], "names": names}

    features: dict[str, Any] = {
        key: {"dtype": "video", "shape": [h, w, 3], "names": ["height", "width", "channels"]}
        for key, (h, w) in CAMERAS.items()
    }
    features |= {
        "observation.image": {"dtype": "image", "shape": [24, 40, 3], "names": None},
        "observation.depth": {
            "dtype": "image",
            "shape": [24, 40, 1],
            "info": {"is_depth_map": True},
        },
        "observation.state": vector("float64", 3, {"motors": NAMES}),
        "observation.contact": vector("bool", 1),
        "observation.grid": {"dtype": "float32", "shape": [2, 3], "names": None},
        "action": vector("float32", 3, NAMES),
        "ticks": vector("int32", 2),
        "next.reward": vector("float32", 1),
        "timestamp": vector("float32", 1),
        **{key: vector("int64", 1) for key in INDICES},
    }
    return {
        "codebase_version": version,
        "robot_type": "so101",
        "fps": FPS,
        "total_episodes": len(LENGTHS),
        "features": features,
    } | changes


def colour(episode: int, step: int, camera: int) -> tuple[int, int, int]:
    return (40 + 90 * episode, 30 + 16 * step, 60 + 70 * camera)


def png(size: tuple[int, int], colour: tuple[int, int, int] = (0, 0, 0)) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": ""}


def rows(episode: int) -> dict[str, Any]:
    """The columns of an episode."""
    draw, length = np.random.default_rng(episode), LENGTHS[episode]
    images = [png((40, 24), colour(episode, step, 2)) for step in range(length)]
    return {
        "observation.image": images,
        "observation.state": list(draw.normal(size=(length, 3))),
        "observation.contact": list(map(bool, draw.integers(2, size=length))),
        "observation.grid": draw.normal(size=(length, 2, 3)).astype(np.float32).tolist(),
        "action": list(draw.normal(size=(length, 3)).astype(np.float32)),
        "ticks": list(draw.integers(100, size=(length, 2)).astype(np.int32)),
        "next.reward": np.arange(length, dtype=np.float32),
        "timestamp": (np.arange(length) / FPS).astype(np.float32),
        "frame_index": np.arange(length),
        "episode_index": np.full(length, episode),
        "index": np.arange(length),
        "task_index": np.full(length, 1 - episode),
    }


def write_rows(path: Path, episodes: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [pa.table(columns) for columns in episodes]
    parquet.write_table(pa.concat_tables(tables), path)


def write_video(path: Path, camera: int, frames: list[tuple[int, int]], size: Any = None) -> None:
    """Writes an mp4 of (episode, step), with few key frames and B-frames between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size or list(CAMERAS.values())[camera]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "6", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        for number, (episode, step) in enumerate(frames):
            image = Image.new("RGB", (width, height), colour(episode, step, camera))
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def steps(*episodes: int) -> list[tuple[int, int]]:
    return [(episode, step) for episode in episodes for step in range(LENGTHS[episode])]


def write_info(folder: Path, value: dict[str, Any]) -> None:
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta/info.json").write_text(json.dumps(value))


def write_v3(folder: Path) -> Path:
    """Both episodes in one parquet file, and in one mp4 per camera."""
    write_info(folder, info("v3.0"))
    tasks = {"task_index": [0, 1], "__index_level_0__": list(SENTENCES)}
    parquet.write_table(pa.table(tasks), folder / "meta/tasks.parquet")
    write_rows(folder / "data/chunk-000/file-000.parquet", [rows(0), rows(1)])
    episodes = {
        "episode_index": [0, 1],
        "length": list(LENGTHS),
        "data/chunk_index": [0, 0],
        "data/file_index": [0, 0],
        "stats/action/max": [[1.0], [1.0]],
    }
    for number, key in enumerate(CAMERAS):
        write_video(folder / f"videos/{key}/chunk-000/file-000.mp4", number, steps(0, 1))
        episodes |= {f"videos/{key}/{name}": [0, 0] for name in ("chunk_index", "file_index")}
        episodes[f"videos/{key}/from_timestamp"] = [0.0, LENGTHS[0] / FPS]
        episodes[f"videos/{key}/to_timestamp"] = [LENGTHS[0] / FPS, sum(LENGTHS) / FPS]
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    parquet.write_table(pa.table(episodes), folder / "meta/episodes/chunk-000/file-000.parquet")
    return folder


def write_v2(folder: Path) -> Path:
    """A parquet file and an mp4 per camera for each episode."""
    write_info(folder, info("v2.1", splits={"train": "0:1", "test": "1:2"}))
    lines = [{"task_index": i, "task": sentence} for i, sentence in enumerate(SENTENCES)]
    (folder / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"episode_index": i, "length": length} for i, length in enumerate(LENGTHS)]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for episode in range(len(LENGTHS)):
        write_rows(folder / f"data/chunk-000/episode_{episode:06d}.parquet", [rows(episode)])
        for number, key in enumerate(CAMERAS):
            path = folder / f"videos/chunk-000/{key}/episode_{episode:06d}.mp4"
            write_video(path, number, steps(episode))
    return folder
