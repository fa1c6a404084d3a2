"""RT-1's demonstrations as in Open X-Embodiment (``fractal20220817_data``; arXiv 2212.06817): Google's robot at 3 Hz.

The action is the change of the end effector's pose, and of the gripper: 1 closes, -1 opens, 0 keeps. The base does not
move in these episodes; its action, and that which ends an episode, are left out.
"""

from data_pipelines.mapping import DataMapping, Part

MAPPING = DataMapping(
    name="rt1",
    cameras={"head": "observation/image"},
    action=(
        Part("action/world_vector", ("dx", "dy", "dz"), "m"),
        Part("action/rotation_delta", ("droll", "dpitch", "dyaw"), "rad"),
        Part("action/gripper_closedness_action", ("gripper",)),
    ),
    proprio=(
        Part("observation/base_pose_tool_reached", ("x", "y", "z", "qx", "qy", "qz", "qw")),
        Part("observation/gripper_closed", ("gripper",)),
    ),
    instruction=("observation/natural_language_instruction",),
    rate=3.0,
)
