"""Writes small folders of pretrained weights with random numbers in them."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_act import parameters
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.policy.prompt import train_text_tokenizer
from mllm_act.weights import folder, safetensors
from mllm_act.weights.tensors import Tensor


def write(
    out: Path, config: MLLMConfig, texts: list[str], largest_id: int
) -> dict[str, np.ndarray]:
    """Writes a folder as ``mllm_act.import_hf`` does, with a vision encoder and a language model.

    Args:
      out: the folder to make.
      config: the sizes.
      texts: the text tokenizer is trained on them.
      largest_id: its ids stay below this.

    Returns:
      The arrays by path in ``MLLM``, in bfloat16 except norms and biases.
    """
    plain = dataclasses.replace(
        config, language=dataclasses.replace(config.language, lora=None), weight_dtype="bfloat16"
    )
    shapes = parameters.flatten(nnx.state(nnx.eval_shape(lambda: MLLM(plain, nnx.Rngs(0)))))
    draw = np.random.default_rng(0)
    arrays = {
        path: np.asarray(0.2 * draw.normal(size=leaf.shape), jnp.dtype(leaf.dtype))
        for path, leaf in shapes.items()
        if path.startswith(("vision/", "language/"))
    }
    tensors = {
        path: Tensor(array.shape, array.dtype, lambda array=array: array)
        for path, array in arrays.items()
    }
    out.mkdir()
    safetensors.write(out / folder.WEIGHTS, tensors, arrays.items())
    sources = [{"source": "random", "revision": "0"}]
    meta = {"config": dataclasses.asdict(config), "sources": sources}
    (out / folder.META).write_text(json.dumps(meta))
    (out / folder.TOKENIZER).write_text(train_text_tokenizer(texts, largest_id))
    return arrays
