"""How a model is run in training changes memory and time, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act import parameters
from mllm_act.models.layers import REMAT, unstack
from tests.models import tiny

pytestmark = pytest.mark.slow

Values = tuple[jax.Array, dict[str, jax.Array]]


@functools.cache
def loss_and_gradients(remat: str, *, unrolled: bool = False) -> tuple[Values, int]:
    """Loss with dropout and its gradients by path, and the bytes that the program needs beside its arguments."""
    graph, state = nnx.split(tiny.mllm(remat=remat))
    images, given = tiny.images(cameras=("front",)), tiny.sequence(fed=1)

    def loss(state: nnx.State) -> jax.Array:
        model = nnx.merge(graph, unstack(state, backward=True) if unrolled else state)
        latents = model.latents(images)
        hidden = model(**{**given, "latents": latents}, key=jax.random.key(0))
        return jnp.square(hidden - 1).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(state).compile()
    value, gradients = compiled(state)
    return (value, parameters.flatten(gradients)), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("remat", "unrolled"), [("projections", False), ("full", False), ("projections", True)]
)
def test_losses_and_gradients_are_equal(remat: str, unrolled: bool) -> None:
    (loss, gradients), _ = loss_and_gradients("none")
    (found, found_gradients), _ = loss_and_gradients(remat, unrolled=unrolled)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert found_gradients.keys() == gradients.keys()
    for path, gradient in gradients.items():
        np.testing.assert_allclose(found_gradients[path], gradient, atol=1e-5, err_msg=path)
    assert any(np.any(gradient) for path, gradient in gradients.items() if "lora_a" in path)


def test_each_kind_of_remat_keeps_less_than_the_one_before() -> None:
    needs = [loss_and_gradients(remat)[1] for remat in REMAT]
    assert needs == sorted(needs, reverse=True) and needs[2] < 0.8 * needs[0], needs
