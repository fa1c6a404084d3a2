"""Writes our arrays as folders that ``transformers`` loads with ``from_pretrained``.

A model whose bridge begins with LLaVA's projector is one folder, a ``LlavaForConditionalGeneration``. For other models
``transformers`` has no class, and there are two folders: ``language`` (``LlamaForCausalLM``) and ``vision``
(``CLIPVisionModel`` or ``Dinov2Model``). Arrays that these classes lack go to ``mllm_act.safetensors`` beside them,
under our paths: the rest of the bridge and, for a policy, its adapters with the rows of the action tokens.

LoRA's factors are merged, in float32: rounded to bfloat16, the sum would lose part of what LoRA has learned. float8
matrices are dequantized to bfloat16. ``dtype`` overrides both. Vision encoders have only the blocks that run here, so
their features are ``hidden_states[-1]``; the unused norm after them is written as the identity and DINOv2's unused mask
token as zeros.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from mllm_act.files import write_json
from mllm_act.models import float8
from mllm_act.models.mllm import MLLMConfig
from mllm_act.models.vision import FAMILIES
from mllm_act.weights import configs, names, safetensors
from mllm_act.weights.huggingface import INDEX
from mllm_act.weights.tensors import Tensor
from mllm_act.weights.text_files import ENDS, GENERATION, generation_config

SHARD = 5_000_000_000  # the most bytes of tensors in one file
REST = "mllm_act.safetensors"
BICUBIC = 3  # PIL's constant

Arrays = Mapping[str, Tensor]


def is_llava(config: MLLMConfig) -> bool:
    """Returns whether the model is exported as a LLaVA."""
    return config.vision.family == "clip" and config.bridge[0] == "projector"


def write(
    out: Path,
    config: MLLMConfig,
    arrays: Arrays,
    text_files: Mapping[str, str],
    image_token: int,
    shard: int = SHARD,
    dtype: str | None = None,
) -> None:
    """Writes the full model into the folder ``out``, which exists.

    Args:
      out: the folder.
      config: the sizes of the arrays.
      arrays: by path in ``MLLM``, LoRA's factors included.
      text_files: the language model's text files by name: ``tokenizer.json``, and what else came with it.
      image_token: the id of the image placeholder in LLaVA's prompts.
      shard: the most bytes of tensors in one file.
      dtype: of the tensors written; by default float32 if LoRA is merged, else each array's own.
    """
    if dtype is None and any("/lora_" in path for path in arrays):
        dtype = "float32"
    generation = generation_config(text_files, {})
    ends = {key: generation.get(key) for key in ENDS}
    if is_llava(config):
        # The names of the released LLaVA-1.5, which every version of transformers reads.
        tensors = {
            **_renamed(config, arrays, "language/", "language_model.model."),
            **_renamed(config, arrays, "vision/", "vision_tower.vision_model."),
            **_renamed(config, arrays, "bridge/", "multi_modal_projector."),
        }
        values = configs.llava(config, image_token)
        values["text_config"] |= ends
        _write_model(out, values, _cast(tensors, dtype), shard)
        _write_text_files(out, text_files, generation)
        _write_preprocessor(out, config)
        return
    for part, values, prefix in (
        ("language", configs.language(config) | ends, "model."),
        ("vision", configs.vision(config), ""),
    ):
        (out / part).mkdir()
        tensors = _cast(_renamed(config, arrays, f"{part}/", prefix), dtype)
        _write_model(out / part, values, tensors, shard)
    _write_text_files(out / "language", text_files, generation)
    _write_preprocessor(out / "vision", config)


def rest(config: MLLMConfig, arrays: Arrays, *, projector: bool) -> dict[str, Tensor]:
    """Returns the arrays that Hugging Face's formats lack: all but vision encoder and language model.

    ``projector``: whether the format can hold LLaVA's projector.
    """
    covered = ("vision/", "language/") + (
        ("bridge/projector/",) if projector and is_llava(config) else ()
    )
    return {path: tensor for path, tensor in arrays.items() if not path.startswith(covered)}


def write_rest(out: Path, tensors: Arrays) -> None:
    """Writes ``mllm_act.safetensors`` into a folder, if there is anything to write."""
    if tensors:
        parts = ((name, tensor.read()) for name, tensor in tensors.items())
        safetensors.write(out / REST, tensors, parts)


def _renamed(config: MLLMConfig, arrays: Arrays, part: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of one part by Hugging Face's names and in their layout, one for each layer."""
    tensors: dict[str, Tensor] = {}
    for path, name in names.table(config, projector=is_llava(config)).items():
        if not path.startswith(part):
            continue
        # The head is outside the module "model".
        outer = prefix.removesuffix("model.") if path == "language/head" else prefix
        if "{}" in name:
            layers = range(arrays[path].shape[0])
            tensors |= {outer + name.format(i): _layer(config, arrays, path, i) for i in layers}
        else:
            tensors[outer + name] = _layer(config, arrays, path, None)
    if part == "vision/":
        tensors |= {prefix + name: tensor for name, tensor in _unused(config, arrays).items()}
    return tensors


