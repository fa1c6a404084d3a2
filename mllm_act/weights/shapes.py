"""The shape of every parameter that pretrained weights can fill."""

import dataclasses

from flax import nnx

from mllm_act import parameters
from mllm_act.models.mllm import MLLM, MLLMConfig


def pretrained_shapes(config: MLLMConfig, projector: bool) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of vision encoder and language model, with ``projector`` also of LLaVA's projector.

    Paths are relative to ``MLLM``; matrices of repeated blocks have a leading layer axis. Nothing is computed.
    """
    plain = dataclasses.replace(
        config,
        language=dataclasses.replace(config.language, lora=None),
        bridge=("projector",),
        weight_dtype="float32",
    )
    state = nnx.eval_shape(lambda: nnx.state(MLLM(plain, nnx.Rngs(0)), nnx.Param))
    shapes = {path: tuple(leaf.shape) for path, leaf in parameters.flatten(state).items()}
    parts = ("vision/", "language/", "bridge/") if projector else ("vision/", "language/")
    return {path: shape for path, shape in shapes.items() if path.startswith(parts)}
