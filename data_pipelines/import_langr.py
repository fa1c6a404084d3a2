"""Converts the official episodes of Language Rearrangement (pickles of LLaRP's repository) to plain JSON.

    python -m data_pipelines.import_langr --source=ml-llarp/datasets --out=data/langr \\
        --instructions=ml-llarp/llarp/dataset/configs/instructions.yaml
    export LANGR_EPISODES=data/langr
    python -m mllm_act.evaluate --checkpoint=RUN --env=language_rearrangement --split=new_scenes

DIR has the eleven files ``SPLIT.pickle`` of github.com/apple/ml-llarp (``train.pickle`` is not needed). Unpickling can
run any code, so it is restricted: a file that names anything but NumPy's arrays is refused. The JSON files have the
instruction, the goal, the subgoals, and the objects and furniture in the plane of the floor. With ``--instructions``,
the task ``llarp`` has training episodes in LLaRP's own words.
"""

import argparse
import hashlib
import itertools
import math
import pickle
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.langr_wordings import read_wordings
from mllm_act import errors
from mllm_act.envs.language_rearrangement import goals, layout, official
from mllm_act.envs.language_rearrangement.entities import (
    OBJECTS,
    RECEPTACLE,
    RECEPTACLES,
    SPOKEN,
)
from mllm_act.envs.language_rearrangement.layout import KITCHEN, REFRIGERATOR, SIZES, SURFACES, Pose
from mllm_act.errors import UserError, nearest
from mllm_act.files import locked, user_path, write_json

# What the pickles may name, and where NumPy has it.
GLOBALS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy.core.multiarray", "scalar"): np._core.multiarray.scalar,  # type: ignore[attr-defined]
}
AGAIN = "get the file again from github.com/apple/ml-llarp, folder datasets"
# How the SHA-256 of each file begins at revision be7cbd3.
PUBLISHED = {
    "train_validation": "32fc80038c8c7118",
    "new_scenes": "3f7653ea971e606f",
    "rephrasing": "74f5c7699c67a813",
    "novel_objects": "be8f052dc1730559",
    "multiple_rearrangements": "1072c8adb4d44d01",
    "referring_expressions": "451fc52485b6db47",
    "context": "1cc54abe57e783a6",
    "irrelevant_text": "6793dca99852e40f",
    "multiple_objects": "5d3016049b7d245f",
    "spatial_relationships": "c7fc484a483f377c",
    "conditional_instructions": "ba2f176ac54e7fc2",
}
LARGEST = 50_000_000  # bytes; the official files have less than one million
WORDS = {spoken: kind for kind, spoken in SPOKEN.items()}
KINDS = {  # a part of an object's name -> its class, where it is another word
    "racquetball": "ball", "baseball": "ball", "softball": "ball", "rubiks": "cube", "airplane": "toy",
}  # fmt: skip
# Freestanding furniture and the receptacle that shows where it is.
FREE = {
    name: receptacle
    for receptacle, (name, *_) in SURFACES.items()
    if name not in (KITCHEN, REFRIGERATOR, "chair")
}
ANGLES = range(0, 90, 5)  # degrees, of a table to the walls
MARGIN = 1.2  # metres from the furniture to the walls


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = GLOBALS.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found


def load(path: Path) -> dict[str, Any]:
    """Returns the content of an official file, without running code from it.

    Raises:
      UserError: no such file, it is damaged, or it names something else than NumPy's arrays.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: expected less than {LARGEST:,} bytes, found more; {AGAIN}")
        with path.open("rb") as file:
            content = _Unpickler(file).load()
        if not isinstance(content, dict) or {"all_eps", "all_transforms", "idx_to_name"} - set(
            content
        ):
            raise ValueError("something else")
        return content
    except FileNotFoundError:
        raise UserError(
            f"--source={path.parent}: expected the eleven episode files, found no {path.name}; {AGAIN}"
        ) from None
    except pickle.UnpicklingError as error:
        if str(error).count(".") and " " not in str(error):
            raise UserError(
                f"{path}: expected NumPy arrays and plain types, found {str(error)!r}, which unpickling would call; "
                f"do not trust this file, {AGAIN}"
            ) from None
        raise UserError(f"{path}: expected an episode file, found {error}; {AGAIN}") from None
    except OSError as error:
        raise UserError(
            f"{path}: expected an episode file, found {error.strerror}; {AGAIN}"
        ) from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(
            f"{path}: expected an episode file, found a damaged one ({error}); {AGAIN}"
        ) from None


def kind_of(name: str, where: str) -> str:
    """Returns the class of an object such as ``065-g_cups_:0000``. Raises UserError if it has none."""
    for part, kind in KINDS.items():
        if part in name:
            return kind
    for word in reversed(name.partition(":")[0].split("_")):
        for kind in (word, word.removesuffix("s")):
            if kind in OBJECTS:
                return kind
    raise UserError(f"{where}: expected an object of a known class, found {name!r}; {AGAIN}")


def convert(source: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns split -> its episodes as plain JSON types, as ``official.read`` reads them.

    Raises:
      UserError: a file is missing, damaged, or has an object, receptacle or predicate that is not known.
    """
    raw: dict[str, list[dict[str, Any]]] = {}
    for split in official.SPLITS:
        path = source / f"{split}.pickle"
        content = load(path)
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(PUBLISHED[split]):
            print(
                f"notice: {path} is not the file that LLaRP published; its episodes are used as found"
            )
        try:
            raw[split] = [_episode(episode, content, f"{path}, episode {i}") for i, episode in
                          enumerate(content["all_eps"])]  # fmt: skip
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: expected episodes of Language Rearrangement, found others ({error!r}); {AGAIN}"
            ) from None
    everything = list(itertools.chain.from_iterable(raw.values()))
    layouts = scene_layouts(everything)
    for episode in everything:
        room = layouts[episode["scene"]]
        for thing in episode["things"]:
            thing[3:] = (round(z, 3) for z in room.onto(thing[2], *thing[3:]))
        episode["layout"] = official.layout_to_json(room)
    return raw


