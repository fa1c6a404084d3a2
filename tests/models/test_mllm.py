"""The sequence: what one pass over a window equals, and what acting computes from the cache."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act import parameters
from mllm_act.errors import UserError
from mllm_act.models.acting.prepare import for_acting
from mllm_act.models.mllm import HISTORIES, MLLM, MLLMConfig
from tests.models import tiny
from tests.models.tiny import B, D, N, T

pytestmark = pytest.mark.slow

BRIDGES = (
    ("projector",),
    ("perceiver",),
    ("projector", "perceiver"),
    ("perceiver", "projector"),
    ("mixer",),
    ("mixer", "projector"),
    ("film",),
    ("film", "projector"),
)


@pytest.fixture(scope="module", params=HISTORIES)
def model(request: pytest.FixtureRequest) -> MLLM:
    return tiny.mllm(history=request.param)


@tiny.jit
def run(model: MLLM, given: dict[str, jax.Array]) -> jax.Array:
    return model(**given)


def test_one_pass_over_a_window_equals_a_pass_for_each_step(model: MLLM) -> None:
    """In every reading of history, step t's hidden states are those of a window that ends at t."""
    whole = tiny.sequence(fed=2)
    together = run(model, whole)
    for t in range(T):
        cut = {
            k: v[:, : t + 1] if k in ("latents", "step_mask", "fed") else v
            for k, v in whole.items()
        }
        np.testing.assert_allclose(run(model, cut)[:, t], together[:, t], atol=2e-5)


def test_with_observations_alone_earlier_actions_change_nothing() -> None:
    model = tiny.mllm(history="observations")
    given = tiny.sequence(fed=2)
    other = {**given, "fed": given["fed"].at[:, 0].add(1.0)}
    a, b = run(model, given), run(model, other)
    np.testing.assert_array_equal(a[:, 1:], b[:, 1:])
    assert not np.allclose(a[:, 0, 1:], b[:, 0, 1:])


def test_with_actions_in_the_history_later_steps_see_them() -> None:
    model = tiny.mllm(history="observations_and_actions")
    given = tiny.sequence(fed=2)
    other = {**given, "fed": given["fed"].at[:, 0].add(1.0)}
    a, b = run(model, given), run(model, other)
    np.testing.assert_array_equal(a[:, 0, 0], b[:, 0, 0])
    assert not np.allclose(a[:, 1:], b[:, 1:])


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_padding_of_prompt_and_window_changes_nothing(model: MLLM, data: st.DataObject) -> None:
    """Each prompt stands anywhere in a longer row, on either side of its padding; the window ends early."""
    given = tiny.sequence(fed=2)
    base = run(model, given)
    room = N + 4
    prompt, exists = np.full((B, room), 7), np.zeros((B, room), bool)
    for row, length in enumerate(tiny.PROMPTS):
        start = data.draw(st.integers(0, room - length))
        prompt[row, start : start + length] = given["prompt"][row, :length]
        exists[row, start : start + length] = True
    steps = data.draw(st.integers(1, T))
    longer = {
        **given,
        "prompt": jnp.array(prompt),
        "prompt_mask": jnp.array(exists),
        "step_mask": jnp.broadcast_to(jnp.arange(T) < steps, (B, T)),
        "latents": jnp.where(jnp.arange(T)[:, None, None] < steps, given["latents"], 9.0),
    }
    np.testing.assert_allclose(run(model, longer)[:, :steps], base[:, :steps], atol=2e-5)


@tiny.jit
def encode(model: MLLM, images: dict[str, jax.Array]) -> jax.Array:
    given = tiny.sequence(fed=0)
    return model.latents(images, model.instruction(given["prompt"], given["prompt_mask"]))


