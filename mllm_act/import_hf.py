"""Imports pretrained weights into a folder that training starts from.

    python -m mllm_act.import_hf --preset=llava_1_5_7b --source=llava-hf/llava-1.5-7b-hf --out=pretrained/llava_1_5_7b
    python -m mllm_act.import_hf --preset=smollm2_vit_s --source=HuggingFaceTB/SmolLM2-135M-Instruct \
        --source=facebook/dinov2-small --out=pretrained/smollm2_vit_s

A source is a Hugging Face folder (config.json, safetensors shards), a hub id (``owner/name`` or
``owner/name@revision``), a Llama in GGUF or a DINOv2 in ONNX. Tensors are copied one by one, so import takes the memory
of two of the largest tensors, whatever the model's size (but an ONNX file is read whole). Training reads the folder
layer by layer, straight to the devices.
"""

import argparse

from mllm_act.errors import UserError, expect_new, run
from mllm_act.files import user_path
from mllm_act.models import presets
from mllm_act.weights import gguf, huggingface, onnx
from mllm_act.weights.convert import convert
from mllm_act.weights.tensors import Source

DTYPES = ("float32", "bfloat16", "float16")


def open_source(name: str) -> Source:
    """Opens the folder, file or hub repository that ``--source`` names.

    Raises:
      UserError: if it does not exist or cannot be read.
    """
    path = user_path(name, "--source")
    if path.is_dir():
        return huggingface.read(path, name)
    if path.is_file() and path.suffix in (".gguf", ".onnx"):
        return gguf.read(path) if path.suffix == ".gguf" else onnx.read(path)
    if not path.exists() and huggingface.is_hub_id(name):
        folder = huggingface.download(name)
        return huggingface.read(folder, name, revision=folder.name)
    raise UserError(
        f"--source={name}: expected a folder, a .gguf or .onnx file, or a hub id (owner/name), found "
        + ("a file of another kind" if path.exists() else "nothing with this name")
    )


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", required=True, help="the preset that the weights are for")
    parser.add_argument("--source", required=True, action="append", help="see above; repeatable")
    parser.add_argument("--out", type=user_path, required=True, help="the folder to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the arrays written (default: the source's)"
    )
    arguments = parser.parse_args()
    preset = presets.get(arguments.preset)
    if preset.text_tokenizer != "pretrained":
        known = [name for name, p in presets.PRESETS.items() if p.text_tokenizer == "pretrained"]
        raise UserError(
            f"--preset={arguments.preset}: expected a preset that starts from pretrained weights, found one trained "
            f"from scratch; pass one of {', '.join(known)}"
        )
    expect_new(arguments.out)  # before anything is downloaded
    sources = [open_source(name) for name in arguments.source]
    convert(preset.model, sources, arguments.out, arguments.dtype)
    print(f"{arguments.out}: {', '.join(arguments.source)}")


if __name__ == "__main__":
    run(main)
