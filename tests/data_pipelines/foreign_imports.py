"""Small datasets of LeRobot and CALVIN, one file of which is damaged; read as the importers read them."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.writing import calvin, lerobot, lerobot_episode
from mllm_act.errors import UserError
from tests.data_pipelines import tiny_calvin, tiny_lerobot
from tests.fuzzing import Format, mutated, mutated_json

Content = list[dict[str, Any]]


def _import(folder: Path, module: Any, read: Any) -> Content:
    source = module.open_source(folder)
    content = []
    for episode in source.episodes:
        arrays, faults = read(source, episode)
        if faults:
            raise UserError(f"{folder}: {'; '.join(faults)}")
        arrays.pop("stamp", None)  # it has the times of the files
        content.append({key: np.asarray(value).tolist() for key, value in arrays.items()})
    return content


def _read_lerobot(file: str, path: Path) -> Content:
    for kept in (lerobot_episode._episodes, lerobot_episode._row_group):
        kept.cache_clear()
    return _import(path.parents[file.count("/")], lerobot, lerobot_episode.read)


def _read_calvin(file: str, path: Path) -> Content:
    def read(source: calvin.Source, episode: calvin.Episode) -> Any:
        return calvin.read(source.folder, episode)

    return _import(path.parents[file.count("/")], calvin, read)


def _made(write: Any, file: str, folder: Path) -> Path:
    return write(folder) / file


def _other(found: Any, expected: Any) -> str:
    return "equal" if found == expected else "other"


LEROBOT_V3 = (
    "meta/info.json",
    "meta/tasks.parquet",
    "meta/episodes/chunk-000/file-000.parquet",
    "data/chunk-000/file-000.parquet",
    f"videos/{next(iter(tiny_lerobot.CAMERAS))}/chunk-000/file-000.mp4",
)
LEROBOT_V2 = ("meta/tasks.jsonl", "meta/episodes.jsonl")
CALVIN = (
    "training/lang_annotations/auto_lang_ann.npy",
    "training/scene_info.npy",
    "training/ep_start_end_ids.npy",
    "training/episode_0000005.npz",
)


def _format(write: Any, read: Any, file: str) -> Format:
    return Format(
        file,
        functools.partial(_made, write, file),
        functools.partial(read, file),
        mutated_json if file.endswith(".json") else mutated,
        _other,  # neither has digests
    )


FORMATS = (
    *(_format(tiny_lerobot.write_v3, _read_lerobot, file) for file in LEROBOT_V3),
    *(_format(tiny_lerobot.write_v2, _read_lerobot, file) for file in LEROBOT_V2),
    *(_format(tiny_calvin.write, _read_calvin, file) for file in CALVIN),
)
