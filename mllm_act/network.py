"""A policy's network: a multimodal language model and an action space adapter, put together.

``describe`` says in plain JSON what a network is made of, and ``build`` makes it from that: the description is in
every checkpoint, so that acting needs no config file.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mllm_act.adapters import Adapter, Regression, Uniform, VectorQuantized
from mllm_act.batch import Batch
from mllm_act.errors import UserError, nearest
from mllm_act.models import presets
from mllm_act.models.mllm import HISTORIES, MLLM
from mllm_act.normalization import Statistics
from mllm_act.tokenizer.autoencoder import ActionTokenizer, TokenizerConfig

ADAPTERS = ("regression", "uniform", "vq", "rvq")


@dataclasses.dataclass(frozen=True)
class Description:
    """What a network is made of.

    Attributes:
      preset: the model's name in ``models.presets``.
      adapter: one of ``ADAPTERS``.
      cameras: whose images the model sees, in this order.
      history: see ``models.mllm``.
      context: T, the steps of a window.
      hidden: width of the regression adapter's MLP.
      bins: the uniform adapter's bins a dimension.
      tokenizer: the sizes of the VQ adapters' tokenizer; None for the others.
    """

    preset: str
    adapter: str
    cameras: tuple[str, ...]
    history: str
    context: int
    hidden: int
    bins: int
    tokenizer: dict[str, Any] | None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Description":
        """Makes a description from its JSON form."""
        return cls(**{**values, "cameras": tuple(values["cameras"])})


class PolicyNetwork(nnx.Module):
    """Observations to actions; everything that has parameters."""

    def __init__(self, mllm: MLLM, adapter: Adapter) -> None:
        self.mllm, self.adapter = mllm, adapter

    @property
    def _fed(self) -> int:
        """F, how many of an action's tokens are fed back in training; the last one only if later steps see it."""
        tokens = self.adapter.tokens_per_action
        return tokens - 1 if self.mllm.config.history == "observations" else tokens

    def loss(
        self, batch: Batch, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the adapter's loss over every step of the windows in one pass; ``key`` turns dropout on."""
        seen, adapter = batch.observation, self.adapter
        tokens = jax.lax.stop_gradient(adapter.encode(batch.action))
        fed = adapter.embed(tokens)[..., : self._fed, :]
        latents = self.mllm.latents(seen.images)
        hidden = self.mllm(seen.prompt, seen.prompt_mask, latents, seen.mask, fed, key=key)
        hidden = hidden[..., : adapter.tokens_per_action, :]
        return adapter.loss(
            hidden, tokens, seen.mask, adapter.statistics.normalize_proprio(seen.proprio)
        )

    def act(
        self,
        prompt: Int[Array, "B N"],
        prompt_mask: Bool[Array, "B N"],
        latents: Float[Array, "B T L D"],
        step_mask: Bool[Array, "B T"],
        proprio: Float[Array, "B P"],
        past: Array,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """Decodes the newest step's action tokens.

        Args:
          prompt: token ids.
          prompt_mask: which of them exist.
          latents: of the steps so far, at most T.
          step_mask: which steps exist; they come first.
          proprio: of the newest step, in the environment's own numbers.
          past: action tokens of the steps so far [B, T, ...]; the newest step's are not read.
          key: draws from the distribution; without it decoding is greedy.

        Returns:
          The tokens; ``adapter.decode`` makes the action of them.
        """
        fed = self.adapter.embed(past)
        if self.mllm.config.history == "observations":
            fed = fed[..., :0, :]
        hidden, state = self.mllm.prefill(prompt, prompt_mask, latents, step_mask, fed)
        proprio = self.adapter.statistics.normalize_proprio(proprio)
        return self.adapter.sample(hidden, proprio, self.mllm.extend, state, key)


def build(
    description: Description, statistics: Statistics, rngs: nnx.Rngs
) -> tuple[PolicyNetwork, presets.Preset]:
    """Makes a network with fresh parameters, and returns its preset beside it.

    Raises:
      UserError: if the preset or the adapter does not exist.
    """
    if description.history not in HISTORIES:
        raise UserError(
            f"history: expected one of {', '.join(HISTORIES)}, found {description.history!r}"
        )
    preset = presets.get(description.preset, description.cameras, description.history)
    mllm = MLLM(preset.model, rngs)
    first_token = preset.model.language.action_tokens
    adapter: Adapter
    if description.adapter == "regression":
        adapter = Regression(
            statistics, mllm.width, len(statistics.proprio.mean), description.hidden, rngs
        )
    elif description.adapter == "uniform":
        adapter = Uniform(statistics, mllm.width, first_token, description.bins, rngs)
    elif description.adapter in ("vq", "rvq"):
        assert description.tokenizer is not None
        tokenizer = ActionTokenizer(TokenizerConfig(**description.tokenizer), rngs=rngs)
        adapter = VectorQuantized(statistics, mllm.width, first_token, tokenizer, rngs)
    else:
        raise UserError(
            f"adapter: expected one of {', '.join(ADAPTERS)}, found {description.adapter!r}; "
            + nearest(description.adapter, ADAPTERS)
        )
    rows = preset.model.language.vocabulary - first_token
    codes = getattr(adapter, "codes", 0)
    if codes > rows:
        raise UserError(
            f"adapter: expected at most {rows} codes, the reserved rows of preset {description.preset!r}, found {codes}"
        )
    return PolicyNetwork(mllm, adapter), preset


def empty_tokens(adapter: Adapter, batch: int, steps: int) -> Array:
    """Returns tokens [B, T, ...] of no particular action, of the right shape and dtype for a history."""
    actions = len(adapter.statistics.action.min)
    return adapter.encode(jnp.zeros((batch, steps, actions)))
