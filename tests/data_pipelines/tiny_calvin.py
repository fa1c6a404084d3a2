"""Writes small CALVIN datasets in the layout of the official ones, and finds the real mini set where there is one."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

MINI = Path(os.environ.get("CALVIN_MINI", Path(__file__).parents[3] / "shared/data/calvin_mini"))
SENTENCES = ["push the button", "schiebe den grünen Knopf 🟢", "turn off the led"]
RANGES = [(4, 6), (7, 10), (20, 21)]


def frame(number: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(number)
    return {
        "rgb_static": np.tile(draw.integers(0, 256, 3, np.uint8), (24, 24, 1)),
        "rgb_gripper": np.tile(draw.integers(0, 256, 3, np.uint8), (16, 16, 1)),
        "depth_static": draw.random((24, 24), np.float32),
        "robot_obs": draw.normal(size=15),
        "scene_obs": draw.normal(size=24),
        "rel_actions": np.append(draw.uniform(-1, 1, 6), draw.choice([-1.0, 1.0])),
        "actions": draw.normal(size=7),
    }


def save_object(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array(value, dtype=object), allow_pickle=True)


def annotations(ranges: Any = None) -> dict[str, Any]:
    ranges = RANGES if ranges is None else ranges
    language = {"ann": SENTENCES, "task": ["push", "push", "turn_off"], "emb": np.zeros((3, 1, 8))}
    return {"language": language, "info": {"episodes": [], "indx": ranges}}


def write(folder: Path) -> Path:
    """Three annotations for training, and the last of them for validation, too."""
    for name, frames in (("training", (*range(4, 11), 20, 21)), ("validation", range(4, 22))):
        split = folder / name
        save_object(split / "lang_annotations/auto_lang_ann.npy", annotations())
        save_object(split / "scene_info.npy", {"scene_A": [0, 10], "scene_B": [11, 99]})
        np.save(split / "ep_start_end_ids.npy", np.array([[4, 10], [12, 21]]))
        for number in frames:
            np.savez(split / f"episode_{number:07d}.npz", **frame(number))
    return folder


class Harmful:
    """A pickle of it would call a function of the system."""

    def __reduce__(self) -> Any:
        return (os.getcwd, ())


def save_harmful(path: Path) -> None:
    np.save(path, np.array(0))
    header = path.read_bytes().replace(b"'<i8'", b"'|O' ")[:128]
    path.write_bytes(header + pickle.dumps(Harmful()))
