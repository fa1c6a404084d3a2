"""A policy's network: a multimodal language model, and an action space adapter for each embodiment, put together.

An embodiment is a body with its actions: an environment's robot. One model may serve several, each through an adapter
of its own. A ``Description`` says in plain JSON what a network is made of, and ``build`` makes it from that: the
description is in every checkpoint, so that acting needs no config file, and no preset either, which may change.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from ml_collections.config_dict import ConfigDict

from mllm_act.action_tokenizer import kinds
from mllm_act.action_tokenizer.fast import FastTokenizer
from mllm_act.adapters import (
    Adapter,
    Categorical,
    Fast,
    Language,
    Regression,
    Uniform,
    VectorQuantized,
)
from mllm_act.batch import Batch, Observation
from mllm_act.errors import UserError, nearest
from mllm_act.models.language import LanguageConfig
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLM, MLLMConfig, Reading
from mllm_act.models.presets import Rules
from mllm_act.normalization import Statistics

CONTINUOUS = ("regression", "uniform", "vq", "rvq", "fast")
DISCRETE = ("categorical", "semlang", "lang")
ADAPTERS = CONTINUOUS + DISCRETE
TOKENIZED = ("vq", "rvq", "fast")  # those that need a tokenizer of stage one


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """What one embodiment adds to the model.

    Attributes:
      adapter: one of ``ADAPTERS``.
      cameras: whose images the model sees of it, in alphabetical order.
      context: T, the steps of a window.
      chunk: H, how many actions one decision holds.
      hidden: width of the MLP of ``regression`` and ``categorical``.
      bins: the uniform adapter's bins a dimension.
      tokenizer: the sizes of the tokenizer of an adapter in ``TOKENIZED``; None for the others.
      actions: the names of discrete actions, in the environment's order.
      sequences: the token ids of each of them for ``semlang`` and ``lang``.
      end: the token that fills shorter sequences up.
    """

    adapter: str
    cameras: tuple[str, ...]
    context: int
    chunk: int
    hidden: int
    bins: int
    tokenizer: dict[str, Any] | None
    actions: tuple[str, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()
    end: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Embodiment":
        """Makes an embodiment from its JSON form, which ``dataclasses.asdict`` gives."""
        texts = {key: tuple(values[key]) for key in ("cameras", "actions")}
        return cls(**{**values, **texts, "sequences": tuple(map(tuple, values["sequences"]))})


@dataclasses.dataclass(frozen=True)
class Description:
    """What a network is made of.

    Attributes:
      preset: the name that ``model`` and ``trained`` came from; for information.
      model: all sizes of the model, its history.
      trained: which parameters are trained; see ``training.rules``.
      embodiments: by the name of their environment.
    """

    preset: str
    model: MLLMConfig
    trained: Rules
    embodiments: Mapping[str, Embodiment]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Description":
        """Makes a description from its JSON form, which ``dataclasses.asdict`` gives.

        Raises:
          UserError: if it is another version's.
        """
        try:
            model = MLLMConfig.from_dict(values["model"])
            trained = tuple((str(pattern), bool(moves)) for pattern, moves in values["trained"])
            bodies = {
                name: Embodiment.from_dict(one) for name, one in values["embodiments"].items()
            }
            return cls(**{**values, "model": model, "trained": trained, "embodiments": bodies})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"network: expected the description of a network as this version of mllm_act writes it, found another "
                f"({error}); train the policy anew, or use the version that its meta names (provenance)"
            ) from error


def configure(model: MLLMConfig, config: ConfigDict) -> MLLMConfig:
    """Puts what a training config says of the model into a preset's sizes; what it leaves open stays the preset's.

    Args:
      model: the preset's.
      config: ``history``, ``bridge``, ``weight_dtype``, ``remat``, and ``lora`` with ``targets``, ``rank``,
        ``alpha`` and ``dropout``; text that is empty and numbers that are None leave things open.

    Raises:
      UserError: if LoRA's numbers cannot be. The model itself looks at choices and patterns.
    """
    set_here = {key: config[key] for key in ("weight_dtype", "remat") if config[key]}
    if config.bridge:
        set_here["bridge"] = tuple(part.strip() for part in config.bridge.split(","))
    model = dataclasses.replace(model, history=config.history, **set_here)
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
    """Everything that has parameters: one model, and the adapter of each embodiment by name."""

    def __init__(self, mllm: MLLM, adapters: Mapping[str, Adapter]) -> None:
        self.mllm, self.adapters = mllm, nnx.Dict(adapters)

    def embodied(self, name: str) -> "Embodied":
        """Returns the model with one embodiment's adapter."""
        return Embodied(self.mllm, self.adapters[name])


