"""Every problem of a source is reported in one error, before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mllm_act.errors import UserError
from mllm_act.weights import safetensors
from mllm_act.weights.tensors import Tensor
from tests.weights import small


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "llava"
    small.save(small.llava(), path, max_shard_size="20KB")
    return path


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage: hard links, which are replaced, never written to."""
    path = tmp_path / "llava"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).hardlink_to(file)
    return path


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def edit(source: Path, **values: object) -> None:
    config = json.loads((source / "config.json").read_text())
    for key, value in values.items():
        part, _, field = key.partition("__")
        if field:
            config[part][field] = value
        else:
            config[part] = value
    replace(source / "config.json", json.dumps(config).encode())


def refused(source: Path, match: str) -> str:
    """Expects the import to fail and leave no folder; returns the error's text."""
    out = source.parent / "out"
    with pytest.raises(UserError, match=match) as error:
        small.imported(small.config(), out, str(source))
    assert not list(source.parent.glob("*out*"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_extra_and_misshapen_tensors_are_all_listed_at_once(source: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        tensors = safetensors.read(source / shard)
        values = {name: np.array(tensor.read()) for name, tensor in tensors.items()}
        for name in list(values):
            if name.endswith(("layers.1.mlp.up_proj.weight", "linear_2.bias")):
                del values[name]
                del index["weight_map"][name]
            elif name.endswith("q_proj.bias"):
                values[name] = values[name][:-1]
        if "vision_tower.pre_layrnorm.weight" in values:
            values["vision_tower.cheese"] = np.zeros(3, np.float32)
            index["weight_map"]["vision_tower.cheese"] = shard
        header = {n: Tensor(v.shape, v.dtype, lambda v=v: v) for n, v in values.items()}
        (source / shard).unlink()
        safetensors.write(source / shard, header, values.items())
    replace(source / "model.safetensors.index.json", json.dumps(index).encode())
    message = refused(source, "expected the preset's tensors, found others")
    assert "missing: layers.1.mlp.up_proj.weight, linear_2.bias;" in message
    assert "extra: cheese;" in message
    for layer in range(3):  # the fourth vision block is not needed, whatever its shape
        name = f"encoder.layers.{layer}.self_attn.q_proj.bias"
        assert f"{name}: expected [16], found [15]" in message
    assert message.count("q_proj.bias") == 3


def test_a_cut_off_shard(source: Path) -> None:
    shard = source / "model-00002-of-00008.safetensors"
    shard = shard if shard.exists() else sorted(source.glob("model-00002*"))[0]
    whole = shard.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 40, 3, 0):
        replace(shard, whole[:length])
        assert shard.name in refused(source, "expected .* found .*download it again")


def test_a_missing_shard(source: Path) -> None:
    shard = sorted(source.glob("model-00003*"))[0]
    shard.unlink()
    message = refused(source, "shards that model.safetensors.index.json names")
    assert f"{shard.name} missing; download" in message


def test_an_index_that_names_a_tensor_its_shard_lacks(source: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first, last = sorted(set(index["weight_map"].values()))[
        :: len(set(index["weight_map"].values())) - 1
    ]
    name = next(n for n, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][name] = last
    replace(source / "model.safetensors.index.json", json.dumps(index).encode())
    refused(source, f"found no {name}; download the folder again")


def test_another_architecture(source: Path) -> None:
    edit(source, model_type="qwen2_vl")
    refused(source, "model_type: expected llava, llama, .* found 'qwen2_vl'")


def test_another_vocabulary_and_all_other_sizes_are_listed(source: Path) -> None:
    edit(
        source, text_config__vocab_size=32000, vision_config__patch_size=16, vision_feature_layer=-1
    )
    message = refused(source, "expected the preset's model, found another in its config.json")
    assert "text_config.vocab_size: expected 40, found 32000" in message
    assert "vision_config.patch_size: expected 7, found 16" in message
    assert "vision_feature_layer: expected that of 3 blocks, found -1 of 4" in message


def test_another_rotary_base_or_scaling(source: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    edit(source, text_config__rope_parameters=rope)
    message = refused(source, "text_config.rope_theta: expected 10000.0, found 500000.0")
    assert "text_config.rope_type: expected 'default', found 'linear'" in message
    assert "text_config.rope_parameters.factor: expected none, found 2.0" in message


@pytest.mark.parametrize(
    ("file", "data", "match"),
    [
        ("config.json", None, "expected config.json in it, found .*model-"),
        ("config.json", b"{", "config.json: expected JSON"),
        ("config.json", b"[]", "expected a JSON object, found list"),
        ("tokenizer.json", None, "expected one tokenizer.json"),
        ("model.safetensors.index.json", None, "expected model.safetensors or model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_missing_and_damaged_files(source: Path, file: str, data: bytes | None, match: str) -> None:
    (source / file).unlink()
    if data is not None:
        (source / file).write_bytes(data)
    refused(source, match)


def test_a_source_for_one_part_only(tmp_path: Path) -> None:
    name = small.save(small.llama(), tmp_path / "llama")
    with pytest.raises(
        UserError, match="missing: embeddings.class_embedding, .*a --source for each part"
    ):
        small.imported(small.config(), tmp_path / "out", name)


def test_an_existing_folder_is_left_alone(source: Path) -> None:
    out = source.parent / "taken"
    out.mkdir()
    with pytest.raises(UserError, match="remove it or name another"):
        small.imported(small.config(), out, str(source))
    assert out.exists() and not list(out.iterdir())


@pytest.mark.parametrize("name", ["x.gguf", "x.onnx"])
def test_a_cut_off_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF\x03\x00\x00\x00 and no more")
    with pytest.raises(UserError, match="found one that cannot be read .*; download it again"):
        small.open_source(str(tmp_path / name))


def test_the_program_ends_with_one_line(tmp_path: Path) -> None:
    command = [
        "mllm_act.import_hf", "--preset=smollm2_vit_s", f"--source={tmp_path}/none", f"--out={tmp_path}/out",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: --source=") and done.stderr.count("\n") == 1
