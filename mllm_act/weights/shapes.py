"""What the model wants of a source: the shape of every parameter that pretrained weights can fill."""

import dataclasses

from flax import nnx

from mllm_act import parameters
from mllm_act.models.mllm import MLLM, MLLMConfig


def imported(config: MLLMConfig, projector: bool) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of vision encoder and language model, and of LLaVA's projector if asked for.

    Paths are relative to ``MLLM``; matrices that repeat have a leading layer axis. Nothing is computed.
    """
    plain = dataclasses.replace(
        config,
        language=dataclasses.replace(config.language, lora=None),
        bridge=("projector",),
        weight_dtype="float32",
    )
    state = nnx.eval_shape(lambda: nnx.state(MLLM(plain, nnx.Rngs(0)), nnx.Param))
    found = {path: tuple(leaf.shape) for path, leaf in parameters.flatten(state).items()}
    parts = ("vision/", "language/", "bridge/") if projector else ("vision/", "language/")
    return {path: shape for path, shape in found.items() if path.startswith(parts)}