def _episode(episode: Mapping[str, Any], content: Mapping[str, Any], where: str) -> dict[str, Any]:
    names, transforms = content["idx_to_name"], content["all_transforms"]
    poses: dict[str, list[np.ndarray]] = defaultdict(list)
    for name, transform in episode["rigid_objs"]:
        poses[names[name].partition(".")[0]].append(transforms[transform])
    things = []
    for name, receptacle in episode["name_to_receptacle"]:
        name, receptacle = names[name], names[receptacle]
        if receptacle not in RECEPTACLES:
            raise UserError(
                f"{where}: expected a known receptacle, found {receptacle!r} "
                f"({nearest(receptacle, RECEPTACLES)}); {AGAIN}"
            )
        kind = kind_of(name, where)
        base, _, number = name.rpartition("_:")
        x, _, z = poses[base][int(number)][:3, 3].tolist()  # y points upwards
        if not abs(x) + abs(z) < 1000:
            raise ValueError(f"the position {x}, {z}")
        things.append([name, kind, receptacle, x, -z])
    goal = _renamed(episode["goal_preds"])
    subgoals = [list(map(str, subgoal)) for subgoal in episode["subgoals"]]
    known = [thing[0] for thing in things]
    for expression in (goal, *itertools.chain.from_iterable(subgoals)):
        goals.check(expression, known, where)
    return {
        "instruction": str(episode["instruction"]),
        "template": str(episode["instruct_id"]),
        "scene": str(episode["scene_id"]).rpartition("/")[2].partition(".")[0],
        "goal": goal,
        "subgoals": subgoals,
        "fridge_open": any(text.startswith("opened_fridge") for text in episode["start_preds"]),
        "things": things,
    }


def _renamed(goal: Any) -> Any:
    """Returns a goal with the classes' short names."""
    if isinstance(goal, str):
        return goal
    inputs = [
        {"name": v["name"], "expr_type": WORDS.get(v["expr_type"], v["expr_type"])}
        for v in goal.get("inputs", ())
    ]
    return {
        "expr_type": goal["expr_type"],
        "quantifier": goal.get("quantifier"),
        "inputs": inputs,
        "sub_exprs": [_renamed(part) for part in goal["sub_exprs"]],
    }


