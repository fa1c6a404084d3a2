"""The five BabyAI families of arXiv 2406.07904 as minigrid levels, and the words of their missions.

They follow the mixed level of GLAM (arXiv 2302.02662), rebuilt from minigrid's parts: one room of 6 x 6 cells,
8 distractors beside the objects of the mission, and for ``open`` a second, empty room behind a locked door, whose key
is in the first. All objects can be reached.

Two differences guarantee that no episode is accomplished at its start: the agent is placed last, never in front of an
object, and a mission with two objects names two different ones.
"""

import contextlib
import io
import os
import re

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # it prints a greeting

from minigrid.core.world_object import WorldObj  # noqa: E402
from minigrid.envs.babyai.core.roomgrid_level import RejectSampling, RoomGridLevel  # noqa: E402
from minigrid.envs.babyai.core.verifier import (  # noqa: E402
    AfterInstr,
    BeforeInstr,
    GoToInstr,
    Instr,
    ObjDesc,
    OpenInstr,
    PickupInstr,
    PutNextInstr,
)

ROOM = 8  # cells per side, walls included
DISTRACTORS = 8
# No mission names these, but they may be distractors. Doors are never of a held-out colour (red and grey).
HELD_OUT = {("yellow", "box"), ("red", "key"), ("green", "ball")}
DOOR_COLORS = ("yellow", "green", "blue", "purple")  # all but red and grey
# GLAM's dictionary for testing on unseen words.
SYNONYMS = {
    "red": "vermilion",
    "green": "jade",
    "blue": "cyan",
    "purple": "violet",
    "yellow": "golden",
    "grey": "silver",
    "key": "chair",
    "ball": "table",
    "box": "car",
}


def with_synonyms(mission: str) -> str:
    """Replaces every word in `SYNONYMS`: ``a red ball`` -> ``a vermilion table``."""
    return re.sub(r"\w+", lambda word: SYNONYMS.get(word[0], word[0]), mission)


class Level(RoomGridLevel):
    """One family; `start` generates an episode of it."""

    def __init__(self, family: str, horizon: int) -> None:
        self._family = family
        rooms = 2 if family == "open" else 1
        super().__init__(room_size=ROOM, num_rows=1, num_cols=rooms, max_steps=horizon)

    def start(self, seed: int) -> None:
        """Generates the layout and mission of a seed, which must not be negative."""
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # minigrid prints every layout that it rejects
            self.reset(seed=seed)

    @property
    def left(self) -> int:
        """The first column of the agent's room. With two rooms, it never leaves the one where it starts."""
        return int(self._room) * (ROOM - 1)

    def gen_mission(self) -> None:
        """Fills the empty grid and sets the instruction.

        Raises:
          RejectSampling: the layout is not valid; minigrid then tries again.
        """
        self._room = 0
        if self._family == "open":
            self.instrs = self._behind_a_door()
        else:
            self.instrs = self._in_one_room()
        self.check_objs_reachable()

    def _behind_a_door(self) -> Instr:
        self._room = self._rand_int(0, 2)
        color = self._rand_elem(DOOR_COLORS)
        wall = 0 if self._room == 0 else 2  # right or left
        self.add_door(self._room, 0, wall, color, locked=True)
        self.add_object(self._room, 0, "key", color)
        self.add_distractors(self._room, 0, DISTRACTORS, all_unique=False)
        self.place_agent(self._room, 0)
        return OpenInstr(ObjDesc("door", self._rand_elem([None, color])))

    def _in_one_room(self) -> Instr:
        named = 1 if self._family in ("goto", "pickup") else 2
        objects = self.add_distractors(0, 0, DISTRACTORS + named, all_unique=False)
        self.place_agent(0, 0)
        first = self._name(objects)
        if self._family == "goto":
            return GoToInstr(first)
        if self._family == "pickup":
            return PickupInstr(first)
        second = self._name([o for o in objects if (o.color, o.type) != (first.color, first.type)])
        if self._family == "putnext":
            return PutNextInstr(first, second)
        if self._rand_bool():
            return BeforeInstr(PickupInstr(first), GoToInstr(second))
        return AfterInstr(GoToInstr(second), PickupInstr(first))

    def _name(self, objects: list[WorldObj]) -> ObjDesc:
        if not objects:
            raise RejectSampling("nothing to name")
        target = self._rand_elem(objects)
        if (target.color, target.type) in HELD_OUT:
            raise RejectSampling("held out")
        return ObjDesc(target.type, target.color)
