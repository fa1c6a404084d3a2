"""Exports a policy, or a folder of pretrained weights, to folders that Hugging Face's libraries load.

    python -m mllm_act.export_hf --checkpoint=runs/metaworld/rvq --out=DIR
    python -m mllm_act.export_hf --checkpoint=runs/metaworld/rvq --out=DIR --lora

Without ``--lora`` it is the full model, LoRA merged: what ``transformers`` loads with ``from_pretrained``. LLaVA with
its projector is one folder (``LlavaForConditionalGeneration``). For other models there is no class for the whole, and
there are two, ``DIR/language`` (``LlamaForCausalLM``) and ``DIR/vision`` (``CLIPVisionModel`` or ``Dinov2Model``). With
``--lora`` it is LoRA's factors alone, an adapter that ``peft`` loads onto the pretrained LLaVA or ``LlamaForCausalLM``.

What those formats have no place for stands beside them in ``DIR/mllm_act.safetensors`` by our own paths: the Perceiver
and the action space adapter with its rows of the vocabulary. The vision encoder is written with the blocks that run
here, so its features are ``hidden_states[-1]``.
"""

import argparse
import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from mllm_act import parameters
from mllm_act.checkpoints import checkpoint, frozen
from mllm_act.checkpoints.checkpoint import Checkpointer
from mllm_act.errors import UserError, expect_new, run
from mllm_act.models.mllm import MLLMConfig
from mllm_act.normalization import Statistics
from mllm_act.policy import network as networks
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
      base: the hub id that the language model's weights were imported from, if they were.
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
    return Model(config, arrays, {}, folder.text_tokenizer(path), _hub_id(meta["sources"]))


def from_run(path: Path) -> Model:
    """Opens the newest checkpoint of a run's folder, or the step that ``path`` names; its arrays stay on the host.

    Raises:
      UserError: if there is no whole checkpoint of a policy.
    """
    workdir, step = checkpoint.find(path)
    with Checkpointer(workdir) as checkpoints:
        meta = checkpoints.meta(step)
        absent = [key for key in ("network", "statistics", "prompt", "frozen") if key not in meta]
        if absent:
            raise UserError(
                f"{workdir}/checkpoints/{step}: expected a policy's checkpoint, found none of {', '.join(absent)} in "
                "it; pass the workdir of mllm_act.train"
            )
        description = networks.Description.from_dict(meta["network"])
        statistics = {name: Statistics.from_dict(one) for name, one in meta["statistics"].items()}
        network = nnx.eval_shape(lambda: networks.build(description, statistics, nnx.Rngs(0)))
        _, *parts = parameters.split(network, description.trained)
        trained, still = (_on_host(parameters.flatten(part)) for part in parts)
        arrays = checkpoints.restore(step, {"trained": trained})["trained"]
        arrays = {**arrays, **frozen.load(workdir, still, meta["frozen"])}
    inside = {
        p.removeprefix("mllm/"): tensor(a) for p, a in arrays.items() if p.startswith("mllm/")
    }
    beside = {p: tensor(a) for p, a in arrays.items() if not p.startswith("mllm/")}
    base = _hub_id(meta.get("pretrained") or [])
    prompt = next(iter(meta["prompt"].values()))  # they share their tokenizer
    return Model(description.model, inside, beside, prompt["tokenizer_json"], base)


def tensor(array: jax.Array) -> Tensor:
    """An array in memory as one to be read."""
    return Tensor(array.shape, np.dtype(array.dtype), lambda: np.asarray(array))


def _on_host(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for path, leaf in arrays.items()
    }


def _hub_id(sources: Sequence[Mapping[str, str | None]]) -> str | None:
    """The source, where it is one alone, of the hub: its revision is a commit."""
    if len(sources) == 1 and re.fullmatch("[0-9a-f]{40}", sources[0]["revision"] or ""):
        return str(sources[0]["source"]).partition("@")[0]
    return None


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
    expect_new(out)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        if lora:
            peft.write(partial, model.config, model.mllm, model.base)
        else:
            token = _image_token(model) if export.is_llava(model.config) else 0
            export.write(partial, model.config, model.mllm, model.tokenizer, token, shard)
        rest = export.rest(model.config, model.mllm, projector=not lora)
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


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a run's folder, one step of it, or a folder of mllm_act.import_hf",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--lora", action="store_true", help="LoRA's factors alone, for peft")
    arguments = parser.parse_args()
    expect_new(arguments.out)
    imported = (arguments.checkpoint / folder.WEIGHTS).exists()
    model = from_folder(arguments.checkpoint) if imported else from_run(arguments.checkpoint)
    export_model(model, arguments.out, arguments.lora)
    for path in sorted(arguments.out.rglob("*")):
        if path.is_file():
            print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
