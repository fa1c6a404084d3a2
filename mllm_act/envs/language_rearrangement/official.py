"""The official episodes of Language Rearrangement, as ``python -m data_pipelines.import_langr`` wrote them.

``LANGR_EPISODES`` names the folder. They belong to LLaRP (github.com/apple/ml-llarp, under Apple's sample code licence)
and are not part of this package.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_act.envs.language_rearrangement import goals
from mllm_act.envs.language_rearrangement.entities import OBJECTS, RECEPTACLES
from mllm_act.envs.language_rearrangement.instructions import TEMPLATES
from mllm_act.envs.language_rearrangement.layout import SIZES, Layout, Pose
from mllm_act.envs.language_rearrangement.world import Episode, Thing
from mllm_act.errors import UserError, nearest
from mllm_act.files import read_json, user_path

VARIABLE = "LANGR_EPISODES"
SPLITS = (
    "train_validation",  # training instructions in training rooms; then the paper's ten
    "new_scenes", "rephrasing", "novel_objects", "multiple_rearrangements", "referring_expressions", "context",
    "irrelevant_text", "multiple_objects", "spatial_relationships", "conditional_instructions",
)  # fmt: skip
EPISODES = 100  # in each
FORMAT = 1
FIX = (
    "get the episode files from github.com/apple/ml-llarp (folder datasets), run python -m data_pipelines.import_langr "
    f"--source=DIR --out=OUT, then export {VARIABLE}=OUT"
)


def path(folder: Path, split: str) -> Path:
    """Returns the file of a split."""
    return folder / f"{split}.json"


def wordings_path(folder: Path) -> Path:
    """Returns the file of LLaRP's training wordings."""
    return folder / "instructions.json"


@functools.cache
def _wordings(folder: Path) -> Mapping[str, tuple[str, ...]]:
    file = wordings_path(folder)
    fix = f"{FIX}; add --instructions=ml-llarp/llarp/dataset/configs/instructions.yaml"
    try:
        content = read_json(file, fix)
        found = {name: tuple(map(str, content["wordings"][name])) for name in TEMPLATES}
        if content["format"] != FORMAT or not all(found.values()):
            raise ValueError(content["format"])
        return found
    except FileNotFoundError:
        raise UserError(
            f"{VARIABLE}={folder}: expected LLaRP's wordings for the task llarp, found no {file.name}; {fix}"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: expected wordings, found something else ({error!r}); {fix}"
        ) from None


def wordings() -> Mapping[str, tuple[str, ...]]:
    """Returns LLaRP's own training wordings of every template.

    Raises:
      UserError: ``LANGR_EPISODES`` is not set, or has no file of them.
    """
    return _wordings(_folder("the task llarp"))


def document(split: str, episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the content of a split's file."""
    return {"format": FORMAT, "split": split, "episodes": list(episodes)}


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """Returns plain JSON types."""
    furniture = {name: list(pose) for name, pose in layout.furniture.items()}
    return {"furniture": furniture, "room": list(layout.room)}


@functools.cache
def read(folder: Path, split: str) -> tuple[Episode, ...]:
    """Returns the episodes of a split; their robot's start is a place-holder at the room's corner.

    Raises:
      UserError: no such file, it is damaged, or has something unknown.
    """
    file = path(folder, split)
    try:
        content = read_json(file, FIX)
    except FileNotFoundError:
        raise UserError(
            f"{VARIABLE}={folder}: expected the official episodes of split {split}, found no {file.name}; {FIX}"
        ) from None
    if content.get("format") != FORMAT or content.get("split") != split:
        raise UserError(
            f"{file}: expected format {FORMAT} of split {split}, found {content.get('format')!r} of "
            f"{content.get('split')!r}; {FIX}"
        )
    try:
        episodes = [
            _episode(raw, f"{file}, episode {i}") for i, raw in enumerate(content["episodes"])
        ]
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: expected episodes, found something else ({error!r}); {FIX}"
        ) from None
    if len(episodes) != EPISODES:
        raise UserError(f"{file}: expected {EPISODES} episodes, found {len(episodes)}; {FIX}")
    return tuple(episodes)


def _episode(raw: Mapping[str, Any], where: str) -> Episode:
    things = tuple(Thing(*thing) for thing in raw["things"])
    for thing in things:
        for what, known, found in (
            ("class of objects", OBJECTS, thing.kind),
            ("receptacle", RECEPTACLES, thing.receptacle),
        ):
            if found not in known:
                raise UserError(
                    f"{where}: expected a known {what}, found {found!r} ({nearest(found, known)}); {FIX}"
                )
    names = [thing.name for thing in things]
    for expression in (raw["goal"], *(text for subgoal in raw["subgoals"] for text in subgoal)):
        goals.check(expression, names, where)
    furniture = {name: Pose(*raw["layout"]["furniture"][name]) for name in SIZES}
    left, bottom, right, top = map(float, raw["layout"]["room"])
    return Episode(
        instruction=raw["instruction"],
        template=raw["template"],
        layout=Layout(furniture, (left, bottom, right, top)),
        start=Pose(left, bottom, 0.0),
        things=things,
        goal=raw["goal"],
        subgoals=tuple(map(tuple, raw["subgoals"])),
        fridge_open=bool(raw["fridge_open"]),
    )


def episode(split: str, number: int) -> Episode:
    """Returns an official episode.

    Raises:
      UserError: ``LANGR_EPISODES`` is not set, or see ``read``.
    """
    return read(_folder(f"split {split}"), split)[number]


def _folder(purpose: str) -> Path:
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UserError(
            f"{VARIABLE}: expected the folder of the official episodes for {purpose}, found it not set; {FIX}"
        )
    return user_path(folder, VARIABLE)
