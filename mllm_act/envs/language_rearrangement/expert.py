"""The expert: it searches the home for what the goal speaks of, and then acts by the shortest plan.

A policy sees no more than what is before the robot. An expert that went straight to an object nobody has seen could
not be imitated, so this one looks for it: first at the places that the instruction names, then in a fixed order, last
where the object is to go.

Plans are found by breadth-first search over the whole state. They move only objects of the classes in the goal (and
what is held), only to receptacles that the goal names for their class, and go only where these are, so that a few
hundred states suffice. Among plans of equal length it takes the one along the subgoals.
"""

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

from mllm_act.envs.base import ExpertFailed
from mllm_act.envs.language_rearrangement import goals
from mllm_act.envs.language_rearrangement.entities import (
    CABINETS,
    FRIDGE,
    INSIDE,
    OPEN_AIR,
    PLACES,
    RECEPTACLE,
    RECEPTACLES,
    Action,
)
from mllm_act.envs.language_rearrangement.goals import Goal
from mllm_act.envs.language_rearrangement.world import NEAR, Task, World

LIMIT = 100_000  # states; the most in the official episodes is some hundreds
SIGHT = (2.5, 0.75)  # metres, radians: where the expert sees objects; the camera sees a little more


class Expert:
    """Acts in one episode. It knows what was before the robot, and what it searched for where."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._seen: set[str] = set()
        self._visited: set[str] = set()
        kinds, targets, _ = _mentioned(task.episode.goal)
        text = task.episode.instruction
        wanted = {receptacle for kind in kinds for receptacle in targets.get(kind, ())}
        self._order = sorted(
            map(RECEPTACLE.__getitem__, OPEN_AIR),
            key=lambda name: (
                name in wanted,
                RECEPTACLES[name] not in text,
                text.find(RECEPTACLES[name]),
            ),
        )
        self.look()

    def look(self) -> None:
        """Notes what is before the robot. To be called after every step."""
        world = self._task.world
        self._visited.add(world.place)
        self._seen |= {name for name in world.kinds if world.near(name, SIGHT)}

    def advise(self) -> Action:
        """Returns the action for this state.

        Raises:
          ExpertFailed: there is no plan to the goal, or it holds already.
        """
        actions = plan(self._task)
        if not actions:
            raise ExpertFailed("the goal holds already")
        if self._next_object(actions) in (None, *self._seen):
            return actions[0]
        for receptacle in self._order:
            if receptacle not in self._visited:
                return Action("nav", receptacle)
        return actions[0]

    def _next_object(self, actions: list[Action]) -> str | None:
        """Returns the object that a plan takes or goes to next."""
        world = self._task.world.copy()
        if world.held is not None:
            return None
        for action in actions:
            if action.verb == "pick":
                return world.graspable(action.target)
            world.act(action)
        kinds, _, _ = _mentioned(self._task.episode.goal)
        found = [n for kind in kinds for n in world.of_kind(kind) if world.near(n, NEAR)]
        return found[0] if found else None


def plan(task: Task) -> list[Action]:
    """Returns the shortest actions to the goal, none if it holds.

    Raises:
      ExpertFailed: there is no plan.
    """
    if task.solved:
        return []
    goal, relevant = task.episode.goal, _Relevant(task)
    before: dict[Any, tuple[Any, Action] | None] = {relevant.key(task.world): None}
    queue = deque([task.world])
    while queue and len(before) < LIMIT:
        world = queue.popleft()
        for action in relevant.actions(world):
            after = world.copy()
            after.act(action)
            key = relevant.key(after)
            if key in before:
                continue
            before[key] = (relevant.key(world), action)
            if goals.holds(goal, after):
                return _path(before, key)
            queue.append(after)
    raise ExpertFailed(f"no plan in {len(before)} states")


def _path(before: Mapping[Any, tuple[Any, Action] | None], key: Any) -> list[Action]:
    actions = []
    while (step := before[key]) is not None:
        key, action = step
        actions.append(action)
    return actions[::-1]


class _Relevant:
    """What a plan may move, and where it may go."""

    def __init__(self, task: Task) -> None:
        world = task.world
        kinds, targets, places = _mentioned(task.episode.goal)
        order = {
            predicate.arguments[0]: number
            for number, predicate in enumerate(
                map(goals.parse, itertools.chain(*task.episode.subgoals))
            )
            if predicate.name == "holding"
        }
        self._objects = sorted(
            (name for name, kind in world.kinds.items() if kind in kinds or name == world.held),
            key=lambda name: order.get(name, math.inf),
        )
        self._kinds = tuple(dict.fromkeys(world.kinds[name] for name in self._objects))
        # Class -> where to put its objects: what the goal names, and anywhere if one is only in the way.
        anywhere = [RECEPTACLE[word] for word in ("chair", *OPEN_AIR)]
        self._targets = {kind: targets.get(kind) or anywhere for kind in self._kinds}
        self._places: dict[str, None] = {}
        for name in self._objects:
            receptacle = world.receptacle[name]
            if receptacle in INSIDE:
                places[INSIDE[receptacle]] = None
            if receptacle:
                self._places[receptacle] = None
        for kind in self._kinds:
            if kind in targets or (world.held and world.kinds[world.held] == kind):
                self._places |= dict.fromkeys(self._targets[kind])
        self._places |= places
        self._handles = [place for place in places if place == FRIDGE or place in CABINETS]

    def key(self, world: World) -> tuple[Any, ...]:
        """Returns all of the state that a plan can change."""
        position, receptacle = world.position, world.receptacle
        where = tuple((receptacle[name], position[name]) for name in self._objects)
        return world.place, world.held, world.opened, where

    def actions(self, world: World) -> Iterator[Action]:
        """Yields the relevant actions that are valid."""
        candidates: list[Action] = []
        if world.held is None:
            candidates += [Action("pick", kind) for kind in self._kinds]
        else:
            candidates += [
                Action("place", target) for target in self._targets[world.kinds[world.held]]
            ]
        for handle in self._handles:
            candidates.append(Action("close" if handle in world.opened else "open", handle))
        yield from filter(world.is_valid, candidates)
        yield from (Action("nav", place) for place in self._places if place != world.place)


def _mentioned(goal: Goal) -> tuple[dict[str, None], dict[str, list[str]], dict[str, None]]:
    """Returns what a goal speaks of: classes, class -> receptacles to put its objects, places to go."""
    kinds: dict[str, None] = {}
    targets: dict[str, list[str]] = defaultdict(list)
    places: dict[str, None] = {}

    def visit(part: Goal, bound: dict[str, str], wanted: bool) -> None:
        if isinstance(part, str):
            name, arguments = goals.parse(part)
            if name == "on_top" and arguments[0] in bound:
                put = targets[bound[arguments[0]]]
                if wanted:
                    put.append(arguments[1])
                else:
                    put.extend(r for r in RECEPTACLES if r != arguments[1])
            elif arguments and arguments[0] in PLACES:
                places[arguments[0]] = None
            return
        bound = bound | {v["name"]: v["expr_type"] for v in part.get("inputs", ())}
        kinds.update(dict.fromkeys(bound.values()))
        for inner in part["sub_exprs"]:
            visit(inner, bound, wanted == (part["expr_type"] == "AND"))

    visit(goal, {}, True)
    return kinds, targets, places
