"""The 20 kinds of objects, their names in instructions, and their bodies in MuJoCo."""

from collections.abc import Sequence

import numpy as np

from mllm_act.envs.language_rearrangement.shapes import SHAPES, meshes
from mllm_act.envs.mujoco_rendering import import_mujoco

# Kind -> what an instruction calls it. Any two differ in shape, most also in colour.
NAMES = {
    "ball": "green ball",
    "block": "wooden block",
    "sponge": "yellow sponge",
    "cleanser": "white bottle",
    "plum": "purple plum",
    "pear": "green pear",
    "apple": "red apple",
    "lemon": "yellow lemon",
    "orange": "orange",
    "banana": "yellow banana",
    "can": "red can",
    "box": "red box",
    "lego": "blue lego brick",
    "cube": "puzzle cube",
    "book": "green book",
    "bowl": "orange bowl",
    "cup": "turquoise cup",
    "mug": "red mug",
    "plate": "white plate",
    "padlock": "brass padlock",
}
KINDS = tuple(NAMES)
MASS = 0.2  # kg
AWAY = 50.0  # metres above the floor, where objects are that an episode does not have, a metre from each other

# Bits of what may touch what: the robot touches furniture and objects, objects touch everything.
ROBOT, FURNITURE, OBJECT, FLOOR = 1, 2, 4, 8


def _bounds(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest corner of a kind's shape, in metres."""
    mujoco = import_mujoco()
    xml = (
        f'<mujoco><compiler angle="degree"/><asset>{meshes()}</asset><worldbody>'
        f"{''.join(SHAPES[kind])}</worldbody></mujoco>"
    )
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    turn = abs(data.geom_xmat.reshape(-1, 3, 3))
    middle = data.geom_xpos + np.einsum(
        "gij,gj->gi", data.geom_xmat.reshape(-1, 3, 3), model.geom_aabb[:, :3]
    )
    half = np.einsum("gij,gj->gi", turn, model.geom_aabb[:, 3:])
    return (middle - half).min(0), (middle + half).max(0)


def _numbers(values: Sequence[float] | np.ndarray) -> str:
    return " ".join(f"{value:.5g}" for value in values)


def body(kind: str) -> str:
    """Returns the body of a kind. It is seen as its shape, and touches as the box around it, so that nothing rolls."""
    low, high = _bounds(kind)
    low[2] = 0.0
    middle, half = (low + high) / 2, (high - low) / 2
    shape = "".join(SHAPES[kind]).replace(
        "<geom ", '<geom contype="0" conaffinity="0" mass="0" group="0" '
    )
    return (
        f'<body name="{kind}" pos="{KINDS.index(kind)} 0 {AWAY}" gravcomp="1"><freejoint name="{kind}"/>'
        f'<geom name="{kind}" type="box" size="{_numbers(half)}" pos="{_numbers(middle)}" mass="{MASS}" group="4" '
        f'contype="{OBJECT}" conaffinity="{ROBOT | FURNITURE | OBJECT | FLOOR}" friction="1 0.02 0.002" '
        f'condim="3"/>{shape}</body>'
    )