def _layer(config: MLLMConfig, arrays: Arrays, path: str, layer: int | None) -> Tensor:
    """One layer of an array (all of it for None) in Hugging Face's layout, computed when it is read."""
    stored = arrays[path]
    ours = stored.shape if layer is None else stored.shape[1:]
    theirs = names.their_shape(path, ours, config.vision.family)
    scale = arrays.get(f"{path}_scale")
    a, b = (arrays.get(path.removesuffix("kernel") + f"lora_{factor}") for factor in "ab")
    dtype = np.dtype(ml_dtypes.bfloat16) if stored.dtype == float8.DTYPE else stored.dtype
    dtype = dtype if a is None else np.dtype(np.float32)

    def read() -> np.ndarray:
        values = np.asarray(stored.read() if layer is None else stored.read()[layer])
        if scale is not None and layer is not None:
            values = values.astype(np.float32) * scale.read()[layer]
        if a is not None and b is not None and layer is not None:
            lora = config.language.lora
            assert lora is not None
            update = (a.read()[layer] @ b.read()[layer]) * (lora.alpha / lora.rank)
            values = values.astype(np.float32) + update
        return names.to_theirs(path, values.astype(dtype, copy=False), theirs)

    return Tensor(theirs, dtype, read)


def _cast(tensors: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """The same tensors in another dtype, cast when they are read."""
    if dtype is None:
        return tensors

    def read(tensor: Tensor) -> np.ndarray:
        return tensor.read().astype(dtype, copy=False)

    return {
        name: Tensor(tensor.shape, np.dtype(dtype), functools.partial(read, tensor))
        for name, tensor in tensors.items()
    }


def _unused(config: MLLMConfig, arrays: Arrays) -> dict[str, Tensor]:
    """Tensors that Hugging Face's classes have and do not use here; see the top of this file."""
    width, dtype = config.vision.width, arrays["vision/position"].dtype
    ones = Tensor((width,), dtype, lambda: np.ones(width, dtype))
    zeros = Tensor((width,), dtype, lambda: np.zeros(width, dtype))
    if config.vision.family == "clip":
        return {"post_layernorm.weight": ones, "post_layernorm.bias": zeros}
    mask = Tensor((1, width), dtype, lambda: np.zeros((1, width), dtype))
    return {"layernorm.weight": ones, "layernorm.bias": zeros, "embeddings.mask_token": mask}


def _write_model(out: Path, config: dict[str, Any], tensors: Arrays, limit: int) -> None:
    """Writes config.json, shards of at most ``limit`` bytes, and the index if there are several."""
    largest = max(tensors.values(), key=lambda tensor: tensor.bytes)
    dtype = largest.dtype.name
    write_json(out / "config.json", config | {"dtype": dtype, "torch_dtype": dtype})
    shards: list[dict[str, Tensor]] = [{}]
    for key, tensor in tensors.items():
        size = sum(t.bytes for t in shards[-1].values())
        if shards[-1] and size + tensor.bytes > limit:
            shards.append({})
        shards[-1][key] = tensor
    total = sum(tensor.bytes for tensor in tensors.values())
    files: dict[str, str] = {}
    with tqdm(total=total, desc=f"export {out.name}", unit="B", unit_scale=True) as progress:
        for index, shard in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{index:05}-of-{len(shards):05}.safetensors"

            def parts(shard: dict[str, Tensor] = shard) -> Any:
                for key, tensor in shard.items():
                    yield key, tensor.read()
                    progress.update(tensor.bytes)

            safetensors.write(out / file, shard, parts())
            files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def _write_text_files(out: Path, files: Mapping[str, str], generation: Mapping[str, Any]) -> None:
    """Writes the tokenizer, its special tokens and chat template, and how a generated text ends."""
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    write_json(out / GENERATION, generation)


def _write_preprocessor(out: Path, config: MLLMConfig) -> None:
    """Writes ``models.vision.preprocess`` as the config of a Hugging Face image processor."""
    family, size = FAMILIES[config.vision.family], config.vision.image_size
    clip = config.vision.family == "clip"
    square = {"height": size, "width": size}
    if config.fit == "pad":
        print("notice: fit=pad: pad images to a square with black before the image processor")
    write_json(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor" if clip else "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size} if config.fit == "crop" else square,
            "resample": BICUBIC,
            "do_center_crop": config.fit == "crop",
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(family.mean),
            "image_std": list(family.std),
        },
    )
