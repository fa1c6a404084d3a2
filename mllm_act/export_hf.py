"""Exports a policy, or a folder of pretrained weights, to folders that Hugging Face's libraries load.

    python -m mllm_act.export_hf --checkpoint=runs/metaworld/rvq --out=DIR
    python -m mllm_act.export_hf --checkpoint=runs/metaworld/rvq --out=DIR --lora

Without ``--lora`` it is the full model, LoRA merged: what ``transformers`` loads with ``from_pretrained``. LLaVA with
its projector is one folder (``LlavaForConditionalGeneration``). For other models there is no class for the whole, and
there are two, ``DIR/language`` (``LlamaForCausalLM``) and ``DIR/vision`` (``CLIPVisionModel`` or ``Dinov2Model``). With
``--lora`` it is LoRA's factors alone, an adapter that ``peft`` loads onto the same class.

What those formats have no place for stands beside them in ``DIR/mllm_act.safetensors`` by our own paths: the Perceiver
and the action space adapter with its rows of the vocabulary. The vision encoder is written with the blocks that run
here, so its features are ``hidden_states[-1]``.
"""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from mllm_act.errors import UserError
from mllm_act.models.mllm import MLLMConfig
from mllm_act.weights import export, folder, peft
from mllm_act.weights.tensors import Tensor

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Model:
    """What there is to export.

    Attributes:
      config: the sizes.
      mllm: arrays by path in ``MLLM``.
      adapter: the other arrays of a policy, by path in ``PolicyNetwork``.
      tokenizer: the text of the ``tokenizer.json``.
      base: the hub id or folder that the weights were imported from, if it is known.
    """

    config: MLLMConfig
    mllm: dict[str, Tensor]
    adapter: dict[str, Tensor]
    tokenizer: str
    base: str | None


def from_folder(path: Path) -> Model:
    """Opens a folder that ``mllm_act.import_hf`` made."""
    arrays = folder.tensors(path)
    meta = folder.meta(path)
    projector = any(name.startswith("bridge/projector/") for name in arrays)
    config = MLLMConfig.from_dict(meta["config"])
    config = dataclasses.replace(
        config,
        bridge=("projector",) if projector else ("perceiver",),
        language=dataclasses.replace(config.language, lora=None),
    )
    return Model(config, arrays, {}, folder.text_tokenizer(path), meta["sources"][0]["source"])


def tensor(array: jax.Array) -> Tensor:
    """An array in memory as one to be read."""
    return Tensor(array.shape, np.dtype(array.dtype), lambda: np.asarray(array))


def export_model(model: Model, out: Path, lora: bool, shard: int = export.SHARD) -> None:
    """Writes the folder ``out``; it appears when it is whole.

    Args:
      model: what to export.
      out: where to; must not exist.
      lora: whether LoRA's factors alone are wanted.
      shard: bytes of tensors in one file at most.

    Raises:
      UserError: if ``out`` exists, or there is no LoRA to export, or LLaVA's tokenizer has no ``<image>``.
    """
    if out.exists():
        raise UserError(
            f"--out={out}: expected a folder that does not exist, found one; remove it or name another"
        )
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        if lora:
            peft.write(partial, model.config, model.mllm, model.base)
        else:
            token = _image_token(model) if export.is_llava(model.config) else 0
            export.write(partial, model.config, model.mllm, model.tokenizer, token, shard)
        rest = export.rest(model.config, model.mllm)
        export.write_rest(partial, rest | model.adapter)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _image_token(model: Model) -> int:
    token = Tokenizer.from_str(model.tokenizer).token_to_id(IMAGE)
    if token is None:
        raise UserError(
            f"the tokenizer: expected the token {IMAGE} in it, for LLaVA's prompts, found none; "
            "import the weights with LLaVA's own tokenizer.json"
        )
    return token
