"""Exports a policy, or a folder of pretrained weights, to folders that Hugging Face's libraries load.

    python -m mllm_act.export_hf --checkpoint=runs/metaworld/rvq --out=DIR
    python -m mllm_act.export_hf --checkpoint=runs/metaworld/rvq --out=DIR --lora

By default this exports the full model, with LoRA merged, for ``from_pretrained`` of ``transformers``. LLaVA with its
projector is one folder (``LlavaForConditionalGeneration``). For other models ``transformers`` has no class, and there
are two folders: ``DIR/language`` (``LlamaForCausalLM``) and ``DIR/vision`` (``CLIPVisionModel`` or ``Dinov2Model``).
``--lora`` exports LoRA's factors alone, as an adapter that ``peft`` loads onto the pretrained LLaVA or
``LlamaForCausalLM``.

Arrays that those formats lack are written to ``DIR/mllm_act.safetensors`` under our paths: the rest of the bridge, and
the action space adapter with its rows of the vocabulary. The vision encoder has only the blocks that run here, so its
features are ``hidden_states[-1]``.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from mllm_act.errors import UserError, expect_new, run
from mllm_act.files import user_path, whole_folder
from mllm_act.models.mllm import MLLMConfig
from mllm_act.policy.load import load_network
from mllm_act.weights import export, peft
from mllm_act.weights.folder import (
    META,
    WEIGHTS,
    check_shapes,
    pretrained_meta,
    pretrained_tensors,
    pretrained_text_files,
    pretrained_text_tokenizer,
)
from mllm_act.weights.shapes import pretrained_shapes
from mllm_act.weights.tensors import Tensor, parsing
from mllm_act.weights.text_files import NAMES, TOKENIZER

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to export.

    Attributes:
      config: the sizes.
      mllm: arrays by path in ``MLLM``.
      adapter: a policy's other arrays, by path in ``PolicyNetwork``.
      text_files: the language model's ``tokenizer.json``, special tokens, chat template and end token, by file name.
      base: the hub id that the language model's weights were imported from, if they were.
    """

    config: MLLMConfig
    mllm: dict[str, Tensor]
    adapter: dict[str, Tensor]
    text_files: Mapping[str, str]
    base: str | None


def from_folder(path: Path) -> Model:
    """Opens a folder that ``mllm_act.import_hf`` made.

    Raises:
      UserError: if it is incomplete, or its arrays are not those of its sizes.
    """
    arrays = pretrained_tensors(path)
    meta = pretrained_meta(path)
    projector = any(name.startswith("bridge/projector/") for name in arrays)
    config = MLLMConfig.from_dict(meta["config"])
    with parsing(path / META, "the sizes of a model"):
        shapes = pretrained_shapes(config, projector)
    check_shapes(path, arrays, {p: jax.ShapeDtypeStruct(s, "float32") for p, s in shapes.items()})
    config = dataclasses.replace(
        config,
        bridge=("projector",) if projector else ("perceiver",),
        language=dataclasses.replace(config.language, lora=None),
    )
    files = pretrained_text_files(path) | {TOKENIZER: pretrained_text_tokenizer(path)}
    return Model(config, arrays, {}, files, _hub_id(meta["sources"]))


def from_run(path: Path) -> Model:
    """Opens the newest checkpoint of a run's folder, or the step that ``path`` names; its arrays stay on the host.

    Raises:
      UserError: if there is no whole checkpoint of a policy.
    """
    saved = load_network(path, jax.local_devices(backend="cpu")[0])
    mllm = {
        p.removeprefix("mllm/"): tensor(a) for p, a in saved.arrays.items() if p.startswith("mllm/")
    }
    adapter = {p: tensor(a) for p, a in saved.arrays.items() if not p.startswith("mllm/")}
    base = _hub_id(saved.meta.get("pretrained") or [])
    prompt = next(iter(saved.meta["prompt"].values()))  # all share one text tokenizer
    kept = saved.meta.get("text_files") or {}
    files = {name: str(kept[name]) for name in NAMES if name in kept}  # no other paths are written
    return Model(
        saved.config.model, mllm, adapter, {**files, TOKENIZER: prompt["tokenizer_json"]}, base
    )


def tensor(array: jax.Array) -> Tensor:
    """Wraps an array in memory as a ``Tensor``."""
    return Tensor(array.shape, np.dtype(array.dtype), lambda: np.asarray(array))


def _hub_id(sources: Sequence[Mapping[str, str | None]]) -> str | None:
    """The hub id of the weights, if they have a single source and it is on the hub (its revision is a commit)."""
    if len(sources) == 1 and re.fullmatch("[0-9a-f]{40}", sources[0]["revision"] or ""):
        return str(sources[0]["source"]).partition("@")[0]
    return None


def export_model(
    model: Model, out: Path, lora: bool, shard: int = export.SHARD, dtype: str | None = None
) -> None:
    """Writes the folder ``out``, whole or not at all.

    Args:
      model: what to export.
      out: the folder to make; must not exist.
      lora: whether to export LoRA's factors alone.
      shard: the most bytes of tensors in one file.
      dtype: of a full model's tensors; see ``weights.export``.

    Raises:
      UserError: if ``out`` exists, the model has no LoRA to export, or LLaVA's tokenizer has no ``<image>``.
    """
    expect_new(out)
    with whole_folder(out) as partial:
        if lora:
            peft.write(partial, model.config, model.mllm, model.base)
        else:
            token = _image_token(model) if export.is_llava(model.config) else 0
            export.write(partial, model.config, model.mllm, model.text_files, token, shard, dtype)
        rest = export.rest(model.config, model.mllm, projector=not lora)
        export.write_rest(partial, rest | model.adapter)


def _image_token(model: Model) -> int:
    token = Tokenizer.from_str(model.text_files[TOKENIZER]).token_to_id(IMAGE)
    if token is None:
        raise UserError(
            f"tokenizer.json: expected the token {IMAGE}, for LLaVA's prompts, found none; "
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
        type=user_path,
        required=True,
        help="a run's folder, one of its steps, or a folder made by mllm_act.import_hf",
    )
    parser.add_argument("--out", type=user_path, required=True, help="the folder to make")
    parser.add_argument("--lora", action="store_true", help="only LoRA's factors, for peft")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the full model's arrays; by default float32 if LoRA is merged, because bfloat16 rounds away part of "
        "what LoRA learned (twice the size of bfloat16), else as they are stored",
    )
    arguments = parser.parse_args()
    expect_new(arguments.out)
    imported = (arguments.checkpoint / WEIGHTS).exists()
    model = from_folder(arguments.checkpoint) if imported else from_run(arguments.checkpoint)
    export_model(model, arguments.out, arguments.lora, dtype=arguments.dtype)
    for path in sorted(arguments.out.rglob("*")):
        if path.is_file():
            print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
