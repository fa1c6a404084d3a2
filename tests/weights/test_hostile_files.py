"""Damaged and forged files: one UserError, or the same content; never another exception, a hang or much memory."""

import json
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mllm_act.errors import UserError
from mllm_act.import_hf import open_source
from mllm_act.weights import gguf, onnx, safetensors
from mllm_act.weights.tensors import Source, Tensor
from mllm_act.weights.text_files import read_tokenizer

MUTATIONS = 400
GIGABYTE = 1 << 20  # in ru_maxrss's kilobytes
RNG = np.random.default_rng(0)


class Hang(BaseException):
    """Not an Exception, so that no handler takes it for a parser's."""


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """A minute and a gigabyte for each test."""

    def ring(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, ring)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTE


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


def mutated(data: bytes, frozen: list[tuple[int, int]], draw: random.Random) -> bytes:
    """One change outside the ranges of tensors' values, where no format can notice one."""
    while True:
        at = draw.randrange(len(data))
        if not any(start <= at < stop for start, stop in frozen):
            break
    huge = struct.pack("<q", draw.choice([-1, 2**62, 2**31, 2**40, draw.getrandbits(62)]))
    changed = draw.choice([
        lambda: data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],
        lambda: data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
        lambda: data[:at] + data[at + draw.randrange(1, 9) :],
        lambda: data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:],
        lambda: data[:at] + huge + data[at + 8 :],
        lambda: data[:at],
    ])()  # fmt: skip
    end = at + 8 if len(changed) == len(data) else at
    return data if any(start < end and at < stop for start, stop in frozen) else changed


Content = dict[str, np.ndarray]


def content(tensors: dict[str, Tensor]) -> Content:
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def as_the_model(values: Content, expected: Content) -> bool:
    """Whether ``convert`` would accept the tensors: it refuses other names, shapes, and numbers that are not floats."""
    return {n: v.shape for n, v in values.items()} == {
        n: v.shape for n, v in expected.items()
    } and all(v.dtype.kind not in "iub" for v in values.values())


@pytest.mark.parametrize(
    ("make", "name", "read"),
    [
        (safetensors_file, "x.safetensors", lambda path: Source("", safetensors.read(path), {}, None, None)),
        (gguf_file, "x.gguf", gguf.read),
        (onnx_file, "x.onnx", onnx.read),
    ],
)  # fmt: skip
def test_mutated_files(
    tmp_path: Path, make: Callable[..., Content], name: str, read: Callable[[Path], Source]
) -> None:
    path = tmp_path / name
    arrays = make(path)
    data = path.read_bytes()
    frozen = [
        (data.index(a.tobytes()), data.index(a.tobytes()) + a.nbytes) for a in arrays.values()
    ]
    source = read(path)
    expected, config = content(source.tensors), source.config
    draw, refused = random.Random(0), 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(data, frozen, draw))
        try:
            source = read(path)
            values = content(source.tensors)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        if as_the_model(values, expected) and source.config == config:
            for tensor, value in values.items():
                np.testing.assert_array_equal(value, expected[tensor], err_msg=tensor)
    assert refused > MUTATIONS // 4


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


def tokenizer_json(path: Path, *steps: dict[str, object]) -> Path:
    values = {
        "version": "1.0", "added_tokens": [], "normalizer": {"type": "Sequence", "normalizers": list(steps)},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }  # fmt: skip
    path.write_text(json.dumps(values))
    return path


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
