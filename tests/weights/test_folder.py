"""The pretrained folder: what comes out of it, in which dtype and on which devices."""

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
from mllm_act.weights import folder, safetensors, shapes
from mllm_act.weights.tensors import Tensor


def config() -> MLLMConfig:
    """The tiny preset with a projector and fewer rows."""
    made = PRESETS["tiny"].model
    language = dataclasses.replace(made.language, vocabulary=64, tied=False)
    return dataclasses.replace(made, language=language, bridge=("projector",))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights, with LLaVA's projector."""
    path = tmp_path_factory.mktemp("folder")
    draw = np.random.default_rng(0)
    arrays = {
        name: draw.normal(size=shape).astype(np.float32)
        for name, shape in shapes.imported(config(), projector=True).items()
    }
    kinds = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    safetensors.write(path / folder.WEIGHTS, kinds, arrays.items())
    meta = {"config": dataclasses.asdict(config()), "sources": []}
    (path / folder.META).write_text(json.dumps(meta))
    (path / folder.TOKENIZER).write_text("{}")
    return path


def wanted(weight_dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Every array that the folder has, as a model wants it."""
    asked = dataclasses.replace(config(), weight_dtype=weight_dtype)
    state = nnx.eval_shape(lambda: nnx.state(MLLM(asked, nnx.Rngs(0)), nnx.Param))
    return parameters.flatten(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_are_cast_to_what_is_wanted(made: Path, dtype: str) -> None:
    loaded = folder.load(made, wanted(dtype))
    assert loaded.keys() == wanted(dtype).keys() == folder.paths(made)
    for path, tensor in folder.tensors(made).items():
        leaf = wanted(dtype)[path]
        assert (loaded[path].shape, loaded[path].dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_array_equal(loaded[path], tensor.read().astype(leaf.dtype))


def test_float8_comes_with_its_scales(made: Path) -> None:
    asked = wanted("float8")
    loaded = folder.load(made, asked)
    assert {p: (a.shape, a.dtype) for p, a in loaded.items()} == {
        p: (leaf.shape, leaf.dtype) for p, leaf in asked.items()
    }
    stored = folder.tensors(made)
    for path in ("language/blocks/gate/kernel", "vision/blocks/q/kernel"):
        kernel, scale = float8.quantize(jnp.asarray(np.array(stored[path].read())))
        np.testing.assert_array_equal(loaded[path], kernel)
        np.testing.assert_array_equal(loaded[f"{path}_scale"], scale)


def test_what_is_loaded_does_not_hang_on_the_file(made: Path, tmp_path: Path) -> None:
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded = folder.load(tmp_path, wanted("float32"))
    expected = {path: np.array(array) for path, array in loaded.items()}
    with (tmp_path / folder.WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * (tmp_path / folder.WEIGHTS).stat().st_size)
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, expected[path])


def test_missing_and_misshapen_paths_are_all_listed(made: Path) -> None:
    asked = wanted("float32")
    asked["language/blocks/bias"] = jax.ShapeDtypeStruct((3, 4), "float32")
    asked["vision/cheese"] = jax.ShapeDtypeStruct((1,), "float32")
    asked["language/embedding"] = jax.ShapeDtypeStruct((63, 128), "float32")
    with pytest.raises(UserError) as error:
        folder.load(made, asked)
    said = str(error.value)
    assert "missing: language/blocks/bias, vision/cheese;" in said
    assert "language/embedding: expected [63, 128], found [64, 128]" in said
    assert "\n" not in said and "python -m mllm_act.import_hf" in said


def test_no_folder(tmp_path: Path) -> None:
    for ask in (lambda p: folder.load(p, {}), folder.paths, folder.text_tokenizer):
        with pytest.raises(
            UserError, match="expected a folder of pretrained weights.*make pretrained"
        ):
            ask(tmp_path / "none")


@pytest.mark.parametrize("name", ["meta.json", "weights.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kept", [None, 50])
def test_a_folder_that_is_not_whole(
    made: Path, tmp_path: Path, name: str, kept: int | None
) -> None:
    shutil.copytree(made, tmp_path / "cut")
    file = tmp_path / "cut" / name
    whole = file.read_bytes()
    file.unlink()
    if (
        kept is not None and name != "tokenizer.json"
    ):  # whose text is the tokenizer library's to read
        file.write_bytes(whole[:kept])
    with pytest.raises(UserError, match="cut"):
        folder.load(tmp_path / "cut", {})


CHILD = """
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, sys.argv[2])
from mllm_act.training import sharding
from mllm_act.weights import folder
from test_folder import wanted

mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
path = Path(sys.argv[1])
for dtype in ("bfloat16", "float8"):
    asked = wanted(dtype)
    places = sharding.of_parameters(asked, mesh)
    asked = {
        p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=places[p]) for p, s in asked.items()
    }
    loaded, plain = folder.load(path, asked), folder.load(path, wanted(dtype))
    for p, array in loaded.items():
        assert array.sharding == asked[p].sharding, p
        np.testing.assert_array_equal(array, plain[p], err_msg=p)
    kernel = loaded["language/blocks/gate/kernel"]
    assert len({str(s.index) for s in kernel.addressable_shards}) == 4
print("ok")
"""


def test_arrays_come_to_the_sharding_asked_for(made: Path) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(made), str(here)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "ok\n", done.stderr