# FiLM's norms over nine places make gradients of 100, and what is added before them has none.
@pytest.mark.parametrize(
    ("bridge", "cameras", "close"),
    [
        (("perceiver",), ("front",), {"rtol": 1e-5, "atol": 1e-4}),
        (("film",), tiny.CAMERAS, {"rtol": 1e-4, "atol": 1e-3}),
    ],
    ids=["perceiver", "film"],
)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_skipping_padding_changes_no_other_image(
    bridge: tuple[str, ...],
    cameras: tuple[str, ...],
    close: dict[str, float],
    data: st.DataObject,
) -> None:
    """Latents, and gradients of a sum over the steps that exist, for any number of shards."""
    rows, steps, shards = 4, 6, data.draw(st.sampled_from([1, 2]))
    lengths = data.draw(st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    mask = jnp.arange(steps) < jnp.array(lengths)[:, None]
    images = {
        name: jnp.tile(image[:1, :1], (rows, steps, 1, 1, 1))
        + jnp.arange(rows * steps, dtype=jnp.uint8).reshape(rows, steps, 1, 1, 1)
        for name, image in tiny.images(cameras=cameras).items()
    }
    model, instruction = tiny.mllm(bridge=bridge), None
    if model.bridge.reader is not None:  # each window has its own
        film = dict(model.config.sizes)["film"]
        width = film.queries * film.width
        instruction = jnp.array(np.random.default_rng(2).normal(size=(rows, width)), jnp.float32)
    expected, found = (
        latents_and_gradient(model, images, instruction, mask, how)
        for how in (None, jnp.ones((shards,)))  # its length is the number of shards
    )
    for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(a, b, **close)
    everything = latents_and_gradient(model, images, instruction, jnp.ones_like(mask), None)[0]
    np.testing.assert_allclose(found[0], jnp.where(mask[..., None, None], everything, 0), atol=1e-5)


@tiny.jit
def latents_and_gradient(
    model: MLLM,
    images: dict[str, jax.Array],
    instruction: jax.Array | None,
    mask: jax.Array,
    shards: jax.Array | None,
) -> tuple[jax.Array, tuple[nnx.State, jax.Array | None]]:
    graph, moved, rest = nnx.split(model, nnx.Param, ...)

    def total(moved: nnx.State, instruction: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        given = {} if shards is None else {"mask": mask, "shards": len(shards)}
        latents = nnx.merge(graph, moved, rest).latents(images, instruction, **given)
        latents = jnp.where(mask[..., None, None], latents, 0)
        return jnp.square(latents).sum(), latents

    (_, latents), gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        moved, instruction
    )
    return latents, gradient


@tiny.jit
def decode(
    model: MLLM, given: dict[str, jax.Array], past: jax.Array, newest: jax.Array
) -> jax.Array:
    """The hidden states [B, F+1, D] of step ``newest``: prefilled, then one token at a time."""
    step_mask = jnp.broadcast_to(jnp.arange(T) <= newest, (B, T))
    reading = model.read(given["prompt"], given["prompt_mask"])
    hidden, state = model.prefill(reading, given["latents"], step_mask, past)
    out = [hidden]
    for token in range(given["fed"].shape[2]):
        hidden, state = model.extend(given["fed"][:, newest, token], state)
        out.append(hidden)
    return jnp.stack(out, axis=1)


@pytest.mark.parametrize(
    ("history", "bridge"),
    [
        *(("observations", bridge) for bridge in BRIDGES),
        *(("observations_and_actions", bridge) for bridge in (("perceiver",), ("film",))),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_decoding_with_the_cache_equals_the_pass_over_everything(
    history: str, bridge: tuple[str, ...]
) -> None:
    """For windows of every length, as the model was trained and as it acts."""
    model = tiny.mllm(history=history, bridge=bridge)
    latents = encode(model, tiny.images())
    each = 9 if bridge == ("projector",) else 4
    assert model.config.latents_per_image == each
    assert latents.shape == (B, T, 2 * each, D)
    given = {**tiny.sequence(fed=2), "latents": latents}
    expected = run(model, given)
    past = given["fed"] if history == "observations_and_actions" else given["fed"][:, :, :0]
    for newest in range(T):
        found = decode(model, given, past, jnp.array(newest))
        np.testing.assert_allclose(found, expected[:, newest], atol=2e-5)
    ready = for_acting(model)
    given["latents"] = encode(ready, tiny.images())
    for newest in range(T):
        found = decode(ready, given, past, jnp.array(newest))
        np.testing.assert_allclose(found, expected[:, newest], atol=2e-5)


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_what_acts_has_no_factors_and_the_dtype_it_computes_in(weight_dtype: str) -> None:
    model = for_acting(tiny.mllm(weight_dtype=weight_dtype, dtype="bfloat16"))
    leaves = parameters.flatten(nnx.state(model, nnx.Param))
    assert not [path for path in leaves if "lora_" in path]
    matrices = {
        path: leaf
        for path, leaf in leaves.items()
        if path.startswith(("vision/blocks/", "language/blocks/")) and "/kernel" in path
    }
    assert {leaf.dtype for leaf in matrices.values()} == {jnp.dtype("bfloat16")}


def test_latents_of_all_cameras_are_in_the_order_of_their_names() -> None:
    model = tiny.mllm()
    images = tiny.images(size=10)  # resized
    latents = model.latents(images)
    assert latents.shape == (B, T, 8, D)
    swapped = model.latents({"wrist": images["front"], "front": images["wrist"]})
    np.testing.assert_allclose(swapped[:, :, :4], latents[:, :, 4:], atol=1e-6)


def test_a_config_survives_json() -> None:
    config = tiny.mllm().config
    assert MLLMConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": "all"}, "history: expected one of observations, observations_and_actions"),
        (
            {"weight_dtype": "int4"},
            "weight_dtype: expected one of float32, bfloat16, float8, found 'int4'",
        ),
        ({"remat": "some"}, "remat: expected one of"),
        ({"bridge": ()}, "bridge: expected one or more of projector, perceiver, mixer"),
        ({"bridge": ("perceiver", "film")}, "bridge: expected film first"),
        ({"bridge": ("perceiver", "perceiver")}, "bridge: .* found 'perceiver,perceiver'"),
    ],
)
def test_a_choice_that_does_not_exist_is_one_clear_error(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny.mllm(**changes)
