"""ALOHA as RLDS, as OpenVLA-OFT writes it (arXiv 2304.13705): two arms at 50 Hz.

The action is the target of 14 joints: six of each arm and its gripper.
"""

from data_pipelines.mapping import DataMapping, Part

NAMES = tuple(
    f"{side}_{joint}"
    for side in ("left", "right")
    for joint in (
        "waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper",
    )
)  # fmt: skip

MAPPING = DataMapping(
    name="aloha",
    cameras={
        "top": "observation/image",
        "wrist_left": "observation/left_wrist_image",
        "wrist_right": "observation/right_wrist_image",
    },
    action=(Part("action", NAMES, "rad"),),
    proprio=(Part("observation/state", NAMES),),
    instruction=("language_instruction",),
    rate=50.0,
)
