"""Writes LoRA's factors as an adapter that ``peft`` loads onto the pretrained base model.

The base model is LLaVA if the vision encoder is a CLIP, whatever the bridge; otherwise it is the language model alone.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mllm_act.errors import UserError
from mllm_act.files import write_json
from mllm_act.models.language import PROJECTIONS
from mllm_act.models.mllm import MLLMConfig
from mllm_act.weights import names, safetensors
from mllm_act.weights.tensors import Tensor


def write(out: Path, config: MLLMConfig, arrays: Mapping[str, Tensor], base: str | None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into the folder ``out``, which exists.

    Args:
      out: the folder.
      config: the sizes of the arrays.
      arrays: by path in ``MLLM``.
      base: the hub id of the base model, if known.

    Raises:
      UserError: if the model has no LoRA.
    """
    lora = config.language.lora
    if lora is None:
        raise UserError(
            "--lora: expected a checkpoint trained with LoRA, found one without; leave --lora out"
        )
    prefix = "model.language_model." if config.vision.family == "clip" else "model."
    modules, tensors = [], {}
    for projection in PROJECTIONS:
        if not lora.aims_at(projection):
            continue
        path = f"language/blocks/{projection}/kernel"
        module = names.LANGUAGE[path].removesuffix(".weight")
        modules.append(module.rpartition(".")[2])
        for factor in "ab":
            stacked = arrays[path.replace("/kernel", f"/lora_{factor}")]
            for i in range(config.language.layers):
                name = f"base_model.model.{prefix}{module.format(i)}.lora_{factor.upper()}.weight"
                tensors[name] = _transposed(stacked, i)
    safetensors.write(
        out / "adapter_model.safetensors",
        tensors,
        ((name, tensor.read()) for name, tensor in tensors.items()),
    )
    write_json(
        out / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "bias": "none",
            "inference_mode": True,
            # A pattern that matches full names: the vision encoder has modules with the same last part.
            "target_modules": rf"{prefix.replace('.', chr(92) + '.')}layers\.\d+\.\w+\.({'|'.join(modules)})",
        },
    )


def _transposed(stacked: Tensor, layer: int) -> Tensor:
    """One layer's factor, transposed: PEFT's are [outputs, inputs]."""

    def read() -> np.ndarray:
        return np.asarray(stacked.read()[layer]).T

    return Tensor(stacked.shape[:0:-1], stacked.dtype, read)
