"""Our arrays as folders that ``transformers`` loads with ``from_pretrained``.

One folder where the bridge begins with LLaVA's projector, a ``LlavaForConditionalGeneration``. Otherwise there is no
class for the whole, and there are two: ``language`` (``LlamaForCausalLM``) and ``vision`` (``CLIPVisionModel`` or
``Dinov2Model``). What Hugging Face's classes have no place for stands beside them in ``mllm_act.safetensors``, by our
paths: the rest of the bridge, and of a policy its adapter with the rows of the action tokens.

LoRA's factors are merged. Matrices held in float8 come out as what they stand for, in bfloat16. Vision encoders have
the blocks that run here, so their features are ``hidden_states[-1]``; the norm that would follow is written as the
identity, and DINOv2's mask token as zeros, for nothing reads them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from mllm_act.models import float8
from mllm_act.models.mllm import MLLMConfig
from mllm_act.models.vision import FAMILIES
from mllm_act.weights import configs, names, safetensors
from mllm_act.weights.huggingface import INDEX
from mllm_act.weights.tensors import Tensor

SHARD = 5_000_000_000  # bytes of tensors in one file at most
REST = "mllm_act.safetensors"
BICUBIC = 3  # PIL's number

Arrays = Mapping[str, Tensor]


def is_llava(config: MLLMConfig) -> bool:
    """Says whether the language model with its vision is a LLaVA to others."""
    return config.vision.family == "clip" and config.bridge[0] == "projector"


def write(
    out: Path,
    config: MLLMConfig,
    arrays: Arrays,
    tokenizer: str,
    image_token: int,
    shard: int = SHARD,
) -> None:
    """Writes the full model into the folder ``out``, which exists.

    Args:
      out: where to.
      config: the sizes of the arrays.
      arrays: by path in ``MLLM``, LoRA's factors among them.
      tokenizer: the text of the ``tokenizer.json``.
      image_token: the id that stands for an image in LLaVA's prompts.
      shard: bytes of tensors in one file at most.
    """
    if is_llava(config):
        # The spelling of the released LLaVA-1.5, which every version of transformers reads.
        tensors = {
            **_renamed(config, arrays, "language/", "language_model.model."),
            **_renamed(config, arrays, "vision/", "vision_tower.vision_model."),
            **_renamed(config, arrays, "bridge/", "multi_modal_projector."),
        }
        described = configs.llava(config, image_token)
        _model(out, described, tensors, shard)
        _tokenizer(out, tokenizer)
        _preprocessor(out, config)
        return
    for part, described, around in (
        ("language", configs.language(config), "model."),
        ("vision", configs.vision(config), ""),
    ):
        (out / part).mkdir()
        _model(out / part, described, _renamed(config, arrays, f"{part}/", around), shard)
    _tokenizer(out / "language", tokenizer)
    _preprocessor(out / "vision", config)


def rest(config: MLLMConfig, arrays: Arrays, *, projector: bool) -> dict[str, Tensor]:
    """Returns the arrays that have no place in Hugging Face's formats: all but vision encoder and language model.

    ``projector`` says whether LLaVA's projector was written there.
    """
    inside = ("vision/", "language/") + (
        ("bridge/projector/",) if projector and is_llava(config) else ()
    )
    return {path: tensor for path, tensor in arrays.items() if not path.startswith(inside)}


def write_rest(out: Path, tensors: Arrays) -> None:
    """Writes ``mllm_act.safetensors`` into a folder, if there is anything to write."""
    if tensors:
        parts = ((name, tensor.read()) for name, tensor in tensors.items())
        safetensors.write(out / REST, tensors, parts)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file as Hugging Face's libraries do."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _renamed(config: MLLMConfig, arrays: Arrays, part: str, around: str) -> dict[str, Tensor]:
    """The tensors of one part by Hugging Face's names, in their layout, one a layer."""
    found: dict[str, Tensor] = {}
    for path, name in names.table(config, projector=is_llava(config)).items():
        if not path.startswith(part):
            continue
        # The head stands beside the body, not in it.
        prefix = around.removesuffix("model.") if path == "language/head" else around
        if "{}" in name:
            layers = range(arrays[path].shape[0])
            found |= {prefix + name.format(i): _one(config, arrays, path, i) for i in layers}
        else:
            found[prefix + name] = _one(config, arrays, path, None)
    if part == "vision/":
        found |= {around + name: tensor for name, tensor in _unread(config, arrays).items()}
    return found


