"""The five BabyAI families of arXiv 2406.07904 as minigrid levels, and the words of their missions.

They follow the mixed level of the grounding study GLAM (arXiv 2302.02662), rebuilt on minigrid's own
pieces: one room of 6 x 6 cells, 8 distractors beside the objects of the mission, and for ``open`` a
second, empty room behind a locked door, whose key lies in the first. All objects can be reached.

Two things are other than there, so that no episode is done before it begins: the agent is placed
last, never in front of an object; and a mission of two objects names two different ones.
"""

import contextlib
import io
import os
import re

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # it greets on stdout

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

ROOM = 8  # cells a side, walls included
DISTRACTORS = 8
# No mission names these; they may lie about all the same. Of doors, only the other colours are drawn.
HELD_OUT = {("yellow", "box"), ("red", "key"), ("green", "ball")}
DOOR_COLORS = ("yellow", "green", "blue", "purple")  # all but red and grey
# GLAM's dictionary for the test of unseen words.
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
    """Replaces each word that `SYNONYMS` has: ``a red ball`` -> ``a vermilion table``."""
    return re.sub(r"\w+", lambda word: SYNONYMS.get(word[0], word[0]), mission)


class Level(RoomGridLevel):
    """One family; `start` draws an episode of it."""

    def __init__(self, family: str, horizon: int) -> None:
        self._family = family
        rooms = 2 if family == "open" else 1
        super().__init__(room_size=ROOM, num_rows=1, num_cols=rooms, max_steps=horizon)

    def start(self, seed: int) -> None:
        """Draws the layout and the mission of a seed (not negative), always the same."""
        with contextlib.redirect_stdout(io.StringIO()):  # it prints each layout that it rejects
            self.reset(seed=seed)

    @property
    def left(self) -> int:
        """The first column of the room that the agent is in: of two rooms, it never leaves one."""
        return self._room * (ROOM - 1)

    def gen_mission(self) -> None:
        """Furnishes the empty grid and sets the instruction. Raises RejectSampling; minigrid then
        starts anew.
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
        wall = 0 if self._room == 0 else 2  # the right one, the left one
        self.add_door(self._room, 0, wall, color, locked=True)
        self.add_object(self._room, 0, "key", color)
        self.add_distractors(self._room, 0, DISTRACTORS, all_unique=False)
        self.place_agent(self._room, 0)
        return OpenInstr(ObjDesc("door", self._rand_elem([None, color])))

    def _in_one_room(self) -> Instr:
        named = 1 if self._family in ("goto", "pickup") else 2
        things = self.add_distractors(0, 0, DISTRACTORS + named, all_unique=False)
        self.place_agent(0, 0)
        first = self._name(things)
        if self._family == "goto":
            return GoToInstr(first)
        if self._family == "pickup":
            return PickupInstr(first)
        second = self._name([t for t in things if (t.color, t.type) != (first.color, first.type)])
        if self._family == "putnext":
            return PutNextInstr(first, second)
        if self._rand_bool():
            return BeforeInstr(PickupInstr(first), GoToInstr(second))
        return AfterInstr(GoToInstr(second), PickupInstr(first))

    def _name(self, things: list[WorldObj]) -> ObjDesc:
        if not things:
            raise RejectSampling("nothing to name")
        thing = self._rand_elem(things)
        if (thing.color, thing.type) in HELD_OUT:
            raise RejectSampling("held out")
        return ObjDesc(thing.type, thing.color)
