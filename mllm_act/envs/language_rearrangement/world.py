"""The symbolic state of an episode, and what the 70 actions do to it (LLaRP's domain, arXiv 2310.17722).

An action whose precondition does not hold changes nothing, and the episode goes on:

| action | precondition |
|---|---|
| nav | none |
| pick | nothing is held; an object of the class is in reach, 1.5 m and 1 rad; it is not in a closed drawer |
| place | something is held; the receptacle is within 2.0 m and a quarter turn |
| open, close | the handle is within 2.0 m and a quarter turn; it is closed, or open |
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from mllm_act.envs.language_rearrangement import goals
from mllm_act.envs.language_rearrangement.entities import (
    CABINETS,
    FRIDGE,
    INSIDE,
    PLACES,
    Action,
)
from mllm_act.envs.language_rearrangement.goals import Goal, Predicate
from mllm_act.envs.language_rearrangement.layout import Layout, Pose, reaches

GRASP = (1.5, 1.0)  # metres, radians: of `pick`
NEAR = (2.0, 1.57)  # of the other actions, and of the predicate robot_at
APART = 0.17  # metres between objects that are placed
SUCCESS_REWARD = 10.0
PROGRESS_REWARD = 5.0


class Thing(NamedTuple):
    """A movable object at the start of an episode."""

    name: str
    kind: str  # its class, one of ``entities.OBJECTS``
    receptacle: str
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Episode:
    """Everything that determines an episode.

    Attributes:
      instruction: the sentence that the policy reads.
      template: the id of the instruction's template, as in the original.
      layout: the room.
      start: where the robot stands at first.
      things: the objects.
      goal: when the episode is solved.
      subgoals: lists of predicates that are true together on the way; progress is the share that was true once.
      fridge_open: whether the fridge is open at first. Drawers are closed.
    """

    instruction: str
    template: str
    layout: Layout
    start: Pose
    things: tuple[Thing, ...]
    goal: Goal
    subgoals: tuple[tuple[str, ...], ...] = ()
    fridge_open: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return dataclasses.asdict(self)


class World:
    """The state. It implements ``goals.Facts``."""

    def __init__(self, episode: Episode) -> None:
        self.layout = episode.layout
        self.robot = episode.start
        self.place = ""  # that the robot went to
        self.held: str | None = None
        self.opened: frozenset[str] = frozenset({FRIDGE} if episode.fridge_open else ())
        self.kinds = {thing.name: thing.kind for thing in episode.things}
        self.receptacle = {thing.name: thing.receptacle for thing in episode.things}
        self.position = {thing.name: (thing.x, thing.y) for thing in episode.things}

    def copy(self) -> "World":
        """Returns a world that can be changed without changing this one."""
        other = object.__new__(World)
        other.__dict__.update(self.__dict__)
        other.receptacle, other.position = dict(self.receptacle), dict(self.position)
        return other

    def of_kind(self, kind: str) -> Sequence[str]:
        """See ``goals.Facts``."""
        return [name for name, found in self.kinds.items() if found == kind]

    def holds(self, predicate: Predicate) -> bool:
        """See ``goals.Facts``. Nothing is on, in or near anything while it is held, except for the robot."""
        name, arguments = predicate
        if name == "not_holding":
            return self.held is None
        argument = arguments[0]
        if name == "holding":
            return self.held == argument
        if name == "on_top":
            return self.receptacle[argument] == arguments[1]
        if name == "in":
            return self.inside(argument) == arguments[1]
        if name in ("robot_at", "robot_at_obj"):
            return self.near(argument, GRASP if name == "robot_at_obj" else NEAR)
        return (argument in self.opened) == name.startswith("opened")

    def inside(self, name: str) -> str | None:
        """Returns the handle of the drawer or fridge that an object is in."""
        receptacle = self.receptacle[name]
        return FRIDGE if PLACES.get(receptacle) == "fridge" else INSIDE.get(receptacle)

    def near(self, name: str, limits: tuple[float, float]) -> bool:
        """Returns whether a place or an object is within a distance (m) and an angle (rad) of the robot."""
        if name == self.held:
            return True
        x, y = self.layout.target(name) if name in PLACES else self.position[name]
        return reaches(self.robot, x, y, *limits)

    def graspable(self, kind: str) -> str | None:
        """Returns the nearest object of a class that ``pick`` could take, were nothing held."""
        robot, found = (self.robot.x, self.robot.y), []
        for name in self.of_kind(kind):
            drawer = self.inside(name)
            closed = drawer in CABINETS and drawer not in self.opened
            if name != self.held and not closed and self.near(name, GRASP):
                found.append((math.dist(robot, self.position[name]), name))
        return min(found)[1] if found else None

    def is_valid(self, action: Action) -> bool:
        """Returns whether the precondition of an action holds."""
        verb, target = action
        if verb == "nav":
            return True
        if verb == "pick":
            return self.held is None and self.graspable(target) is not None
        if not self.near(target, NEAR):
            return False
        if verb == "place":
            return self.held is not None
        return (target in self.opened) == (verb == "close")

    def act(self, action: Action) -> bool:
        """Executes an action. Returns whether it was valid; if not, nothing changed."""
        if not self.is_valid(action):
            return False
        verb, target = action
        if verb == "nav":
            self.place, self.robot = target, self.layout.stand(target)
        elif verb == "pick":
            self.held = self.graspable(target)
            assert self.held is not None
            self.receptacle[self.held] = ""
        elif verb == "place":
            assert self.held is not None
            self.position[self.held] = self._spot(target)
            self.receptacle[self.held], self.held = target, None
        elif verb == "open":
            self.opened |= {target}
        else:
            self.opened -= {target}
        return True

    def _spot(self, receptacle: str) -> tuple[float, float]:
        """Returns the spot next to the middle of a receptacle that is free, or else the one with most space."""
        others = [self.position[n] for n, found in self.receptacle.items() if found == receptacle]
        spots = self.layout.spots(receptacle)
        space = [
            min((math.dist(spot, other) for other in others), default=math.inf) for spot in spots
        ]
        for spot, found in zip(spots, space, strict=True):
            if found >= APART:
                return spot
        return spots[space.index(max(space))]


class Task:
    """A world, the goal in it, and the progress towards it."""

    def __init__(self, episode: Episode) -> None:
        self.world = World(episode)
        self.episode = episode
        self._reached = [self._is_true(subgoal) for subgoal in episode.subgoals]
        self._paid = 0.0

    @property
    def progress(self) -> float:
        """The share of subgoals that were true at least once."""
        return sum(self._reached) / len(self._reached) if self._reached else 0.0

    @property
    def solved(self) -> bool:
        """Whether the goal holds."""
        return goals.holds(self.episode.goal, self.world)

    def step(self, action: Action) -> tuple[float, bool]:
        """Executes an action, valid or not.

        Returns:
          The reward, 5 for all progress and 10 for success (what is true at the start is paid at the first step), and
          whether the goal holds.
        """
        self.world.act(action)
        self._reached = [
            reached or self._is_true(subgoal)
            for reached, subgoal in zip(self._reached, self.episode.subgoals, strict=True)
        ]
        gained, self._paid = self.progress - self._paid, self.progress
        success = self.solved
        return PROGRESS_REWARD * gained + SUCCESS_REWARD * success, success

    def _is_true(self, subgoal: Sequence[str]) -> bool:
        """Returns whether the predicates of a subgoal are true together.

        The original lists with robot_at and robot_at_obj all that was near the robot where its simulator put it. Here
        the robot has to be near one of the places, or of the objects if no place is listed: neighbours depend on
        centimetres. The original also lists on_top of what is held over a receptacle, which means no more than to be
        there.
        """
        predicates = [goals.parse(text) for text in subgoal]
        held = [predicate.arguments[0] for predicate in predicates if predicate.name == "holding"]
        places, things = [], []
        for predicate in predicates:
            if predicate.name == "on_top" and predicate.arguments[0] in held:
                places.append(Predicate("robot_at", predicate.arguments[1:]))
            elif predicate.name not in ("robot_at", "robot_at_obj"):
                if not self.world.holds(predicate):
                    return False
            elif predicate.arguments[0] in PLACES:
                places.append(predicate)
            else:
                things.append(predicate)
        near = places or things
        return not near or any(self.world.holds(predicate) for predicate in near)