def _one(config: MLLMConfig, arrays: Arrays, path: str, layer: int | None) -> Tensor:
    """One layer of an array in Hugging Face's layout, computed when it is read."""
    stored = arrays[path]
    ours = stored.shape if layer is None else stored.shape[1:]
    theirs = names.their_shape(path, ours, config.vision.family)
    dtype = np.dtype(ml_dtypes.bfloat16) if stored.dtype == float8.DTYPE else stored.dtype
    scale = arrays.get(f"{path}_scale")
    a, b = (arrays.get(path.removesuffix("kernel") + f"lora_{factor}") for factor in "ab")

    def read() -> np.ndarray:
        values = np.asarray(stored.read() if layer is None else stored.read()[layer])
        if scale is not None:
            values = values.astype(np.float32) * scale.read()[layer]
        if a is not None and b is not None:
            lora = config.language.lora
            assert lora is not None
            update = (a.read()[layer] @ b.read()[layer]) * (lora.alpha / lora.rank)
            values = values.astype(np.float32) + update
        return names.to_theirs(path, values.astype(dtype, copy=False), theirs)

    return Tensor(theirs, dtype, read)


def _unread(config: MLLMConfig, arrays: Arrays) -> dict[str, Tensor]:
    """What their classes have and nothing reads; see the top of this file."""
    width, dtype = config.vision.width, arrays["vision/position"].dtype
    ones = Tensor((width,), dtype, lambda: np.ones(width, dtype))
    zeros = Tensor((width,), dtype, lambda: np.zeros(width, dtype))
    if config.vision.family == "clip":
        return {"post_layernorm.weight": ones, "post_layernorm.bias": zeros}
    mask = Tensor((1, width), dtype, lambda: np.zeros((1, width), dtype))
    return {"layernorm.weight": ones, "layernorm.bias": zeros, "embeddings.mask_token": mask}


def _model(out: Path, described: dict[str, Any], tensors: Arrays, limit: int) -> None:
    """Writes config.json, the shards, and the index where there are several."""
    largest = max(tensors.values(), key=lambda tensor: tensor.bytes)
    name = largest.dtype.name
    write_json(out / "config.json", described | {"dtype": name, "torch_dtype": name})
    shards: list[dict[str, Tensor]] = [{}]
    for key, tensor in tensors.items():
        size = sum(t.bytes for t in shards[-1].values())
        if shards[-1] and size + tensor.bytes > limit:
            shards.append({})
        shards[-1][key] = tensor
    total = sum(tensor.bytes for tensor in tensors.values())
    files: dict[str, str] = {}
    with tqdm(total=total, desc=f"export {out.name}", unit="B", unit_scale=True) as progress:
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"

            def parts(shard: dict[str, Tensor] = shard) -> Any:
                for key, tensor in shard.items():
                    yield key, tensor.read()
                    progress.update(tensor.bytes)

            safetensors.write(out / file, shard, parts())
            files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def _tokenizer(out: Path, text: str) -> None:
    (out / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _preprocessor(out: Path, config: MLLMConfig) -> None:
    """Says what ``models.vision.preprocess`` does, in the words of Hugging Face's image processors."""
    family, size = FAMILIES[config.vision.family], config.vision.image_size
    clip = config.vision.family == "clip"
    write_json(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor" if clip else "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": size, "width": size},
            "resample": BICUBIC,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(family.mean),
            "image_std": list(family.std),
        },
    )
