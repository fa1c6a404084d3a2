"""CALVIN's 34 tasks: their sentences, and when they are possible, in terms of a symbolic state.

A state says of every block where it is (``table``, ``slider_left``, ``slider_right``, ``drawer``, ``grasped``,
``stacked_top``, ``stacked_bottom``), of ``slider`` left or right, of ``drawer`` closed or open, of ``led`` and
``lightbulb`` 0 or 1, and of ``grasped`` whether a block is held. ``slider_left`` and ``slider_right`` are the two ends
of the shelf behind the sliding door: the door covers the end at which it is.

Sentences are those of CALVIN's validation (github.com/mees/calvin, new_playtable_validation.yaml, MIT licence).
"""

from collections.abc import Iterator

State = dict[str, str | int]

COLORS = ("red", "blue", "pink")

# In the order of CALVIN's own list, from which its evaluation draws.
SENTENCES: dict[str, str] = {
    **{
        f"rotate_{color}_block_{side}": f"take the {color} block and rotate it to the {side}"
        for color in COLORS
        for side in ("right", "left")
    },
    **{
        f"push_{color}_block_{side}": f"go push the {color} block {side}"
        for color in COLORS
        for side in ("right", "left")
    },
    "move_slider_left": "push the sliding door to the left side",
    "move_slider_right": "push the sliding door to the right side",
    "open_drawer": "pull the handle to open the drawer",
    "close_drawer": "push the handle to close the drawer",
    **{
        f"lift_{color}_block_{place}": sentence.format(color)
        for color in COLORS
        for place, sentence in (
            ("table", "grasp and lift the {} block"),
            ("slider", "lift the {} block from the sliding cabinet"),
            ("drawer", "Take the {} block from the drawer"),
        )
    },
    "place_in_slider": "store the grasped block in the sliding cabinet",
    "place_in_drawer": "store the grasped block in the drawer",
    "stack_block": "stack the grasped block",
    "unstack_block": "remove the stacked block",
    "turn_on_lightbulb": "use the switch to turn on the light bulb",
    "turn_off_lightbulb": "use the switch to turn off the light bulb",
    "turn_on_led": "press the button to turn on the led light",
    "turn_off_led": "press the button to turn off the led light",
    "push_into_drawer": "slide the block that it falls into the drawer",
}
TASKS = tuple(SENTENCES)

# Of these, one sequence has at most one task.
_KINDS = (
    ("rotate_", "push_red", "push_blue", "push_pink"), ("move_slider",), ("open_drawer", "close_drawer"), ("_table",),
    ("_block_slider",), ("_block_drawer",), ("place_in",), ("turn_",), ("push_into",), ("unstack",), ("stack_",),
)  # fmt: skip
KIND = {
    task: next(i for i, names in enumerate(_KINDS) if any(name in task for name in names))
    for task in TASKS
}


def outcomes(state: State, task: str) -> list[State]:
    """Returns the states in which a task can end; none if it is not possible, several if it is not determined."""
    return [{**state, **effect} for effect in _effects(state, task)]


def _effects(state: State, task: str) -> Iterator[State]:
    blocks = {color: state[f"{color}_block"] for color in COLORS}
    if task.startswith(("place_in", "stack")):
        for color in (color for color in COLORS if blocks[color] == "grasped"):
            yield from _placed(state, task, color)
        return
    if state["grasped"]:
        return
    match task.split("_"):
        case ["rotate" | "push", color, "block", _] if blocks[color] == "table":
            yield {}
        case ["move", "slider", side] if state["slider"] != side:
            yield {"slider": side}
        case ["open", "drawer"] if state["drawer"] == "closed":
            yield {"drawer": "open"}
        case ["close", "drawer"] if state["drawer"] == "open":
            yield {"drawer": "closed"}
        case ["lift", color, "block", place] if _within_reach(state, blocks[color], place):
            yield {f"{color}_block": "grasped", "grasped": 1}
        case ["turn", switched, light] if state[light] == (switched == "off"):
            yield {light: int(switched == "on")}
        case ["push", "into", "drawer"] if state["drawer"] == "open":
            for color in COLORS:
                others = [str(place) for other, place in blocks.items() if other != color]
                if blocks[color] == "table" and all(o.startswith("slider") for o in others):
                    yield {f"{color}_block": "drawer"}
        case ["unstack", "block"]:
            tops = [color for color in COLORS if blocks[color] == "stacked_top"]
            bottoms = [color for color in COLORS if blocks[color] == "stacked_bottom"]
            for top, bottom in zip(tops, bottoms, strict=True):
                yield {f"{top}_block": "table", f"{bottom}_block": "table"}


def _within_reach(state: State, lies: str | int, place: str) -> bool:
    if place == "slider":
        return lies in ("slider_left", "slider_right") and lies != f"slider_{state['slider']}"
    return lies == place and (place == "table" or state["drawer"] == "open")


def _placed(state: State, task: str, color: str) -> Iterator[State]:
    if task == "place_in_slider":
        yield {f"{color}_block": f"slider_{state['slider']}", "grasped": 0}
    elif task == "place_in_drawer" and state["drawer"] == "open":
        yield {f"{color}_block": "drawer", "grasped": 0}
    elif task == "stack_block":
        for other in COLORS:
            if state[f"{other}_block"] == "table":
                yield {
                    f"{color}_block": "stacked_top",
                    f"{other}_block": "stacked_bottom",
                    "grasped": 0,
                }
