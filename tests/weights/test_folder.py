"""Loading the pretrained folder: values, dtypes, shardings and errors."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act import parameters
from mllm_act.errors import UserError
from mllm_act.models import float8
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.models.presets import PRESETS
from mllm_act.weights import safetensors
from mllm_act.weights.folder import (
    META,
    TOKENIZER,
    WEIGHTS,
    load_pretrained,
    pretrained_paths,
    pretrained_tensors,
    pretrained_text_tokenizer,
)
from mllm_act.weights.shapes import pretrained_shapes
from mllm_act.weights.tensors import Tensor

pytestmark = pytest.mark.slow


def config() -> MLLMConfig:
    """The tiny preset with a projector and fewer rows."""
    tiny = PRESETS["tiny"].model
    language = dataclasses.replace(tiny.language, vocabulary=64, tied=False)
    return dataclasses.replace(tiny, language=language, bridge=("projector",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights, with LLaVA's projector."""
    path = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in pretrained_shapes(config(), projector=True).items()
    }
    header = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    safetensors.write(path / WEIGHTS, header, arrays.items())
    meta = {"config": dataclasses.asdict(config()), "sources": []}
    (path / META).write_text(json.dumps(meta))
    (path / TOKENIZER).write_text("{}")
    return path


def leaves(weight_dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the model's arrays with its weights in a dtype."""
    model = dataclasses.replace(config(), weight_dtype=weight_dtype)
    state = nnx.eval_shape(lambda: nnx.state(MLLM(model, nnx.Rngs(0)), nnx.Param))
    return parameters.flatten(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_are_cast(folder: Path, dtype: str) -> None:
    loaded = load_pretrained(folder, leaves(dtype))
    assert loaded.keys() == leaves(dtype).keys() == pretrained_paths(folder)
    for path, tensor in pretrained_tensors(folder).items():
        leaf = leaves(dtype)[path]
        assert (loaded[path].shape, loaded[path].dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_array_equal(loaded[path], tensor.read().astype(leaf.dtype))


def test_float8_comes_with_its_scales(folder: Path) -> None:
    expected = leaves("float8")
    loaded = load_pretrained(folder, expected)
    assert {p: (a.shape, a.dtype) for p, a in loaded.items()} == {
        p: (leaf.shape, leaf.dtype) for p, leaf in expected.items()
    }
    stored = pretrained_tensors(folder)
    for path in ("language/blocks/gate/kernel", "vision/blocks/q/kernel"):
        kernel, scale = float8.quantize(jnp.asarray(np.array(stored[path].read())))
        np.testing.assert_array_equal(loaded[path], kernel)
        np.testing.assert_array_equal(loaded[f"{path}_scale"], scale)


def test_loaded_arrays_do_not_depend_on_the_file(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded = load_pretrained(tmp_path, leaves("float32"))
    expected = {path: np.array(array) for path, array in loaded.items()}
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * (tmp_path / WEIGHTS).stat().st_size)
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, expected[path])


def test_missing_and_misshapen_paths_are_all_listed(folder: Path) -> None:
    like = leaves("float32")
    like["language/blocks/bias"] = jax.ShapeDtypeStruct((3, 4), "float32")
    like["vision/cheese"] = jax.ShapeDtypeStruct((1,), "float32")
    like["language/embedding"] = jax.ShapeDtypeStruct((63, 128), "float32")
    with pytest.raises(UserError) as error:
        load_pretrained(folder, like)
    message = str(error.value)
    assert "missing: language/blocks/bias, vision/cheese;" in message
    assert "language/embedding: expected [63, 128], found [64, 128]" in message
    assert "\n" not in message and "python -m mllm_act.import_hf" in message


def test_no_folder(tmp_path: Path) -> None:
    def load(path: Path) -> None:
        load_pretrained(path, {})

    for read in (load, pretrained_paths, pretrained_text_tokenizer):
        with pytest.raises(
            UserError, match="expected a folder of pretrained weights.*make pretrained"
        ):
            read(tmp_path / "none")


@pytest.mark.parametrize("name", ["meta.json", "weights.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kept", [None, 50])
def test_an_incomplete_folder(folder: Path, tmp_path: Path, name: str, kept: int | None) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    file = tmp_path / "cut" / name
    whole = file.read_bytes()
    file.unlink()
    if kept is not None and name != "tokenizer.json":  # read by the tokenizers library
        file.write_bytes(whole[:kept])
    with pytest.raises(UserError, match="cut"):
        load_pretrained(tmp_path / "cut", {})


CHILD = """
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, sys.argv[2])
from mllm_act.training import sharding
from mllm_act.weights.folder import load_pretrained
from test_folder import leaves

mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
path = Path(sys.argv[1])
for dtype in ("bfloat16", "float8"):
    shardings = sharding.of_parameters(leaves(dtype), mesh)
    like = {
        p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[p])
        for p, s in leaves(dtype).items()
    }
    loaded, plain = load_pretrained(path, like), load_pretrained(path, leaves(dtype))
    for p, array in loaded.items():
        assert array.sharding == like[p].sharding, p
        np.testing.assert_array_equal(array, plain[p], err_msg=p)
    kernel = loaded["language/blocks/gate/kernel"]
    assert len({str(s.index) for s in kernel.addressable_shards}) == 4
print("ok")
"""


def test_arrays_have_the_given_sharding(folder: Path) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(here)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "ok\n", done.stderr
