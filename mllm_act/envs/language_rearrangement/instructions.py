"""The training instructions: nine templates with the meaning of LLaRP's, in words of our own, and what they draw.

The original's evaluation asks for more: other wordings, several objects, conditions. None of its evaluation wordings
is here. As in the original, articles are part of a wording, so that "an pear" occurs.
"""

from typing import Any, NamedTuple

from mllm_act.envs.language_rearrangement.entities import (
    FRIDGE,
    HELD_OUT,
    OBJECTS,
    OPEN_AIR,
    RECEPTACLE,
)
from mllm_act.envs.language_rearrangement.goals import Goal

TRAINED = tuple(kind for kind in OBJECTS if kind not in HELD_OUT)


class Slot(NamedTuple):
    """An object that an instruction names."""

    kinds: tuple[str, ...]
    start: str  # "from" or "from2": the receptacle of that name; "": any but that of "to"


class Template(NamedTuple):
    """A kind of instruction.

    Attributes:
      wordings: with ``{object}``, ``{object2}``, ``{from}``, ``{from2}`` and ``{to}``.
      weight: how often it is drawn, relative to the others.
      objects: name -> which objects, where at the start.
      receptacles: the names of receptacles, all different.
      goal: the same with the names in braces.
      fridge_open: whether the fridge is open at the start.
      fixed: name -> the only object or receptacle it may be.
    """

    wordings: tuple[str, ...]
    weight: int
    objects: dict[str, Slot]
    receptacles: tuple[str, ...]
    goal: Any
    fridge_open: bool = False
    fixed: dict[str, str] = {}


def _exists(parts: list[Goal], *names: str, kind: str = "AND") -> Goal:
    inputs = [{"name": f"X{i}", "expr_type": f"{{{name}}}"} for i, name in enumerate(names)]
    return {"expr_type": kind, "quantifier": "EXISTS", "inputs": inputs, "sub_exprs": parts}


_CARRIED = _exists(["on_top(X0, {to})", "not_holding()"], "object")
_BOTH = _exists(["on_top(X0, {to})", "on_top(X1, {to})", "not_holding()"], "object", "object2")