def scene_layouts(episodes: Sequence[Mapping[str, Any]]) -> dict[str, layout.Layout]:
    """Returns the layout of each scene, as the objects on its furniture show it.

    The files do not say where fridge and chair are. The fridge is at the end of the counter whose places are near it
    in the subgoals; the chair is at the first free place beside other furniture.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    sides: dict[str, Counter[int]] = defaultdict(
        Counter
    )  # scenes of one floor plan -> -1 left, 1 right
    for episode in episodes:
        for _, _, receptacle, x, y in episode["things"]:
            points[episode["scene"], receptacle].append((x, y))
        for subgoal in episode["subgoals"]:
            if f"robot_at({RECEPTACLE['fridge']})" in subgoal:
                for side, counter in ((-1, "left counter"), (1, "right counter")):
                    found = f"robot_at({RECEPTACLE[counter]})" in subgoal
                    sides[_plan(episode["scene"])][side] += found
    return {
        scene: _layout(
            {r: np.array(v) for (s, r), v in points.items() if s == scene},
            1 if sides[_plan(scene)][1] > sides[_plan(scene)][-1] else -1,
        )
        for scene in sorted({scene for scene, _ in points})
    }


def _plan(scene: str) -> str:
    return scene.partition("_staging")[0]


def _layout(points: Mapping[str, np.ndarray], fridge: int) -> layout.Layout:
    counters = [RECEPTACLE[word] for word in ("left counter", "sink", "right counter")]
    middles = [(points[r].min(0) + points[r].max(0)) / 2 for r in counters]
    # In all scenes the counter faces x.
    x = float(np.mean([middle[0] for middle in middles]))
    y = float(np.mean([m[1] - SURFACES[r].y for m, r in zip(middles, counters, strict=True)]))
    furniture = {KITCHEN: Pose(x, y, 0.0)}
    beside = (SIZES[KITCHEN].width + SIZES[REFRIGERATOR].width) / 2 + 0.05
    furniture[REFRIGERATOR] = Pose(x, y + fridge * beside, 0.0)
    boxes = {name: _rectangle(points[receptacle]) for name, receptacle in FREE.items()}
    everything = np.array([*middles, *(box[:2] for box in boxes.values())])
    for name, (x, y, angle) in boxes.items():
        furniture[name] = min(
            (Pose(x, y, angle), Pose(x, y, angle + math.pi)),
            key=lambda pose: _crowding(pose, name, boxes, everything.mean(0)),
        )
    left, bottom = everything.min(0) - MARGIN
    right, top = everything.max(0) + MARGIN
    ends = [pose.point(0, s * SIZES[n].width / 2) for n, pose in furniture.items() for s in (-1, 1)]
    room = (
        min(left, furniture[KITCHEN].x - SIZES[KITCHEN].depth / 2),
        min(bottom, *(y for _, y in ends)),
        right,
        max(top, *(y for _, y in ends)),
    )
    placed = layout.Layout(furniture, tuple(round(float(z), 3) for z in room))  # type: ignore[arg-type]
    return placed._replace(furniture={
        name: Pose(*(round(float(z), 3) for z in pose))
        for name, pose in {**furniture, "chair": _chair(placed)}.items()
    })  # fmt: skip


def _rectangle(points: np.ndarray) -> tuple[float, float, float]:
    """Returns the middle of the smallest rectangle around points, and the direction of its short side."""
    best: tuple[float, ...] = (math.inf,)
    for degrees in ANGLES:
        angle = math.radians(degrees)
        axes = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        turned = points @ axes.T
        low, high = turned.min(0), turned.max(0)
        size = high - low
        area = size.prod() * (1.0 if degrees == 0 else 1.1)  # most stand along the walls
        if area < best[0]:
            middle = (low + high) / 2 @ axes
            short = angle if size[0] <= size[1] else angle + math.pi / 2
            best = (area, float(middle[0]), float(middle[1]), short)
    return best[1], best[2], best[3]


def _crowding(
    pose: Pose, name: str, boxes: Mapping[str, tuple[float, float, float]], middle: np.ndarray
) -> tuple[bool, float]:
    """Orders the two sides of furniture from which the robot can approach it: free ones first, inner ones first."""
    x, y = pose.point(SIZES[name].depth / 2 + layout.GAP, 0)
    others = {other: Pose(*box) for other, box in boxes.items() if other != name}
    blocked = not layout.Layout(others, (-math.inf, -math.inf, math.inf, math.inf)).is_free(
        x, y, 0.3
    )
    return blocked, math.dist((x, y), middle)


def _chair(room: layout.Layout) -> Pose:
    size = SIZES["chair"]
    for name, gap in itertools.product((*FREE, KITCHEN), (0.1, 0.4, 0.8, 1.2)):
        pose, beside = room.furniture[name], SIZES[name].width / 2 + size.width / 2 + gap
        for side in (-1, 1):
            chair = Pose(*pose.point(0, side * beside), pose.heading)
            stand = chair.point(size.depth / 2 + layout.GAP, 0)
            if room.is_free(chair.x, chair.y, size.width / 2) and room.is_free(*stand, 0.25):
                return chair
    left, bottom, _, _ = room.room
    return Pose(left + 0.4, bottom + 0.4, 0.0)


def import_episodes(source: Path, out: Path, instructions: Path | None = None) -> None:
    """Writes ``out/SPLIT.json`` for every official file in ``source``.

    With ``instructions``, the file of LLaRP's templates, it also writes their training wordings.

    Raises:
      UserError: see ``convert`` and ``read_wordings``; or ``out`` cannot be written to.
    """
    episodes = convert(source)
    wordings = None if instructions is None else read_wordings(instructions)
    with locked(out, "--out"):
        if wordings is not None:
            write_json(
                official.wordings_path(out), {"format": official.FORMAT, "wordings": wordings}
            )
        for split, found in episodes.items():
            write_json(official.path(out, split), official.document(split, found))
    total = sum(map(len, episodes.values()))
    print(
        f"{total} episodes of {len(episodes)} splits in {out}; next: export LANGR_EPISODES={out.resolve()}"
    )


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.import_langr",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=user_path, required=True, help="folder of the pickles")
    parser.add_argument("--out", type=user_path, required=True, help="folder to write JSON to")
    parser.add_argument(
        "--instructions", type=user_path, help="LLaRP's instructions.yaml, for the task llarp"
    )
    args = parser.parse_args()
    import_episodes(args.source, args.out, args.instructions)


if __name__ == "__main__":
    errors.run(main)
