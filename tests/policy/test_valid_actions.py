"""Temporal ensembling averages chunks; what is executed is still an action that the demonstrations support."""

import numpy as np
from flax import nnx

from mllm_act.adapters.regression import Regression, RegressionConfig
from mllm_act.models.language import LanguageConfig
from mllm_act.models.vision import VisionConfig
from mllm_act.normalization import Moments, Statistics
from mllm_act.policy import Policy
from mllm_act.policy.network import EmbodimentConfig, PolicyNetwork
from mllm_act.policy.prompt import Prompt, train_text_tokenizer
from tests.models import tiny

# A constant, a gripper, and an ordinary dimension.
LOW, HIGH, CHUNK = (0.2, -1.0, -3.0), (0.2, 1.0, 5.0), 3


def test_averaged_actions_are_valid() -> None:
    zeros, ones = (0.0,) * 3, (1.0,) * 3
    moments = Moments(zeros, ones, LOW, HIGH, LOW, HIGH, two_valued=(False, True, False))
    proprio = Moments((0.0,), (0.01,), (-1.0,), (1.0,), (-1.0,), (1.0,), two_valued=(False,))
    of_actions = Statistics(moments, proprio, 9, 1, 1, "train", "", ("t",), ("i",))
    adapter = Regression(of_actions.chunked(CHUNK), tiny.D, 1, 16, nnx.Rngs(2))
    model = tiny.mllm(
        vision=VisionConfig(image_size=12, patch_size=4, width=8, layers=1, heads=1, mlp_width=8),
        language=LanguageConfig(
            vocabulary=272, action_tokens=256, width=tiny.D, layers=1, heads=2, kv_heads=1, mlp_width=16
        ),
    )  # fmt: skip
    embodiment = EmbodimentConfig("regression", RegressionConfig(16), ("top",), 2, CHUNK)
    prompt = Prompt("{instruction}", train_text_tokenizer([], 256), 4)
    network = PolicyNetwork(model, {"arm": adapter})
    policy = Policy(network, "arm", embodiment, prompt, meta={}, ensembling=0.01)

    rng, memory, actions = np.random.default_rng(0), policy.start(batch=4), []
    for step in range(8):
        images = {"top": rng.integers(0, 256, (4, 12, 12, 3), np.uint8)}
        first = np.full(4, step == 0)
        proprioception = rng.normal(size=(4, 1)).astype(np.float32)  # predictions follow it
        action, memory = policy.act(images, proprioception, ["go"] * 4, first, memory)
        actions.append(action)
    found = np.concatenate(actions)
    np.testing.assert_array_equal(found[:, 0], np.float32(0.2))
    assert set(found[:, 1]) == {-1, 1}
    assert ((found[:, 2] >= -3) & (found[:, 2] <= 5)).all() and len(set(found[:, 2])) > 8