TEMPLATES = {
    "move-from-to": Template(
        (
            "Move the {object} from the {from} to the {to}.",
            "Take the {object} that is on the {from} to the {to}.",
            "Carry a {object} from the {from} over to the {to}.",
            "Bring an {object} from the {from} to the {to}.",
            "Get the {object} off the {from} and put it on the {to}.",
            "Pick up a {object} at the {from} and drop it at the {to}.",
            "Fetch an {object} from the {from} and set it down on the {to}.",
            "Grab the {object} from the {from}, then leave it on the {to}.",
            "From the {from}, bring the {object} to the {to}.",
            "Please transfer the {object} from the {from} to the {to}.",
            "Deliver a {object} from the {from} to the {to}.",
        ),
        4,
        {"object": Slot(TRAINED, "from")},
        ("from", "to"),
        _CARRIED,
    ),
    "move-to": Template(
        (
            "Move the {object} to the {to}.",
            "Put a {object} on the {to}.",
            "Bring an {object} to the {to}.",
            "Carry the {object} to the {to}.",
            "Get a {object} and put it on the {to}.",
            "Please place an {object} on the {to}.",
            "Look for a {object} and take it to the {to}.",
            "The {object} belongs on the {to}.",
            "Deliver an {object} to the {to}.",
            "Leave a {object} at the {to}.",
            "Set the {object} down on the {to}.",
        ),
        4,
        {"object": Slot(TRAINED, "")},
        ("to",),
        _CARRIED,
    ),
    "take-away": Template(
        (
            "Take the {object} off the {from}.",
            "Remove the {object} from the {from}.",
            "Get the {object} away from the {from}.",
            "Put the {object} that is on the {from} somewhere else.",
            "Carry the {object} away from the {from}.",
            "The {object} must not stay on the {from}.",
            "Move the {object} from the {from} to another place.",
            "Find another place for the {object} on the {from}.",
            "Relocate the {object} away from the {from}.",
            "Tidy the {object} away from the {from}.",
        ),
        4,
        {"object": Slot(OBJECTS, "from")},
        ("from",),
        {
            "expr_type": "AND",
            "sub_exprs": [
                "not_holding()",
                _exists(["on_top(X0, {from})"], "object", kind="NAND"),
            ],
        },
    ),
    "move-two": Template(
        (
            "Put a {object} and a {object2} on the {to}.",
            "Bring the {object} and the {object2} to the {to}.",
            "Move both the {object} and the {object2} to the {to}.",
            "Carry an {object} and an {object2} over to the {to}.",
            "Place a {object} on the {to}, and a {object2} too.",
            "Set the {object} and the {object2} down on the {to}.",
            "Gather a {object} and an {object2} at the {to}.",
            "Take the {object}, then the {object2}, to the {to}.",
            "Deliver the {object} and the {object2} to the {to}.",
            "The {object} and the {object2} belong on the {to}.",
        ),
        4,
        {"object": Slot(OBJECTS, ""), "object2": Slot(OBJECTS, "")},
        ("to",),
        _BOTH,
    ),
    "swap": Template(
        (
            "Swap the {object} on the {from} with the {object2} on the {from2}.",
            "Exchange the {object} on the {from} and the {object2} on the {from2}.",
            "Let the {object} from the {from} and the {object2} from the {from2} trade places.",
            "Switch the {object} at the {from} with the {object2} at the {from2}.",
            "Put the {object} where the {object2} is, and the other way round; they are on the {from} and the {from2}.",
            "The {object} and the {object2} on the {from} and the {from2} should change places.",
            "Interchange the {object} of the {from} and the {object2} of the {from2}.",
            "Bring the {object} from the {from} to the {from2}, and the {object2} from there to the {from}.",
        ),
        4,
        {"object": Slot(OBJECTS, "from"), "object2": Slot(OBJECTS, "from2")},
        ("from", "from2"),
        _exists(
            ["on_top(X0, {from2})", "on_top(X1, {from})", "not_holding()"], "object", "object2"
        ),
    ),
    "close-fridge": Template(
        (
            "Close the fridge.",
            "Please close the door of the fridge.",
            "Someone forgot to close the fridge, please do it.",
            "The fridge is open, close it.",
            "Push the fridge door shut.",
            "The food gets warm, close the refrigerator.",
            "Make sure that the fridge is closed.",
            "Go and close the refrigerator.",
        ),
        1,
        {},
        (),
        {"expr_type": "AND", "sub_exprs": [f"closed_fridge({FRIDGE})"]},
        fridge_open=True,
    ),
    "open-fridge": Template(
        (
            "Open the fridge.",
            "Please open the door of the fridge.",
            "The fridge is closed, open it.",
            "Pull the fridge door open.",
            "Go and open the refrigerator.",
            "I would like the fridge to be open.",
            "Make sure that the fridge is open.",
            "Open up the refrigerator, please.",
        ),
        1,
        {},
        (),
        {"expr_type": "AND", "sub_exprs": [f"opened_fridge({FRIDGE})"]},
    ),
    "go-to": Template(
        (
            "Go to the {to}.",
            "Drive to the {to}.",
            "Move over to the {to}.",
            "Come to the {to}.",
            "Navigate to the {to}.",
            "Please go and stand at the {to}.",
            "Approach the {to}.",
            "Position yourself by the {to}.",
        ),
        1,
        {},
        ("to",),
        {"expr_type": "AND", "sub_exprs": ["robot_at({to})"]},
    ),
    "find": Template(
        (
            "Find the {object}.",
            "Find a {object}.",
            "Look for an {object}.",
            "Where is the {object}? Go there.",
            "Go to the {object}.",
            "Show me where a {object} is.",
            "Track down the {object}.",
            "Go and see where the {object} lies.",
        ),
        1,
        {"object": Slot(TRAINED, "from")},
        ("from",),
        _exists(["robot_at(X0)"], "object"),
    ),
    "lay-a-place": Template(
        ("Lay a place for one on the {to}, with a {object}.",),
        1,
        {"object": Slot(TRAINED, "")},
        ("to",),
        _CARRIED,
        fixed={"object": "plate"},
    ),
    "set-the-table": Template(
        (
            "Set the table with a knife and a spoon.",
            "Lay the table: a knife and a spoon.",
            "The table needs cutlery, a knife and a spoon.",
            "Put knife and spoon on the table for a meal.",
            "Get the table ready with knife and spoon.",
        ),
        1,
        {"object": Slot(OBJECTS, ""), "object2": Slot(OBJECTS, "")},
        ("to",),
        _BOTH,
        fixed={"object": "knife", "object2": "spoon", "to": "black table"},
    ),
}


def filled(goal: Any, names: dict[str, str]) -> Any:
    """Returns a template's goal with classes and receptacles in place of the names in braces."""
    if isinstance(goal, str):
        for name, value in names.items():
            goal = goal.replace(f"{{{name}}}", RECEPTACLE[value] if value in OPEN_AIR else value)
        return goal
    if isinstance(goal, list):
        return [filled(part, names) for part in goal]
    if isinstance(goal, dict):
        return {key: filled(value, names) for key, value in goal.items()}
    return goal
