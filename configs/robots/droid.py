"""DROID (arXiv 2403.12945): a Franka arm at 15 Hz, in many rooms.

The action is joint velocities and the gripper's position (1 closed), as openpi trains on it. Each episode has up to
three instructions, of which one is drawn in each epoch.
"""

from data_pipelines.mapping import DataMapping, Part

MAPPING = DataMapping(
    name="droid",
    cameras={
        "exterior_1": "observation/exterior_image_1_left",
        "exterior_2": "observation/exterior_image_2_left",
        "wrist": "observation/wrist_image_left",
    },
    action=(
        Part("action_dict/joint_velocity", tuple(f"joint_{i}" for i in range(7)), "rad/s"),
        Part("action_dict/gripper_position", ("gripper",)),
    ),
    proprio=(
        Part("observation/joint_position", tuple(f"joint_{i}" for i in range(7))),
        Part("observation/gripper_position", ("gripper",)),
    ),
    instruction=("language_instruction", "language_instruction_2", "language_instruction_3"),
    rate=15.0,
)
