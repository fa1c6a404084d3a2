"""The format of what a model sees and what it is trained on, defined here and nowhere else.

Axes: B batch, T timesteps of context, H W image, P proprioception, A action dimensions, N prompt tokens.

* A step is one camera frame per camera, one proprioception vector and one action.
* ``mask[b, t]`` says that step t of window b exists. Steps that exist come first; the padding is at the end.
* Images are the simulator's or the dataset's own pixels, uint8 in [0, 255], RGB, upright. The model resizes and
  normalises them on the device, with the same code in training and acting. On the host, images of mostly padded windows
  may be packed: uint8[N, H, W, 3], the N that ``mask`` says exist, row by row; the devices unpack them.
* ``proprio`` and ``action`` are in the environment's own numbers; normalisation is the policy's business.
* Where a decision holds H > 1 actions, ``action`` holds those of the step and of the H - 1 after it, one after another.
* ``prompt`` is padded at its end; ``prompt_mask`` says which of its tokens exist.
"""

from collections.abc import Mapping
from typing import no_type_check

import chex
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

Images = Mapping[str, UInt8[Array, "B T H W 3"]]


@no_type_check  # JAX rebuilds it with shapes in place of arrays
@struct.dataclass
class Observation:
    """What the policy knows at each of T steps."""

    images: Images
    proprio: Float[Array, "B T P"]
    mask: Bool[Array, "B T"]
    prompt: Int[Array, "B N"]
    prompt_mask: Bool[Array, "B N"]


@no_type_check  # JAX rebuilds it with shapes in place of arrays
@struct.dataclass
class Batch:
    """Windows of demonstrations: what was seen, and what the expert did at each step."""

    observation: Observation
    action: Float[Array, "B T HA"]


def check_batch(batch: Batch) -> None:
    """Raises AssertionError where a shape or dtype breaks the contract above."""
    observation = batch.observation
    b, t = observation.mask.shape
    chex.assert_type([observation.mask, observation.prompt_mask], bool)
    for image in observation.images.values():
        packed = image.ndim == 4  # on the host
        chex.assert_shape(
            image,
            (
                int(observation.mask.sum()) if packed else b,
                *(() if packed else (t,)),
                None,
                None,
                3,
            ),
        )
        chex.assert_type(image, "uint8")
    chex.assert_shape(observation.proprio, (b, t, None))
    chex.assert_shape(batch.action, (b, t, None))
    chex.assert_equal_shape([observation.prompt, observation.prompt_mask])
    chex.assert_axis_dimension(observation.prompt, 0, b)