@dataclasses.dataclass(frozen=True)
class Embodied:
    """Observations to actions, for one embodiment."""

    mllm: MLLM
    adapter: Adapter

    def loss(
        self, batch: Batch, key: PRNGKeyArray | None = None, padded_parts: int | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the adapter's loss over every step of the windows in one pass.

        Args:
          batch: of windows.
          key: turns dropout on.
          padded_parts: for batches that are mostly padding, whose pictures are then not encoded: into how many equal
            parts the devices split them.
        """
        seen, adapter = batch.observation, self._with_rows()
        tokens = jax.lax.stop_gradient(adapter.encode(batch.action))
        # The last token is fed back only if later steps see it.
        past_is_seen = self.mllm.config.history == "observations_and_actions"
        fed = adapter.embed(tokens)[..., : adapter.tokens_per_action - (not past_is_seen), :]
        latents = self.latents(seen, padded_parts, key)
        hidden = self.mllm(seen.prompt, seen.prompt_mask, latents, seen.mask, fed, key=key)
        hidden = hidden[..., : adapter.tokens_per_action, :]
        return adapter.loss(
            hidden, tokens, seen.mask, adapter.statistics.normalize_proprio(seen.proprio)
        )

    def latents(
        self,
        seen: Observation,
        padded_parts: int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T L D"]:
        """Encodes the pictures; the other arguments as in ``loss``."""
        key = None if key is None else jax.random.fold_in(key, 1)  # another than dropout's
        instruction = self.mllm.instruction(seen.prompt, seen.prompt_mask, key)
        if padded_parts is None:
            return self.mllm.latents(seen.images, instruction)
        return self.mllm.latents(seen.images, instruction, seen.mask, padded_parts)

    def act(
        self,
        reading: Reading,
        latents: Float[Array, "B T L D"],
        step_mask: Bool[Array, "B T"],
        proprio: Float[Array, "B P"],
        past: Array,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """Decodes the newest step's action tokens.

        Args:
          reading: of the prompts, from ``mllm.read``.
          latents: of the steps so far, at most T.
          step_mask: which steps exist; they come first.
          proprio: of the newest step, in the environment's own numbers.
          past: action tokens of the steps so far [B, T, ...]; the newest step's are not read.
          key: draws from the distribution; without it decoding is greedy.

        Returns:
          The tokens; ``adapter.decode`` makes the action of them.
        """
        adapter = self._with_rows()
        fed = adapter.embed(past)
        if self.mllm.config.history == "observations":
            fed = fed[..., :0, :]
        hidden, state = self.mllm.prefill(reading, latents, step_mask, fed)
        proprio = adapter.statistics.normalize_proprio(proprio)
        return adapter.sample(hidden, proprio, self.mllm.extend, state, key)

    def _with_rows(self) -> Adapter:
        language = self.mllm.language
        head = language.embedding if language.head is None else language.head
        return self.adapter.with_rows(language.embedding[...], head[...])


def build(
    description: Description, statistics: Mapping[str, Statistics], rngs: nnx.Rngs
) -> PolicyNetwork:
    """Makes a network with fresh parameters; under ``nnx.eval_shape`` with abstract ones.

    Args:
      description: what of.
      statistics: each embodiment's, of single actions.
      rngs: the source of random parameters.

    Raises:
      UserError: if the adapter or a choice of the model does not exist, or the adapter cannot be made of what it is
        given.
    """
    mllm = MLLM(description.model, rngs)
    adapters = {}
    for name, embodiment in description.embodiments.items():
        if embodiment.chunk > 1 and description.model.history != "observations":
            raise UserError(
                f"config.history: expected observations with chunks of {embodiment.chunk} actions, found "
                f"{description.model.history!r}: a step that carries on with a chunk decides nothing later ones could "
                "see; set one of the two back"
            )
        language = description.model.language
        rows = language.vocabulary - language.action_tokens
        adapter = _adapter(embodiment, language, statistics[name].chunked(embodiment.chunk), rngs)
        if adapter.codes > rows:
            raise UserError(
                f"adapter: expected at most {rows} codes, the reserved rows of preset {description.preset!r}, found "
                f"{adapter.codes}"
            )
        adapters[name] = adapter
    return PolicyNetwork(mllm, adapters)


def _adapter(
    embodiment: Embodiment, language: LanguageConfig, statistics: Statistics, rngs: nnx.Rngs
) -> Adapter:
    kind, width, first = embodiment.adapter, language.width, language.action_tokens
    if kind == "regression":
        proprio = len(statistics.proprio.mean)
        return Regression(statistics, width, proprio, embodiment.hidden, rngs)
    if kind == "uniform":
        return Uniform(statistics, width, first, embodiment.bins, rngs)
    if kind in TOKENIZED:
        assert embodiment.tokenizer is not None
        tokenizer = kinds.make(embodiment.tokenizer, rngs)
        if isinstance(tokenizer, FastTokenizer):
            return Fast(statistics, width, first, tokenizer, rngs)
        return VectorQuantized(statistics, width, first, tokenizer, rngs)
    if kind == "categorical":
        return Categorical(statistics, embodiment.actions, width, embodiment.hidden, rngs)
    if kind in ("semlang", "lang"):
        words = embodiment.sequences, embodiment.end, language.vocabulary
        return Language(statistics, embodiment.actions, *words)
    raise UserError(
        f"adapter: expected one of {', '.join(ADAPTERS)}, found {kind!r}; {nearest(kind, ADAPTERS)}"
    )


def longest_prompt(model: MLLMConfig, embodiment: Embodiment, tokens_per_action: int) -> int:
    """Returns how many tokens a prompt may have, so that the steps after it fit the model's positions."""
    step = model.latents_per_image * len(embodiment.cameras) + tokens_per_action
    return model.language.max_positions - embodiment.context * step


def empty_tokens(adapter: Adapter, batch: int, steps: int) -> Array:
    """Returns tokens [B, T, ...] of no particular action, of the right shape and dtype for a history."""
    actions = len(adapter.statistics.action.min)
    return adapter.encode(jnp.zeros((batch, steps, actions)))
