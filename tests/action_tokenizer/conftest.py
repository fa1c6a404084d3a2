"""A small tokenizer with codebooks fitted to random actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act.action_tokenizer import quantizer
from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.normalization import Moments, Statistics


def statistics(bound: float = 1.0) -> Statistics:
    four = {name: (0.0,) * 4 for name in ("mean", "std", "q01", "q99")}
    moments = Moments(**four, min=(-bound,) * 4, max=(bound,) * 4, two_valued=(False,) * 4)
    return Statistics(moments, moments, 1, 1, 1, "train", "0", ("reach-v3",), ("reach",))


@pytest.fixture(scope="module")
def model() -> ActionTokenizer:
    model = ActionTokenizer(TokenizerConfig(4, codes=16, width=8, hidden=16), rngs=nnx.Rngs(0))
    latents = model.encoder(jnp.array(some_actions()))
    model.set_quantizer_state(quantizer.initialise(jax.random.key(0), latents, 2, 16, 64))
    return model


def some_actions() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (200, 4)).astype(np.float32)
