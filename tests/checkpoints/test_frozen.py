"""Frozen arrays lie beside the steps, whole, and are read with the steps of their own run alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_act.checkpoints import checkpoint
from mllm_act.checkpoints.frozen import load_frozen, save_frozen
from mllm_act.errors import UserError

ARRAYS = {
    "mllm/a/kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    "mllm/b/kernel": jnp.full((2, 2), 3, jnp.float8_e4m3fn),
    "tokenizer/codes": jnp.arange(3.0),
}


def like(arrays: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        for path, array in arrays.items()
    }


def test_what_is_read_is_what_was_written_to_the_bit(tmp_path: Path) -> None:
    mark = save_frozen(tmp_path, ARRAYS)
    found = load_frozen(tmp_path, like(ARRAYS), mark)
    assert found.keys() == ARRAYS.keys()
    for path, array in ARRAYS.items():
        assert found[path].dtype == array.dtype
        np.testing.assert_array_equal(found[path], array)


def test_a_run_that_freezes_nothing_has_an_empty_folder(tmp_path: Path) -> None:
    assert load_frozen(tmp_path, {}, save_frozen(tmp_path, {})) == {}


def test_a_later_run_in_the_same_folder_takes_its_place(tmp_path: Path) -> None:
    first = save_frozen(tmp_path, ARRAYS)
    other = {"tokenizer/codes": jnp.ones(3)}
    second = save_frozen(tmp_path, other)
    np.testing.assert_array_equal(
        load_frozen(tmp_path, like(other), second)["tokenizer/codes"], np.ones(3)
    )
    with pytest.raises(UserError, match=f"expected the mark '{first}' .* of another run; copy"):
        load_frozen(tmp_path, like(ARRAYS), first)


def test_a_folder_without_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/frozen: expected the frozen parameters"):
        load_frozen(tmp_path, like(ARRAYS), "")


def test_every_array_that_differs_is_listed(tmp_path: Path) -> None:
    mark = save_frozen(tmp_path, ARRAYS)
    wanted = {
        "mllm/a/kernel": jnp.zeros((2, 4), jnp.bfloat16),
        "mllm/b/kernel": jnp.zeros((2, 2), jnp.bfloat16),
        "mllm/c/kernel": jnp.zeros(1),
    }
    with pytest.raises(UserError, match="found 4 that differ") as caught:
        load_frozen(tmp_path, like(wanted), mark)
    for line in (
        "mllm/a/kernel (expected bfloat16[2, 4], found bfloat16[2, 3])",
        "mllm/b/kernel (expected bfloat16[2, 2], found float8_e4m3fn[2, 2])",
        "mllm/c/kernel (expected float32[1], found none)",
        "tokenizer/codes (expected none, found float32[3])",
        "another architecture or vocabulary",
    ):
        assert line in str(caught.value)


def test_the_steps_arrays_are_compared_alike(tmp_path: Path) -> None:
    with checkpoint.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"trained": {"a": jnp.ones(3)}}, {})
        checkpoints.wait()
        with pytest.raises(UserError, match=r"a \(expected float32\[4\], found float32\[3\]\)"):
            checkpoints.restore(1, {"trained": like({"a": jnp.ones(4)})})
        with pytest.raises(UserError, match="expected arrays, found none"):
            checkpoints.restore(1, {"model": like({"a": jnp.ones(3)})})
