"""The decode kernels compute what the layers do. Here they are interpreted; a GPU compiles them.

In float8, layers and kernels round their inputs with different scales. The kernels are therefore compared with exact
products of the stored matrices; for the bound see test_float8.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act.models.acting.language import kernels_fit, padded_rows
from mllm_act.models.acting.prepare import for_acting
from mllm_act.models.language import LanguageConfig
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLM
from tests.models import tiny

pytestmark = pytest.mark.slow

PROMPT, WIDTH = 11, 256


def model(weight_dtype: str, kv_heads: int, dtype: str) -> MLLM:
    """A model whose sizes suit the kernels, ready for acting, with norms and factors that do something."""
    sizes = LanguageConfig(
        vocabulary=32, action_tokens=16, width=WIDTH, layers=1, heads=4, kv_heads=kv_heads, mlp_width=256,
        lora=LoRA(targets="q|k|v", rank=2, alpha=4.0),
    )  # fmt: skip
    made = tiny.mllm(language=sizes, weight_dtype=weight_dtype, dtype=dtype)
    blocks = made.language.blocks
    for i, norm in enumerate((blocks.norm1, blocks.norm2)):
        norm.scale[...] = jnp.exp(0.5 * jax.random.normal(jax.random.key(i), norm.scale.shape))
    return for_acting(made)


def inputs(count: int, past: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings, positions and a mask of ``count`` inputs after ``past`` others, of which two are not seen."""
    draw = np.random.default_rng(count)
    x = jnp.array(draw.normal(size=(1, count, WIDTH)), jnp.float32)
    order = np.arange(past + count)
    mask = order[past:, None] >= order
    mask[:, 1:3] &= past == 0
    return x, jnp.array(order[past:][None]), jnp.array(mask[None])


@tiny.jit
def both(
    model: MLLM, prompt: tuple, steps: tuple, token: tuple
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Hidden states of a step and of the token after it: by the layers in float32, and by the kernels."""
    language, dtype = model.language, jnp.dtype(model.config.dtype)
    _, read = language(prompt[0].astype(dtype), *prompt[1:], keep_cache=True)
    found, own = language.decode(steps[0].astype(dtype), *steps[1:], (read,))
    found2, _ = language.decode(token[0].astype(dtype), *token[1:], (read, own))
    assert found.dtype == found2.dtype == dtype
    exact(model)
    _, read = language(*prompt, keep_cache=True)
    plain, cache = language(*steps, past=(read,), keep_cache=True)
    plain2, _ = language(*token, past=(read, cache))
    return [plain, plain2], [found, found2]


def exact(model: MLLM) -> None:
    """Puts the values that the language model's matrices hold in float32 in their place."""
    for name in ("qkv", "o", "gate_up", "down"):
        linear = getattr(model.language.blocks, name)
        held = [matrix.astype(jnp.float32) for _, matrix in linear.kernel.get_value()]
        if linear.kernel_scale is not None:
            scales = linear.kernel_scale.get_value()
            held = [matrix * scale for matrix, scale in zip(held, scales, strict=True)]
        linear.kernel, linear.kernel_scale = (
            nnx.Param(tuple((None, matrix) for matrix in held)),
            None,
        )


@pytest.mark.parametrize(
    ("weight_dtype", "dtype", "kv_heads", "count", "close"),
    [
        ("float32", "float32", 2, 21, 1e-5),
        ("float8", "bfloat16", 4, 16, 0.05),
    ],
)
def test_a_step_and_a_token_after_it_are_those_of_the_layers(
    weight_dtype: str, dtype: str, kv_heads: int, count: int, close: float
) -> None:
    given = inputs(PROMPT, 0), inputs(count, PROMPT), inputs(1, PROMPT + count)
    expected, found = both(model(weight_dtype, kv_heads, dtype), *given)
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < close * np.linalg.norm(a)


def test_the_kernels_are_used_only_where_they_fit() -> None:
    """Never on a machine without a GPU; rows are padded to sizes that caches need not be cut to."""
    acting = model("float8", 2, "bfloat16")
    x = jnp.zeros((1, 16, WIDTH), jnp.bfloat16)
    assert not kernels_fit(acting.language.config, x)
    assert [padded_rows(n) for n in (1, 16, 17, 48, 64, 65)] == [16, 16, 32, 64, 64, 72]
    assert acting.padded_rows(17) == 32 and MLLM.padded_rows(acting, 17) == 24
