"""Small files of pretrained weights in every foreign format, and how the programs read them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_act.import_hf import open_source
from mllm_act.weights import safetensors
from mllm_act.weights.tensors import Source, Tensor
from tests.fuzzing import Format, mutated, mutated_json

RNG = np.random.default_rng(0)

Content = tuple[dict[str, np.ndarray], dict[str, Any]]


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def safetensors_file(path: Path) -> dict[str, np.ndarray]:
    arrays = {"a": floats(2, 3), "b": floats(4), "c": floats(4).astype(np.float16)}
    header = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    safetensors.write(path, header, arrays.items())
    return arrays


def gguf_file(path: Path, leave_out: str = "", **changes: object) -> dict[str, np.ndarray]:
    """A Llama of one layer; ``changes`` are keys of ``llama.`` with ``__`` for their points."""
    writer = pytest.importorskip("gguf").GGUFWriter(path, "llama")
    sizes: dict[str, object] = {
        "embedding_length": 4, "feed_forward_length": 8, "block_count": 1, "attention__head_count": 2,
        "attention__head_count_kv": 2, "rope__dimension_count": 2, "context_length": 64, "rope__freq_base": 1e4,
        "attention__layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    for name, value in (sizes | changes).items():
        key = f"llama.{name.replace('__', '.')}"
        if key == leave_out:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["a", "b", "ab", "<end>"]
    if leave_out != "tokenizer.ggml.tokens":
        writer.add_token_list(tokens)
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_chat_template("{{ messages }}")
    arrays = {
        "token_embd.weight": floats(4, 4),
        "output_norm.weight": floats(4),
        "blk.0.ffn_up.weight": floats(8, 4),
    }
    if "rope_freqs" in leave_out:
        arrays["rope_freqs.weight"] = floats(1)
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write()
    writer.close()
    return arrays


def onnx_file(path: Path) -> dict[str, np.ndarray]:
    """A DINOv2's patches, positions and one block's MLP and query."""
    package = pytest.importorskip("onnx")
    helper = package.helper
    arrays = {
        "backbone.embeddings.patch_embeddings.projection.weight": floats(4, 3, 2, 2),
        "backbone.encoder.layer.0.mlp.fc1.bias": floats(4),
        "onnx::MatMul_1": floats(4, 4), "onnx::MatMul_2": floats(4, 4), "first": floats(1, 1, 4),
        "grid": floats(1, 9, 4),
    }  # fmt: skip
    nodes = [
        helper.make_node(operation, [name], [str(index)], name=f"/backbone/{node}")
        for index, (operation, name, node) in enumerate((
            ("MatMul", "onnx::MatMul_1", "encoder/layer.0/mlp/fc1/MatMul"),
            ("MatMul", "onnx::MatMul_2", "encoder/layer.0/attention/attention/query/MatMul"),
            ("Concat", "first", "embeddings/Concat"),
            ("Reshape", "grid", "embeddings/Reshape"),
        ))
    ]  # fmt: skip
    initializers = [package.numpy_helper.from_array(a, name) for name, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", [], [], initializer=initializers)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return arrays


def tokenizer_json(path: Path, *steps: dict[str, object]) -> Path:
    values = {
        "version": "1.0", "added_tokens": [], "normalizer": {"type": "Sequence", "normalizers": list(steps)},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }  # fmt: skip
    path.write_text(json.dumps(values))
    return path


def huggingface_folder(folder: Path) -> None:
    """A Llama of no layers, which reading does not need."""
    safetensors_file(folder / "part.safetensors")
    config = {
        "model_type": "llama", "vocab_size": 4, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    files = {
        "config.json": config | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "model.safetensors.index.json": {"weight_map": dict.fromkeys("abc", "part.safetensors")},
        "preprocessor_config.json": {"image_mean": [0.48145466, 0.4578275, 0.40821073]},
        "generation_config.json": {"eos_token_id": 3},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    tokenizer_json(folder / "tokenizer.json", {"type": "Prepend", "prepend": "_"})


def content(source: Source) -> Content:
    return {name: np.array(tensor.read()) for name, tensor in source.tensors.items()}, source.config


def compare(found: Content, expected: Content) -> str:
    """``convert`` refuses tensors of other names and shapes, numbers that are not floats, and other configs."""
    values, good = found[0], expected[0]
    shapes = [{name: v.shape for name, v in tensors.items()} for tensors in (values, good)]
    if shapes[0] != shapes[1] or found[1] != expected[1]:
        return "other"
    if any(v.dtype.kind in "iub" for v in values.values()):
        return "other"
    equal = (np.array_equal(v, good[name], equal_nan=True) for name, v in values.items())
    return "equal" if all(equal) else "wrong"


def _weights(name: str, make: Callable[[Path], Content], read: Callable[[Path], Source]) -> Format:
    """A file of tensors, which is damaged outside of their values."""
    frozen: list[tuple[int, int]] = []

    def make_file(folder: Path) -> Path:
        path = folder / f"x.{name}"
        arrays = make(path)
        data = path.read_bytes()
        starts = [(data.index(a.tobytes()), a.nbytes) for a in arrays.values()]
        frozen[:] = [(start, start + size) for start, size in starts]
        return path

    def damage(data: bytes, draw: random.Random) -> bytes:
        return mutated(data, draw, frozen)

    return Format(name, make_file, lambda path: content(read(path)), damage, compare)


def _text(name: str) -> Format:
    """A text file of a Hugging Face folder."""

    def make(folder: Path) -> Path:
        huggingface_folder(folder)
        return folder / name

    def read(path: Path) -> Content:
        return content(open_source(str(path.parent)))

    return Format(name, make, read, mutated_json, compare)


FORMATS = (
    _weights(
        "safetensors",
        safetensors_file,
        lambda path: Source("", safetensors.read(path), {}, None, None),
    ),
    _weights("gguf", gguf_file, lambda path: open_source(str(path))),
    _weights("onnx", onnx_file, lambda path: open_source(str(path))),
    _text("config.json"),
    _text("tokenizer.json"),
    _text("model.safetensors.index.json"),
    _text("preprocessor_config.json"),
    _text("generation_config.json"),
)
