"""The Fetch robot of the package gymnasium-robotics (1.4.2), changed into a mobile one with a suction gripper.

The package's robot stands still and is moved by its hand. Here its base drives on the floor (two directions and a
turn), position controllers hold the seven joints of its arm, torso and head are fixed, and a suction cup takes the
place of the fingers. Meshes, links and joint limits are the package's, read from where it is installed.
"""

import functools
import importlib.util
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from mllm_act.envs.fetch_pick.objects import FURNITURE, ROBOT
from mllm_act.errors import UserError

JOINTS = (
    "shoulder_pan", "shoulder_lift", "upperarm_roll", "elbow_flex", "forearm_roll", "wrist_flex", "wrist_roll",
)  # fmt: skip
# Where the arm rests: before the body at its right, above all furniture, the cup pointing down.
REST = (-1.25, -0.39, 1.89, 1.83, -1.33, 1.46, 0.1)
TORSO = 0.35  # metres that the torso is lifted
TILT = 32  # degrees, of the head downwards
FIELD = 80  # degrees, of the head camera
CUP = 0.07  # metres from the gripper's origin to the end of the suction cup
BASE_FORCE = 1000.0  # newtons
BASE_TORQUE = 400.0  # newton metres

_DROPPED = ("estop_link", "laser_link", "external_camera", "gripper_camera", "finger_link", "depth_frame")  # fmt: skip


@functools.cache
def assets() -> Path:
    """Returns the folder of the package's models and meshes. The package is found, not imported.

    Raises:
      UserError: it is not installed.
    """
    found = importlib.util.find_spec("gymnasium_robotics")
    if found is None or found.origin is None:
        raise UserError(
            "fetch_pick: expected the package gymnasium-robotics with the Fetch model, found none; "
            "run `make setup`, or `pip install 'mllm-act[fetch]'`"
        )
    return Path(found.origin).parent / "envs" / "assets"


def _tree() -> ElementTree.Element:
    """Returns the package's robot, its names without the prefix ``robot0:``."""
    path = assets() / "fetch" / "robot.xml"
    if not path.is_file():
        raise UserError(
            f"{path}: expected the Fetch model of gymnasium-robotics 1.4, found none; run `make setup`"
        )
    root = ElementTree.fromstring(path.read_text().replace("robot0:", ""))
    return next(body for body in root.iter("body") if body.get("name") == "base_link")


def _change(body: ElementTree.Element) -> None:
    """Changes a link and all that hang on it."""
    for child in list(body):
        name = child.get("name", "")
        if child.tag == "body" and any(word in name for word in _DROPPED):
            body.remove(child)
        elif child.tag in ("camera", "site"):
            body.remove(child)
        elif child.tag == "joint" and name.removesuffix("_joint") not in JOINTS:
            body.remove(child)
        elif child.tag == "joint":
            _joint(child, name.removesuffix("_joint"))
        elif child.tag == "geom":
            _geom(child)
        elif child.tag == "body":
            _change(child)
    body.attrib.pop("childclass", None)
    body.set("gravcomp", "1")


def _joint(joint: ElementTree.Element, name: str) -> None:
    kept: dict[str, str] = {
        key: joint.attrib[key] for key in ("axis", "range") if key in joint.attrib
    }
    joint.attrib.clear()
    limited = "true" if "range" in kept else "false"
    if "range" in kept:  # the package's angles are in radians, those of objects in degrees
        kept["range"] = " ".join(f"{math.degrees(float(v)):.4f}" for v in kept["range"].split())
    joint.attrib |= {"name": name, "type": "hinge", "armature": "1", "limited": limited}
    joint.attrib |= kept


def _geom(geom: ElementTree.Element) -> None:
    color = {"grey": "0.36 0.36 0.38 1", "blue": "0.09 0.5 0.77 1"}.get(geom.get("class", ""))
    mesh = geom.attrib["mesh"]
    geom.attrib.clear()
    geom.attrib.update({
        "type": "mesh", "mesh": mesh, "rgba": color or "0.85 0.85 0.87 1",
        "contype": str(ROBOT), "conaffinity": str(FURNITURE),
    })  # fmt: skip


def _link(root: ElementTree.Element, name: str) -> ElementTree.Element:
    return next(body for body in root.iter("body") if body.get("name") == name)


def body() -> str:
    """Returns the robot's body as XML: joints ``base_x``, ``base_y``, ``base_turn`` and `JOINTS`, camera ``head``."""
    root = _tree()
    _change(root)
    root.set("pos", "0 0 0")
    for name, kind, axis in (
        ("base_x", "slide", "1 0 0"), ("base_y", "slide", "0 1 0"), ("base_turn", "hinge", "0 0 1"),
    ):  # fmt: skip
        root.insert(0, ElementTree.Element("joint", {"name": name, "type": kind, "axis": axis}))
    root[:3] = root[2::-1]  # x, y, turn: the turn is last, so that x and y are the room's
    torso = _link(root, "torso_lift_link")
    torso.set("pos", f"-0.0869 0 {0.3774 + TORSO}")
    _link(root, "head_tilt_link").set("euler", f"0 {TILT} 0")
    eye = _link(root, "head_camera_rgb_frame")
    camera = {"name": "head", "xyaxes": "0 -1 0 0 0 1", "fovy": str(FIELD)}
    ElementTree.SubElement(eye, "camera", camera)
    gripper = _link(root, "gripper_link")
    cup = {"type": "cylinder", "contype": str(ROBOT), "conaffinity": str(FURNITURE)}
    for color, size, ends in (
        ("0.55 0.57 0.6 1", 0.012, f"0 0 0 {CUP - 0.02} 0 0"),
        ("0.1 0.1 0.1 1", 0.025, f"{CUP - 0.02} 0 0 {CUP} 0 0"),
    ):
        shape = {"rgba": color, "size": str(size), "fromto": ends}
        ElementTree.SubElement(gripper, "geom", {**cup, **shape, "mass": "0.01"})
    ElementTree.SubElement(gripper, "site", {"name": "cup", "pos": f"{CUP} 0 0", "rgba": "0 0 0 0"})
    return ElementTree.tostring(root, encoding="unicode")


def meshes() -> str:
    """Returns the meshes that `body` uses."""
    shared = ElementTree.fromstring(
        (assets() / "fetch" / "shared.xml").read_text().replace("robot0:", "")
    )
    folder = assets() / "stls" / "fetch"
    used = {geom.get("mesh") for geom in ElementTree.fromstring(body()).iter("geom")}
    return "".join(
        f'<mesh name="{mesh.get("name")}" file="{folder / mesh.attrib["file"]}"/>'
        for mesh in shared.iter("mesh")
        if mesh.get("name") in used
    )


def actuators() -> str:
    """Returns the controllers: velocities of the base, in the room's axes, then the positions of the arm."""
    base = "".join(
        f'<velocity name="{name}" joint="{name}" kv="{gain}" forcerange="-{force} {force}"/>'
        for name, gain, force in (
            ("base_x", 5000, BASE_FORCE), ("base_y", 5000, BASE_FORCE), ("base_turn", 2000, BASE_TORQUE),
        )
    )  # fmt: skip
    return base + "".join(
        f'<position name="{name}" joint="{name}" kp="1500" kv="120" forcerange="-200 200"/>'
        for name in JOINTS
    )
