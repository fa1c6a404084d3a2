"""Where the instruction changes inside an episode, the policy acts as if the new one had been given from the start."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from flax import nnx

from mllm_act.adapters.regression import RegressionConfig
from mllm_act.bench import synthetic
from mllm_act.models import presets
from mllm_act.models.acting.prepare import for_acting
from mllm_act.policy import Policy
from mllm_act.policy.network import EmbodimentConfig, NetworkConfig, PolicyNetwork, build_network
from mllm_act.policy.prompt import Prompt, train_text_tokenizer

pytestmark = pytest.mark.slow

A, B = "go to the red ball", "pick up a key"
STEPS = 5
RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (STEPS, 2, 16, 16, 3), np.uint8)
PROPRIO = RNG.normal(size=(STEPS, 2, synthetic.ACTIONS)).astype(np.float32)


def make(
    bridge: tuple[str, ...], history: str = "observations", chunk: int = 1, **more: Any
) -> Policy:
    preset = presets.get("tiny")
    model = dataclasses.replace(preset.model, bridge=bridge, history=history, dtype="float32")
    part = EmbodimentConfig("regression", RegressionConfig(16), ("front", "wrist"), 3, chunk)
    config = NetworkConfig("tiny", model, preset.trained, {"arm": part})
    network = build_network(config, {"arm": synthetic.statistics()}, nnx.Rngs(0))
    network = PolicyNetwork(for_acting(network.mllm), {"arm": network.adapters["arm"]})
    text_tokenizer = train_text_tokenizer([A, B], model.language.action_tokens)
    return Policy(network, "arm", part, Prompt("{instruction}", text_tokenizer, 16), {}, **more)


def act(policy: Policy, texts: list[list[str]]) -> np.ndarray:
    """Returns the actions of two episodes, [T, 2, A], whose instructions are ``texts``, one pair a step."""
    memory, actions = policy.start(2), []
    for t, pair in enumerate(texts):
        images = {"front": FRAMES[t], "wrist": FRAMES[t, ::-1]}
        action, memory = policy.act(images, PROPRIO[t], pair, np.full(2, t == 0), memory)
        actions.append(action)
    return np.array(actions)


@pytest.mark.parametrize("bridge", [("film",), ("perceiver",), ("projector", "mixer")])
def test_the_past_is_seen_under_the_new_instruction(bridge: tuple[str, ...]) -> None:
    policy = make(bridge)
    changed = act(policy, [[A, A]] * 3 + [[B, A]] * 2)
    always_a, always_b = act(policy, [[A, A]] * STEPS), act(policy, [[B, B]] * STEPS)
    np.testing.assert_array_equal(changed[:3], always_a[:3])
    np.testing.assert_allclose(changed[3:, 0], always_b[3:, 0], atol=1e-5)
    np.testing.assert_allclose(changed[3:, 1], always_a[3:, 1], atol=1e-5)
    assert abs(always_a[3:, 0] - always_b[3:, 0]).max() > 1e-3  # else the test shows nothing


def test_the_rest_of_a_chunk_is_dropped() -> None:
    for more in ({}, {"ensembling": 0.1}):
        policy = make(("perceiver",), chunk=4, **more)
        changed, always_b = act(policy, [[A, A]] + [[B, A]]), act(policy, [[B, B]] * 2)
        kept = act(policy, [[A, A]] * 2)
        expected = act_from_now(policy)
        np.testing.assert_allclose(changed[1, 0], expected, atol=1e-5)
        assert abs(changed[1, 0] - always_b[1, 0]).max() > 1e-5  # that plan is one step older
        np.testing.assert_allclose(changed[1, 1], kept[1, 1], atol=1e-5)


def act_from_now(policy: Policy) -> np.ndarray:
    """Returns the first action of the chunk decided at the second step under B, of the first episode."""
    memory = policy.start(2)
    images = [{"front": FRAMES[t], "wrist": FRAMES[t, ::-1]} for t in (0, 1)]
    _, memory = policy.act(images[0], PROPRIO[0], [B, B], np.full(2, True), memory)
    steps = memory.steps.replace(plan=policy.start(2).steps.plan)
    memory = dataclasses.replace(memory, steps=steps)
    action, _ = policy.act(images[1], PROPRIO[1], [B, B], np.full(2, False), memory)
    return action[0]
