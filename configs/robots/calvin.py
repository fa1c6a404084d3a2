"""CALVIN (arXiv 2112.03227) as ``data_pipelines.import_calvin`` writes it: a simulated Franka arm at 30 Hz.

The action is ``rel_actions``: the change of the end effector's pose, of which 1 is 2 cm or 0.05 rad, and the gripper: 1
open, -1 closed.
"""

from data_pipelines.mapping import DataMapping, Part

STATE = (
    "x", "y", "z", "roll", "pitch", "yaw", "gripper_width", *(f"joint_{i}" for i in range(7)), "gripper",
)  # fmt: skip

MAPPING = DataMapping(
    name="calvin",
    cameras={"static": "observation/rgb_static", "gripper": "observation/rgb_gripper"},
    action=(
        Part("rel_actions", ("dx", "dy", "dz"), "m", scale=0.02),
        Part("rel_actions", ("droll", "dpitch", "dyaw"), "rad", scale=0.05, start=3),
        Part("rel_actions", ("gripper",), start=6),
    ),
    proprio=(Part("observation/robot_obs", STATE),),
    instruction=("language_instruction",),
    task="episode_metadata/task",
    rate=30.0,
)
