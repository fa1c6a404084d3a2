"""A policy's network: a multimodal language model and an action space adapter, put together.

A ``Description`` says in plain JSON what a network is made of, and ``build`` makes it from that: the description is in
every checkpoint, so that acting needs no config file, and no preset either, which may change.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from ml_collections.config_dict import ConfigDict

from mllm_act.adapters import Adapter, Regression, Uniform, VectorQuantized
from mllm_act.batch import Batch
from mllm_act.errors import UserError, nearest
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.models.presets import Rules
from mllm_act.normalization import Statistics
from mllm_act.tokenizer.autoencoder import ActionTokenizer, TokenizerConfig

ADAPTERS = ("regression", "uniform", "vq", "rvq")


@dataclasses.dataclass(frozen=True)
class Description:
    """What a network is made of.

    Attributes:
      preset: the name that ``model`` and ``trained`` came from; for information.
      model: all sizes of the model, the cameras it sees, its history.
      trained: which parameters are trained; see ``training.rules``.
      adapter: one of ``ADAPTERS``.
      context: T, the steps of a window.
      hidden: width of the regression adapter's MLP.
      bins: the uniform adapter's bins a dimension.
      tokenizer: the sizes of the VQ adapters' tokenizer; None for the others.
    """

    preset: str
    model: MLLMConfig
    trained: Rules
    adapter: str
    context: int
    hidden: int
    bins: int
    tokenizer: dict[str, Any] | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Description":
        """Makes a description from its JSON form, which ``dataclasses.asdict`` gives.

        Raises:
          UserError: if it is another version's.
        """
        try:
            model = MLLMConfig.from_dict(values["model"])
            trained = tuple((str(pattern), bool(moves)) for pattern, moves in values["trained"])
            return cls(**{**values, "model": model, "trained": trained})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"network: expected the description of a network as this version of mllm_act writes it, found another "
                f"({error}); train the policy anew, or use the version that its meta names (provenance)"
            ) from error


def configure(model: MLLMConfig, config: ConfigDict, cameras: tuple[str, ...]) -> MLLMConfig:
    """Puts what a training config says of the model into a preset's sizes; what it leaves open stays the preset's.

    Args:
      model: the preset's.
      config: ``history``, ``bridge``, ``weights``, ``remat``, and ``lora`` with ``targets``, ``rank``, ``alpha`` and
        ``dropout``; text that is empty and numbers that are None leave things open.
      cameras: those of the data set.

    Raises:
      UserError: if LoRA's numbers cannot be. The model itself looks at choices and patterns.
    """
    set_here = {key: config[key] for key in ("weights", "remat") if config[key]}
    if config.bridge:
        set_here["bridge"] = tuple(part.strip() for part in config.bridge.split(","))
    model = dataclasses.replace(model, cameras=cameras, history=config.history, **set_here)
    lora = {key: value for key, value in config.lora.items() if value not in (None, "")}
    if not lora:
        return model
    return dataclasses.replace(
        model,
        language=dataclasses.replace(
            model.language,
            lora=_checked(dataclasses.replace(model.language.lora or LoRA(), **lora)),
        ),
    )


def _checked(lora: LoRA) -> LoRA:
    """Raises UserError if LoRA's numbers cannot be; the model looks at the pattern."""
    if lora.rank < 1:
        raise UserError(f"config.lora.rank: expected at least 1, found {lora.rank}")
    if not 0 < lora.alpha < math.inf:
        raise UserError(f"config.lora.alpha: expected a positive number, found {lora.alpha}")
    if not 0 <= lora.dropout < 1:
        raise UserError(
            f"config.lora.dropout: expected at least 0 and below 1, found {lora.dropout}"
        )
    return lora


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


def build(description: Description, statistics: Statistics, rngs: nnx.Rngs) -> PolicyNetwork:
    """Makes a network with fresh parameters; under ``nnx.eval_shape`` with abstract ones.

    Raises:
      UserError: if the adapter or a choice of the model does not exist.
    """
    mllm = MLLM(description.model, rngs)
    first_token = description.model.language.action_tokens
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
    rows = description.model.language.vocabulary - first_token
    if adapter.codes > rows:
        raise UserError(
            f"adapter: expected at most {rows} codes, the reserved rows of preset {description.preset!r}, found "
            f"{adapter.codes}"
        )
    return PolicyNetwork(mllm, adapter)


def longest_prompt(network: PolicyNetwork, context: int) -> int:
    """Returns how many tokens a prompt may have, so that ``context`` steps after it fit the model's positions."""
    model = network.mllm.config
    step = model.latents_per_image * len(model.cameras) + network.adapter.tokens_per_action
    return model.language.context - context * step


def empty_tokens(adapter: Adapter, batch: int, steps: int) -> Array:
    """Returns tokens [B, T, ...] of no particular action, of the right shape and dtype for a history."""
    actions = len(adapter.statistics.action.min)
    return adapter.encode(jnp.zeros((batch, steps, actions)))
