"""Our reader and writer against the safetensors package, and files cut off at any length."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.errors import UserError
from mllm_act.weights import safetensors
from mllm_act.weights.tensors import Tensor

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64)


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    header = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    safetensors.write(path, header, arrays.items())


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: type
) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"a.{i}": rng.normal(size=shape).astype(dtype) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    write(path, arrays)
    tensors = safetensors.read(path)
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (tensors[name].shape, tensors[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(tensors[name].read(), array)


def test_files_are_compatible_with_the_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4, dtype=np.float16).reshape(2, 2)[:, ::-1],  # not contiguous
    }
    write(tmp_path / "ours", arrays)
    theirs = package.load_file(tmp_path / "ours")
    package.save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, tmp_path / "theirs")
    ours = safetensors.read(tmp_path / "theirs")
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name].read(), array)


def test_a_tensor_may_come_in_parts(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    header = {"x": Tensor(whole.shape, whole.dtype, lambda: whole)}
    safetensors.write(tmp_path / "x", header, (("x", part) for part in whole))
    np.testing.assert_array_equal(safetensors.read(tmp_path / "x")["x"].read(), whole)


def test_a_file_cut_off_anywhere_or_too_long_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": np.ones((2, 3), np.float32)})
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(UserError, match="again"):
            safetensors.read(tmp_path / "x")
    (tmp_path / "x").write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="again"):
        safetensors.read(tmp_path / "x")
