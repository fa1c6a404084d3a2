"""BridgeData V2 as in Open X-Embodiment (``bridge_dataset``, ``bridge_orig``; arXiv 2308.12952): a WidowX at 5 Hz.

The action is the change of the end effector's pose, and the gripper: 1 open, 0 closed.
"""

from data_pipelines.mapping import DataMapping, Part

MAPPING = DataMapping(
    name="bridge",
    cameras={"base": "observation/image_0"},
    action=(
        Part("action", ("dx", "dy", "dz"), "m"),
        Part("action", ("droll", "dpitch", "dyaw"), "rad", start=3),
        Part("action", ("gripper",), start=6),
    ),
    proprio=(Part("observation/state", ("x", "y", "z", "roll", "pitch", "yaw", "gripper")),),
    instruction=("language_instruction",),
    rate=5.0,
)
