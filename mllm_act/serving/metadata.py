"""What a server tells a client at once: all that is needed to talk to the policy, and to know which one it is."""

from collections.abc import Mapping
from typing import Any

from mllm_act import __version__
from mllm_act.errors import UserError
from mllm_act.policy import Policy

PROTOCOL = "mllm_act/1"
IMAGE, STATE, PROMPT = "observation/{}", "observation/state", "prompt"  # keys of an observation
ENCODINGS = ("raw", "jpeg", "png")


def image_shapes(
    policy: Policy, given: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int, int]]:
    """Returns the (height, width, 3) of each camera's frames: those of the training data, unless given.

    Args:
      policy: to serve.
      given: camera -> (height, width).

    Raises:
      UserError: a camera that the policy does not have, or a checkpoint that does not say the shapes.
    """
    cameras, kept = policy.embodiment.cameras, policy.meta["dataset"][policy.name]
    for camera in given:
        if camera not in cameras:
            raise UserError(
                f"--image: expected one of the cameras {', '.join(cameras)}, found {camera}"
            )
    shapes = {}
    for camera in cameras:
        height, width = given.get(camera) or _trained_on(kept, camera)
        shapes[camera] = (height, width, 3)
    return shapes


def _trained_on(kept: Mapping[str, Any], camera: str) -> tuple[int, int]:
    if camera in kept.get("image_shapes", {}):
        height, width, _ = kept["image_shapes"][camera]
        return height, width
    if "image_size" in kept:  # of an environment, in checkpoints of before image_shapes
        return kept["image_size"], kept["image_size"]
    raise UserError(
        f"--image: expected the size of the frames of {camera}, which this checkpoint does not say, found none; pass "
        f"--image={camera}:HEIGHTxWIDTH as in the training data"
    )


def describe(
    policy: Policy,
    shapes: Mapping[str, tuple[int, int, int]],
    prompt_tokens: int,
    sample: bool,
    ensembling: float | None,
) -> dict[str, Any]:
    """Returns the metadata of a policy, plain msgpack types.

    Args:
      policy: to serve.
      shapes: of each camera's frames.
      prompt_tokens: the longest prompt.
      sample: whether actions are drawn.
      ensembling: see ``Policy.load``.
    """
    meta, name = policy.meta, policy.name
    dataset, statistics = meta["dataset"][name], meta["statistics"][name]
    images = {
        IMAGE.format(camera): {
            "kind": "image", "camera": camera, "shape": list(shape), "dtype": "uint8", "color": "RGB",
            "encodings": list(ENCODINGS),
        }
        for camera, shape in shapes.items()
    }  # fmt: skip
    steps = 1 if ensembling is not None else policy.embodiment.chunk
    return {
        "protocol": PROTOCOL,
        "server": f"mllm_act {__version__}",
        "ready": True,
        "observation": {
            **images,
            STATE: {
                "kind": "state", "shape": [policy.proprios], "dtype": "float32",
                "names": list(dataset.get("proprio_names", ())),
            },
            PROMPT: {"kind": "text", "tokens": prompt_tokens},
        },
        "image_fit": meta["network"]["model"]["fit"],
        "image_size": meta["network"]["model"]["vision"]["image_size"],
        "action": {
            "key": "actions", "shape": [steps, len(statistics["action"]["min"])], "dtype": "float32",
            "names": list(dataset["action_names"]), "units": list(dataset["action_units"]),
            "scale": list(dataset["action_scale"]), "min": list(statistics["action"]["min"]),
            "max": list(statistics["action"]["max"]), "choices": list(dataset.get("choices", ())),
        },
        "control_hz": dataset.get("control_hz"),
        "chunk": policy.embodiment.chunk,
        "context": policy.context,
        "history": meta["network"]["model"]["history"],
        "max_delay": policy.embodiment.max_delay if ensembling is None else 0,
        "sample": sample,
        "ensembling": ensembling,
        "embodiment": name,
        "adapter": policy.embodiment.adapter,
        "normalization": statistics["normalization"],
        "statistics": statistics["fingerprint"],
        "tasks": list(dataset["tasks"]),
        "step": meta["step"],
        "provenance": {key: meta["provenance"].get(key) for key in ("mllm_act", "git_commit")},
    }  # fmt: skip
