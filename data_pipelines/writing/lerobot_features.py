"""What ``features`` in a LeRobot dataset's ``meta/info.json`` become in RLDS."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

STANDARD = ("timestamp", "frame_index", "episode_index", "index", "task_index")
ACTION, STATE = ("action", "actions"), ("observation.state", "state")
# What RLDS defines for each step, and is written in any case.
RLDS = ("observation", "language_instruction", "is_first", "is_last", "is_terminal")
_LARGEST = 100_000_000  # numbers in a feature of a step; images are the largest
_LONGEST = 1_000_000  # of a vector, each of whose numbers has a name
REWARDS = ("reward", "discount")  # taken from the dataset where it has them


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature of each step that is imported.

    Attributes:
      key: in the LeRobot dataset.
      path: in the steps of the RLDS dataset.
      kind: "video", "image", "text" or "number".
      dtype: of a number as it is written: float32, int64 or bool.
      shape: of a number; () for a scalar.
      names: of the numbers, flat.
    """

    key: str
    path: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


def read_features(tree: Any, problems: list[str]) -> tuple[tuple[Feature, ...], tuple[str, ...]]:
    """Returns the features to import, and what is left out with the reason."""
    if not isinstance(tree, dict):
        problems.append(f"meta/info.json: features: expected an object, found {tree!r:.100}")
        return (), ()
    found: list[Feature] = []
    left_out: list[str] = []
    for key, value in tree.items():
        where = f"meta/info.json: features: {key:.100}"
        if key in STANDARD:
            continue
        if not key.strip(".") or key[-1] == "." or not key.isprintable() or "/" in key:
            problems.append(f"{where}: expected a name without '/' that does not end in '.'")
            continue
        dtype, shape = (
            value.get(name) if isinstance(value, dict) else None for name in ("dtype", "shape")
        )
        if not isinstance(dtype, str) or not (
            isinstance(shape, list)
            and all(type(n) is int and n > 0 for n in shape)
            and math.prod(shape) <= _LARGEST
        ):
            problems.append(
                f"{where}: expected a dtype and a shape, found {dtype!r:.40}, {shape!r:.60}"
            )
        elif _path(key, tree) in RLDS:
            left_out.append(f"{key}: RLDS has its own of this name")
        elif dtype in ("video", "image"):
            if _is_depth(value):
                left_out.append(f"{key}: a depth map, and policies see colour")
            else:
                found.append(Feature(key, f"observation/{_short(key, tree)}", dtype))
        elif dtype == "string" and shape == [1]:
            found.append(Feature(key, _path(key, tree), "text"))
        elif math.prod(shape) > _LONGEST:
            problems.append(f"{where}: expected at most {_LONGEST:,} numbers, found {shape!r:.60}")
        elif re.fullmatch(r"bool|float(16|32|64)|u?int(8|16|32|64)", dtype):
            found.append(_number(key, _path(key, tree), dtype, shape, value.get("names")))
        else:
            left_out.append(f"{key}: {dtype:.40} of shape {shape!r:.60} is not known here")
    paths = [feature.path for feature in found]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        keys = ", ".join(f.key for f in found if f.path == path)
        problems.append(
            f"meta/info.json: features: expected different names in RLDS, found {path} for {keys}"
        )
    if not any(f.kind in ("video", "image") for f in found):
        problems.append("meta/info.json: features: expected at least one camera, found none")
    if not any(f.key in ACTION and f.kind == "number" for f in found):
        problems.append("meta/info.json: features: expected the numbers action, found none")
    return tuple(found), tuple(left_out)


def _number(key: str, path: str, dtype: str, shape: list[int], names: Any) -> Feature:
    written = "bool" if dtype == "bool" else "int64"
    if dtype.startswith("float") or path in REWARDS or key in (*ACTION, *STATE):
        written = "float32"  # records hold no other
    last, size = path.rpartition("/")[2], math.prod(shape)
    numbered = tuple(f"{last}_{index}" for index in range(size))
    is_vector = shape != [1] or key in (*ACTION, *STATE)
    return Feature(
        key,
        path,
        "number",
        written,
        tuple(shape) if is_vector else (),
        _names(names, size) or numbered,
    )


def _path(key: str, keys: Mapping[str, Any]) -> str:
    """Returns a feature's path in the steps of RLDS."""
    if key == "next.reward" and "reward" not in keys:
        return "reward"
    return re.sub(r"^observation\.", "observation/", key)


def _short(key: str, keys: Mapping[str, Any]) -> str:
    """Returns the short name of a camera, or a longer one where another feature has the short one."""
    prefix = re.compile(r"^(observation\.)?(images?\.)?")
    short = prefix.sub("", key)
    taken = short in [prefix.sub("", other) for other in keys if other != key]
    return key.removeprefix("observation.") if taken else short


def _is_depth(feature: Mapping[str, Any]) -> bool:
    infos = [feature.get(key) for key in ("info", "video_info")]
    return any(
        isinstance(info, dict) and (info.get("is_depth_map") or info.get("video.is_depth_map"))
        for info in infos
    )


def _names(names: Any, size: int) -> tuple[str, ...]:
    """Returns the names of ``size`` numbers from a list, or from lists in it or in an object; () if they do not fit."""
    if isinstance(names, dict):
        values = list(names.values())
        if values and all(type(value) is int for value in values):  # {name: index}
            values = sorted(names, key=lambda name: names[name])
        names = values
    if not isinstance(names, list):
        return ()
    flat = [name for value in names for name in (value if isinstance(value, list) else [value])]
    if not all(isinstance(name, str) and name for name in flat):
        return ()
    return tuple(flat) if len(flat) == size == len(set(flat)) else ()
