"""LIBERO as RLDS, as OpenVLA wrote it (``libero_*_no_noops``; arXiv 2306.03310): a simulated Franka arm at 20 Hz.

The action is the change of the end effector's pose, scaled to [-1, 1] by robosuite's controller, and the gripper.
"""

from data_pipelines.mapping import DataMapping, Part

MAPPING = DataMapping(
    name="libero",
    cameras={"front": "observation/image", "wrist": "observation/wrist_image"},
    action=(Part("action", ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")),),
    proprio=(
        Part("observation/state", ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")),
    ),
    instruction=("language_instruction",),
    rate=20.0,
)
