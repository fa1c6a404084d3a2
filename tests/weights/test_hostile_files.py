"""Damaged and forged files: one UserError, or the same content; never another exception, a hang or much memory."""

import json
import struct
from pathlib import Path

import pytest

from mllm_act.errors import UserError
from mllm_act.import_hf import open_source
from mllm_act.weights import gguf, onnx, safetensors
from mllm_act.weights.text_files import read_tokenizer
from tests.fuzzing import RIGHT, Format, fuzz
from tests.weights.foreign import FORMATS, gguf_file, onnx_file, tokenizer_json


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_mutated_files(tmp_path: Path, kind: Format) -> None:
    count = 60 if kind.name.endswith(".json") else 300
    counts = fuzz(kind, tmp_path, count)
    assert counts.keys() <= RIGHT, counts
    assert counts["refused"] > count // 5, counts


@pytest.mark.parametrize(
    "offsets", [[[0, 8], [4, 12]], [[-8, 0], [0, 8]], [[0, 8], [12, 20]], [[8, 16], [8, 16]], [[4, 12], [12, 20]]]
)  # fmt: skip
def test_safetensors_with_overlaps_gaps_and_negative_offsets(
    tmp_path: Path, offsets: list[list[int]]
) -> None:
    header = json.dumps({
        name: {"dtype": "F32", "shape": [2], "data_offsets": span}
        for name, span in zip("ab", offsets, strict=True)
    }).encode()  # fmt: skip
    values = bytes(max(stop for _, stop in offsets))
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + values)
    with pytest.raises(UserError, match="expected a safetensors file, found one that cannot be"):
        safetensors.read(tmp_path / "x")


def test_a_forged_header_length(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", 900_000_000))
        file.truncate(1_000_000_000)
    with pytest.raises(UserError, match="1,000,000,000 bytes for a header of 900,000,000"):
        safetensors.read(tmp_path / "x")


@pytest.mark.parametrize("count", [2**63, 2**40, 2**24])
@pytest.mark.parametrize("field", ["tensors", "keys", "array", "string"])
def test_a_gguf_with_forged_counts(tmp_path: Path, field: str, count: int) -> None:
    gguf_file(tmp_path / "x.gguf")
    data = bytearray((tmp_path / "x.gguf").read_bytes())
    key = b"tokenizer.ggml.token_type"
    at = {
        "tensors": 8, "keys": 16, "array": data.index(key) + len(key) + 8, "string": data.index(key) - 8,
    }[field]  # fmt: skip
    data[at : at + 8] = struct.pack("<Q", count)
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UserError, match="expected a GGUF file, found one that cannot be read"):
        gguf.read(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope__scaling__type", "linear"), ("rope__scaling__factor", 4.0), ("rope__dimension_count", 1),
        ("attention__key_length", 8), ("expert_count", 8), ("attention__sliding_window", 16), ("logit_scale", 0.5),
    ],
)  # fmt: skip
def test_a_gguf_that_computes_something_else(tmp_path: Path, key: str, value: object) -> None:
    gguf_file(tmp_path / "x.gguf", **{key: value})
    with pytest.raises(UserError, match=rf"found llama.{key.replace('__', '.')} = .*not supported"):
        gguf.read(tmp_path / "x.gguf")


def test_a_gguf_with_factors_of_the_rotary_embedding(tmp_path: Path) -> None:
    gguf_file(tmp_path / "x.gguf", leave_out="rope_freqs")
    with pytest.raises(UserError, match="found rope_freqs.weight, which is not supported"):
        gguf.read(tmp_path / "x.gguf")


@pytest.mark.parametrize("key", ["llama.block_count", "llama.rope.freq_base", "tokenizer.ggml.tokens"])  # fmt: skip
def test_a_gguf_without_a_key(tmp_path: Path, key: str) -> None:
    gguf_file(tmp_path / "x.gguf", leave_out=key)
    with pytest.raises(UserError, match=f"expected the keys {key}, found none of them"):
        gguf.read(tmp_path / "x.gguf")


def test_a_ggufs_end_token_and_chat_template(tmp_path: Path) -> None:
    gguf_file(tmp_path / "x.gguf", rope__scaling__type="none")
    files = gguf.read(tmp_path / "x.gguf").text_files
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": 3}
    tokenizer = json.loads(files["tokenizer_config.json"])
    assert (tokenizer["eos_token"], tokenizer["chat_template"]) == ("<end>", "{{ messages }}")


def test_an_onnx_with_external_data(tmp_path: Path) -> None:
    onnx_file(tmp_path / "x.onnx")
    package = pytest.importorskip("onnx")
    options = {"save_as_external_data": True, "size_threshold": 0, "location": "y"}
    package.save_model(package.load(tmp_path / "x.onnx"), tmp_path / "z.onnx", **options)
    with pytest.raises(UserError, match="found 6 of them in other files .* save it again with"):
        onnx.read(tmp_path / "z.onnx")


def test_a_tokenizer_whose_normalizer_grows(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    spaces = {
        "type": "Replace",
        "pattern": {"String": " "},
        "content": "\N{LOWER ONE EIGHTH BLOCK}",
    }
    assert read_tokenizer(tokenizer_json(path, spaces, {"type": "Prepend", "prepend": "_"}))
    for step in (grow, {**grow, "pattern": {"Regex": "."}}, {**grow, "pattern": {"String": ""}}):
        with pytest.raises(UserError, match="tokenizer.json: expected a normalizer .* found one"):
            read_tokenizer(tokenizer_json(path, *[step] * 40))


@pytest.mark.parametrize("data", [b"{}", b"[" * 100_000, b"\xff", b'{"model": 1}'])
def test_a_tokenizer_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(UserError, match="tokenizer.json: expected .* found"):
        read_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", 3])
def test_an_index_that_leaves_its_folder(tmp_path: Path, shard: object) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    index = {"weight_map": {"x": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json: expected .* found"):
        open_source(str(folder))
