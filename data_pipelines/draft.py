"""Drafts the mapping of a dataset from the names and shapes of its features, for a user to correct."""

import re
from collections.abc import Mapping
from pathlib import Path

from data_pipelines.reading.layout import STEPS, Feature, is_image, is_text, numeric_keys, width

POSE = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STATES = (
    "observation/state",
    "observation/proprio",
    "observation/robot_state",
    "observation/robot_obs",
)
_LONGEST = 64  # numbers; embeddings have more


def write(directory: str, features: Mapping[str, Feature]) -> str:
    """Returns a file with a mapping; the robot is called as the folder is.

    Actions are those called ``action`` or inside of it; proprioception is a state, or else all short vectors of the
    observation; instructions are the texts whose name says so.
    """
    name = re.sub(r"\W+", "_", _folder(directory)).strip("_") or "my_robot"
    cameras = {
        path.removeprefix(STEPS): path
        for path in features
        if path.startswith(STEPS) and is_image(features, path) and "depth" not in path
    }
    numbers = numeric_keys(features)
    actions = [key for key in numbers if key == "action"] or [
        key for key in numbers if key.startswith(("action/", "actions")) and "terminate" not in key
    ]
    states = [key for key in numbers if key in STATES][:1] or [
        key
        for key in numbers
        if key.startswith("observation/")
        and width(features, key)[1] <= _LONGEST
        and "embedding" not in key
    ]
    texts = [path.removeprefix(STEPS) for path in features if is_text(features, path)]
    instruction = sorted(key for key in texts if "instruction" in key)

    def parts(keys: list[str], of_action: bool) -> str:
        lines = []
        for key in keys:
            size = width(features, key)[1]
            stem = key.rpartition("/")[2]
            named = (
                POSE
                if of_action and size == len(POSE)
                else tuple(f"{stem}_{i}" for i in range(size))
            )
            lines.append(f"        Part({key!r}, {named if size > 1 else (stem,)!r}),\n")
        return f"(\n{''.join(lines)}    )" if lines else "()"

    short = {key.rpartition("/")[2] for key in cameras}
    named = {
        (key.rpartition("/")[2] if len(short) == len(cameras) else key.replace("/", "_")): key
        for key in cameras
    }
    listing = "".join(f"        {ours!r}: {theirs!r},\n" for ours, theirs in sorted(named.items()))
    return (
        '"""A draft by data_pipelines.check: correct names, units and rate; see data_pipelines/mapping.py.\n\n'
        'A Part has one unit: give positions, angles and the gripper a Part each, with `start`.\n"""\n\n'
        "from data_pipelines.mapping import DataMapping, Part\n\n"
        "MAPPING = DataMapping(\n"
        f"    name={name!r},\n"
        f"    cameras={{\n{listing}    }},\n"
        f"    action={parts(actions, of_action=True)},\n"
        f"    proprio={parts(states, of_action=False)},\n"
        f"    instruction={tuple(instruction)!r},\n"
        "    rate=None,  # steps per second\n"
        ")\n"
    )


def _folder(directory: str) -> str:
    """Returns the name of a dataset's folder; not that of its version."""
    path = Path(directory.split(",")[0])
    return path.parent.name if re.fullmatch(r"\d+\.\d+\.\d+", path.name) else path.name
