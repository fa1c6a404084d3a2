"""Training episodes of our own: a room, its objects, an instruction and the subgoals on the way (LLaRP's recipe).

Nothing but the arguments determines an episode: not the process, not the machine.
"""

import dataclasses
import itertools
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mllm_act.envs.base import ExpertFailed
from mllm_act.envs.language_rearrangement import expert, rooms
from mllm_act.envs.language_rearrangement.entities import OBJECTS, OPEN_AIR, RECEPTACLE, SPOKEN
from mllm_act.envs.language_rearrangement.instructions import TEMPLATES, Template, filled
from mllm_act.envs.language_rearrangement.layout import SURFACES, Layout, Pose
from mllm_act.envs.language_rearrangement.world import APART, Episode, Task, Thing

TWICE = ("block", "cup")  # classes with two objects in every room, as in the original's: 35 objects
MOST = {"sink": 3}  # objects on a receptacle at the start
MOST_ELSEWHERE = 8


def generate(
    task: str, room: int, seed: Sequence[int], wordings: Mapping[str, Sequence[str]] | None = None
) -> Episode:
    """Returns the episode of a seed.

    Args:
      task: a template, or another name for any of them by its weight.
      room: the number of the room.
      seed: non-negative integers.
      wordings: of every template, in place of its own.
    """
    layout = rooms.room(room)
    rng = np.random.default_rng([*seed, room, zlib.crc32(task.encode())])
    while True:
        name = task if task in TEMPLATES else _draw(rng)
        words = TEMPLATES[name].wordings if wordings is None else wordings[name]
        episode = _episode(rng, name, words, layout)
        if episode is not None:
            return episode


def _draw(rng: np.random.Generator) -> str:
    names = list(TEMPLATES)
    weights = np.array([TEMPLATES[name].weight for name in names], float)
    return names[rng.choice(len(names), p=weights / weights.sum())]


def _episode(
    rng: np.random.Generator, name: str, wordings: Sequence[str], layout: Layout
) -> Episode | None:
    template = TEMPLATES[name]
    names = _names(rng, template)
    starts = _starts(rng, template, names)
    if starts is None:
        return None
    things = _things(rng, layout, starts)
    wording = wordings[int(rng.integers(len(wordings)))]
    episode = Episode(
        instruction=wording.format(**{key: SPOKEN.get(n, n) for key, n in names.items()}),
        template=name,
        layout=layout,
        start=start(rng, layout),
        things=things,
        goal=filled(template.goal, names),
        fridge_open=template.fridge_open,
    )
    # Subgoals are found from a corner of the room, where nothing is near by accident.
    far = Task(dataclasses.replace(episode, start=Pose(-10.0, -10.0, 0.0)))
    if far.solved or Task(episode).solved:
        return None
    try:
        return dataclasses.replace(episode, subgoals=subgoals(far))
    except ExpertFailed:
        return None


def _names(rng: np.random.Generator, template: Template) -> dict[str, str]:
    """Returns what the names in an instruction stand for."""
    receptacles = iter(rng.permutation(OPEN_AIR).tolist())
    names = {name: next(receptacles) for name in template.receptacles}
    for name, slot in template.objects.items():
        kinds = [kind for kind in slot.kinds if kind not in names.values()]
        names[name] = kinds[rng.integers(len(kinds))]
    return names | template.fixed


def _starts(
    rng: np.random.Generator, template: Template, names: dict[str, str]
) -> list[tuple[str, str]] | None:
    """Returns the class and the receptacle of every object, None where a receptacle is full."""
    space = Counter({word: MOST.get(word, MOST_ELSEWHERE) for word in OPEN_AIR})
    starts = []
    for name, slot in template.objects.items():
        where = names.get(slot.start)
        if where is None:
            others = [word for word in OPEN_AIR if word != names.get("to")]
            where = others[rng.integers(len(others))]
        starts.append((names[name], where))
        space[where] -= 1
    # Of a class that the instruction names there is one object, so that the goal is the one that is meant.
    named = {kind for kind, _ in starts}
    rest = [kind for kind in (*OBJECTS, *TWICE) if kind not in named]
    for kind in rng.permutation(rest).tolist():
        free = [word for word in OPEN_AIR if space[word] > 0]
        where = free[rng.integers(len(free))]
        starts.append((kind, where))
        space[where] -= 1
    return starts if min(space.values()) >= 0 else None


def _things(
    rng: np.random.Generator, layout: Layout, starts: Sequence[tuple[str, str]]
) -> tuple[Thing, ...]:
    things: list[Thing] = []
    numbers: Counter[str] = Counter()
    for kind, word in starts:
        receptacle = RECEPTACLE[word]
        surface = SURFACES[receptacle]
        pose = layout.furniture[surface.furniture]
        others = [(t.x, t.y) for t in things if t.receptacle == receptacle]
        best, most = (0.0, 0.0), -1.0
        for a, b in rng.uniform(-1, 1, (12, 2)).tolist():
            point = pose.point(surface.x + a * surface.half_x, surface.y + b * surface.half_y)
            space = min((math.dist(point, other) for other in others), default=math.inf)
            if space > most:
                best, most = point, space
            if space >= APART:
                break
        x, y = best
        things.append(Thing(f"{kind}_{numbers[kind]}", kind, receptacle, round(x, 3), round(y, 3)))
        numbers[kind] += 1
    return tuple(things)


def start(rng: np.random.Generator, layout: Layout) -> Pose:
    """Returns a random free pose of the robot."""
    left, bottom, right, top = layout.room
    for margin in itertools.chain([0.35] * 200, itertools.repeat(0.0)):
        x, y = rng.uniform((left, bottom), (right, top)).tolist()
        if layout.is_free(x, y, margin):
            return Pose(round(x, 3), round(y, 3), round(float(rng.uniform(-np.pi, np.pi)), 3))
    raise AssertionError


def subgoals(task: Task) -> tuple[tuple[str, ...], ...]:
    """Returns what is true after each action of the shortest plan: where the robot is, what it holds, what is done.

    Raises:
      ExpertFailed: there is no plan.
    """
    result = []
    done: dict[str, str] = {}
    world = task.world
    for action in expert.plan(task):
        held = world.held
        world.act(action)
        if action.verb == "place" and held is not None:
            done[held] = f"on_top({held}, {action.target})"
        elif action.verb in ("open", "close"):
            done[action.target] = f"{action.verb.removesuffix('e')}ed_fridge({action.target})"
        elif action.verb == "pick" and world.held is not None:
            done.pop(world.held, None)
        true = list(done.values())
        if world.held is not None:
            true.append(f"holding({world.held})")
        if action.verb == "nav":
            true.append(f"robot_at({action.target})")
        result.append(tuple(true))
    return tuple(result)
