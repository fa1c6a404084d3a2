"""What there is in a home, and the 70 actions, in the order and under the names of Language Rearrangement
(LLaRP, arXiv 2310.17722).

The index of an action follows from the files of the original: it lists the actions in the order of its domain file
(nav, pick, place, open and close the fridge, open and close the cabinets), and for each the entities: first the points
to push, then the receptacles.
"""

from typing import NamedTuple

OBJECTS = (
    "ball", "clamp", "hammer", "screwdriver", "padlock", "scissors", "block", "drill", "spatula", "knife", "spoon",
    "plate", "sponge", "cleanser", "plum", "pear", "peach", "apple", "lemon", "can", "box", "banana", "strawberry",
    "lego", "cube", "book", "bowl", "cup", "mug", "orange", "lid", "toy", "wrench",
)  # fmt: skip
# What instructions call a class, where it is not its word in the actions.
SPOKEN = {"cube": "rubriks cube", "toy": "toy airplane"}
# Training instructions that ask to carry or to find one object never name these.
HELD_OUT = ("mug", "orange", "lid", "toy", "wrench")

# What can be opened: the point to push -> its word.
CABINETS = {
    "cab_push_point_7": "left drawer",
    "cab_push_point_6": "middle drawer",
    "cab_push_point_5": "right drawer",
    "cab_push_point_4": "bottom drawer",
}
FRIDGE = "fridge_push_point"

# Where objects can be placed: the original's name -> its word.
RECEPTACLES = {
    "receptacle_aabb_Chr1_Top1_frl_apartment_chair_01": "chair",
    "receptacle_aabb_Tbl1_Top1_frl_apartment_table_01": "black table",
    "receptacle_aabb_Tbl2_Top1_frl_apartment_table_02": "brown table",
    "receptacle_aabb_TvStnd1_Top1_frl_apartment_tvstand": "TV stand",
    "receptacle_aabb_sink_kitchen_counter": "sink",
    "receptacle_aabb_counter_right_kitchen_counter": "right counter",
    "receptacle_aabb_counter_left_kitchen_counter": "left counter",
    "receptacle_aabb_Sofa_frl_apartment_sofa": "sofa",
    "receptacle_aabb_middle_topfrl_apartment_refrigerator": "fridge",
    "receptacle_aabb_drawer_left_top_frl_apartment_kitchen_counter": "left drawer",
    "receptacle_aabb_drawer_right_top_frl_apartment_kitchen_counter": "right drawer",
}
RECEPTACLE = {word: name for name, word in RECEPTACLES.items()}
# Where objects are at the start of an episode, by their words.
OPEN_AIR = (
    "black table", "brown table", "TV stand", "sink", "right counter", "left counter", "sofa",
)  # fmt: skip
# Drawer to place things in -> the point to push that opens it.
INSIDE = {
    RECEPTACLE["left drawer"]: "cab_push_point_7",
    RECEPTACLE["right drawer"]: "cab_push_point_5",
}

# Everything the robot can navigate to, in the order of the actions.
PLACES = {**CABINETS, FRIDGE: "fridge", **RECEPTACLES}
# The original calls the fridge and its shelf "fridge", and two drawers like their handles: 67 different names for 70
# actions. A further word keeps them apart for adapters that write actions as words.
FURTHER_WORD = dict.fromkeys(
    (RECEPTACLE["fridge"], RECEPTACLE["left drawer"], RECEPTACLE["right drawer"]), "inside"
)


class Action(NamedTuple):
    """An action: ``nav``, ``pick``, ``place``, ``open`` or ``close``, and an object class or the name of a place."""

    verb: str
    target: str


ACTIONS = (
    *(Action("nav", place) for place in PLACES),
    *(Action("pick", kind) for kind in OBJECTS),
    *(Action("place", receptacle) for receptacle in RECEPTACLES),
    Action("open", FRIDGE),
    Action("close", FRIDGE),
    *(Action("open", cabinet) for cabinet in CABINETS),
    *(Action("close", cabinet) for cabinet in CABINETS),
)
INDEX = {action: index for index, action in enumerate(ACTIONS)}


def words(action: Action) -> str:
    """Returns an action's text, such as ``pick apple``; all 70 are different."""
    text = f"{action.verb} {PLACES.get(action.target, action.target)}"
    further = FURTHER_WORD.get(action.target) if action.verb == "nav" else None
    return f"{text} {further}" if further else text
