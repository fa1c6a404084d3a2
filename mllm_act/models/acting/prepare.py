"""A trained model as it acts: LoRA merged, projections fused, layers unrolled.

One decision multiplies few rows by every matrix, so it is memory-bandwidth bound. A loop over stacked blocks would
first copy each matrix out of its stack. Matrices that read the same input are fused, wide enough to keep a whole GPU
reading, and take up the factors of the norm before them. They are stored with the contracted axis contiguous, in the
dtype of the computation, or in float8 where the trained model has them so.
"""

import dataclasses

import jax
from flax import nnx

from mllm_act.models.acting.language import ActingLanguageModel, padded_rows
from mllm_act.models.acting.linear import fuse
from mllm_act.models.bridge.bridge import Bridge
from mllm_act.models.layers import unstack
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.models.vision import VisionTransformer


class ActingMLLM(MLLM):
    """An ``MLLM`` that pads one decision to the sizes of the decode kernels."""

    def __init__(
        self,
        config: MLLMConfig,
        vision: VisionTransformer,
        bridge: Bridge,
        language: ActingLanguageModel,
    ) -> None:
        self.config = config
        self.vision, self.bridge, self.language = vision, bridge, language

    def padded_rows(self, rows: int) -> int:
        """See ``MLLM.padded_rows``."""
        return padded_rows(rows)


def for_acting(trained: MLLM) -> MLLM:
    """Returns a model for inference.

    Its hidden states are those of the trained model without dropout, up to rounding: in bfloat16 the sum of a matrix
    and its update is rounded to 8 bits, which is noise of the size of an update of 0.2 %. The trained model is left as
    it was.
    """
    config = trained.config
    in_float8 = config.weight_dtype == "float8"
    language = ActingLanguageModel(trained.language, config.dtype, in_float8)
    config = dataclasses.replace(
        config, language=language.config, weight_dtype="float8" if in_float8 else config.dtype
    )
    vision = _acting_vision(trained.vision, config.dtype, in_float8)
    acting = ActingMLLM(config, vision, trained.bridge, language)

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        is_matrix = str(getattr(path[0], "key", "")) == "bridge" and leaf.ndim > 1
        return leaf.astype(config.dtype) if is_matrix else leaf

    graph, state = nnx.split(acting)
    state = unstack(jax.tree_util.tree_map_with_path(cast, state), backward=False)
    return jax.block_until_ready(nnx.merge(graph, state))


def _acting_vision(trained: VisionTransformer, dtype: str, in_float8: bool) -> VisionTransformer:
    """Returns a vision encoder with acting matrices, which shares the other arrays of the trained one.

    In float8 the bounds on their inputs, which training computes in every step, are computed once.
    """
    vision = nnx.merge(*nnx.split(trained))  # another module of the same arrays
    blocks = vision.blocks
    attended = blocks.v.bound(blocks.norm1.length())
    activated = blocks.up.bound(blocks.norm2.length())
    bounds = {
        **dict.fromkeys(("q", "k", "v"), blocks.norm1.bound()),
        "o": attended,  # attention averages values
        "up": blocks.norm2.bound(),
        "down": activated,  # no activation makes its input larger
    }
    for name, bound in bounds.items():
        linear = fuse(
            [getattr(blocks, name)], dtype, in_float8, input_bound=bound if in_float8 else None
        )
        setattr(blocks, name, linear)
    return vision
