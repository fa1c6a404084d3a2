"""A policy's network: a multimodal language model, and an action space adapter for each embodiment.

An embodiment is a robot with its actions: that of one environment. One model may serve several, each through its own
adapter. A ``NetworkConfig`` says in plain JSON what a network is made of, and ``build_network`` makes it. Every
checkpoint contains one, so that acting needs neither a config file nor a preset, which may change.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from ml_collections.config_dict import ConfigDict

from mllm_act import placement
from mllm_act.adapters import adapter_class
from mllm_act.adapters.base import Adapter, Vocabulary
from mllm_act.adapters.token_filter import Keys
from mllm_act.batch import Batch, Observation
from mllm_act.errors import UserError
from mllm_act.models.mllm import MLLM, MLLMConfig, Reading
from mllm_act.models.presets import PRESETS, Rules
from mllm_act.normalization import Statistics

FORMAT = 3  # of a checkpoint's JSON; 1 was that of mllm_act 0.1.0, 2 had no normalisation
NOISE = 2**32 - 1  # the key of a bridge's noise is this part of an update's
DELAY = 2**32 - 3  # that of the delays; 2**32 - 2 is taken by augmentation


@dataclasses.dataclass(frozen=True)
class EmbodimentConfig:
    """What one embodiment adds to the model.

    Attributes:
      adapter: a name in ``ADAPTERS``.
      adapter_config: an instance of that adapter's ``Config``.
      cameras: the cameras whose images the model sees, in alphabetical order.
      context: T, the steps of a window.
      chunk: H, the number of actions per decision.
      max_delay: how many of them may be committed before it; see ``Adapter.take_prefix``.
    """

    adapter: str
    adapter_config: Any
    cameras: tuple[str, ...]
    context: int
    chunk: int
    max_delay: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EmbodimentConfig":
        """Makes one from its JSON form, which ``dataclasses.asdict`` returns."""
        settings = {name: _tuples(value) for name, value in values["adapter_config"].items()}
        adapter = adapter_class(values["adapter"])
        return cls(
            **{
                **values,
                "adapter_config": adapter.Config(**settings),
                "cameras": tuple(values["cameras"]),
            }
        )


def _tuples(value: Any) -> Any:
    """Turns the lists of JSON back into tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """What a network is made of.

    Attributes:
      preset: the name that ``model`` and ``trained`` came from; for information.
      model: all sizes of the model, and its history.
      trained: which parameters are trained; see ``mllm_act.parameters``.
      embodiments: by the name of their environment.
      format: of this description, ``FORMAT``.
    """

    preset: str
    model: MLLMConfig
    trained: Rules
    embodiments: Mapping[str, EmbodimentConfig]
    format: int = FORMAT

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NetworkConfig":
        """Makes one from its JSON form, which ``dataclasses.asdict`` returns.

        Raises:
          UserError: if it was written by another version.
        """
        try:
            model = MLLMConfig.from_dict(values["model"])
            trained = tuple((str(pattern), bool(moves)) for pattern, moves in values["trained"])
            embodiments = {
                name: EmbodimentConfig.from_dict(part)
                for name, part in values["embodiments"].items()
            }
            return cls(**{**values, "model": model, "trained": trained, "embodiments": embodiments})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"network: expected the description of a network in the format of this version of mllm_act, found "
                f"another ({error}); train the policy again, or use the version named in its meta (provenance)"
            ) from error


def override_model(model: MLLMConfig, config: ConfigDict) -> MLLMConfig:
    """Overrides preset sizes with config values; what the config leaves open stays as in the preset.

    Args:
      model: the preset's.
      config: ``history``, ``fit``, ``bridge``, ``weight_dtype``, ``remat``, and ``lora`` with ``targets``, ``rank``,
        ``alpha`` and ``dropout``; empty text and None leave a value open.

    Raises:
      UserError: if there are LoRA settings for a preset without LoRA. The model itself checks choices and patterns.
    """
    overrides = {key: config[key] for key in ("weight_dtype", "remat") if config[key]}
    if config.bridge:
        overrides["bridge"] = tuple(part.strip() for part in config.bridge.split(","))
    model = dataclasses.replace(model, history=config.history, fit=config.fit, **overrides)
    lora = {key: value for key, value in config.lora.items() if value not in (None, "")}
    if not lora:
        return model
    if model.language.lora is None:
        key, value = next(iter(lora.items()))
        known = [name for name, preset in PRESETS.items() if preset.model.language.lora is not None]
        raise UserError(
            f"config.lora.{key}: expected no LoRA settings for the preset {config.preset!r}, which has no LoRA, found "
            f"{value!r}; leave it out, or take one of {', '.join(known)}"
        )
    changed = dataclasses.replace(model.language.lora, **lora)
    return dataclasses.replace(model, language=dataclasses.replace(model.language, lora=changed))


@no_type_check  # JAX rebuilds it with shapes in place of arrays
@struct.dataclass
class Prefix:
    """The first actions of each of B chunks, already committed, in their units. What follows them is not read."""

    actions: Float[Array, "B HA"]
    count: Int[Array, " B"]


class PolicyNetwork(nnx.Module):
    """Everything that has parameters: one model, and the adapter of each embodiment by name."""

    def __init__(self, mllm: MLLM, adapters: Mapping[str, Adapter]) -> None:
        self.mllm, self.adapters = mllm, nnx.Dict(adapters)

    def loss(
        self,
        name: str,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        skip_padding: int | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the adapter's loss over every step of the windows, in one pass, and its metrics.

        Args:
          name: the embodiment.
          batch: of windows.
          key: turns dropout on, and draws delays where some actions may be committed.
          skip_padding: for batches that are mostly padding, whose images are then not encoded: the number of equal
            shards that the devices split the batch into.
        """
        observation = batch.observation
        tokens = jax.lax.stop_gradient(self.adapters[name].encode(batch.action))
        adapter, hidden = self.hidden(name, observation, tokens, key, skip_padding)
        proprio = adapter.statistics.normalize_proprio(observation.proprio)
        if key is None or not adapter.max_delay:
            return adapter.loss(hidden, tokens, observation.mask, proprio)
        key = jax.random.fold_in(key, DELAY)
        delay = jax.random.randint(key, observation.mask.shape, 0, adapter.max_delay + 1)
        committed = adapter.committed(delay)
        return adapter.loss_after(hidden, tokens, observation.mask, proprio, committed)

    def hidden(
        self,
        name: str,
        observation: Observation,
        tokens: Array,
        key: PRNGKeyArray | None = None,
        skip_padding: int | None = None,
    ) -> tuple[Adapter, Float[Array, "B T M D"]]:
        """Returns the hidden states that predict each action token, in one pass, and the adapter to read them with.

        Args:
          name: the embodiment.
          observation: of windows.
          tokens: of the action at each step, [B, T, ...].
          key: see ``loss``.
          skip_padding: see ``loss``.
        """
        adapter = self.adapter(name)
        # The last token is fed back only if later steps see it.
        actions_are_seen = self.mllm.config.history == "observations_and_actions"
        fed = adapter.embed(tokens)[..., : adapter.tokens_per_action - (not actions_are_seen), :]
        latents = self.latents(observation, skip_padding, key)
        hidden = self.mllm(
            observation.prompt, observation.prompt_mask, latents, observation.mask, fed, key=key
        )
        return adapter, hidden[..., : adapter.tokens_per_action, :]

    def latents(
        self,
        observation: Observation,
        skip_padding: int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T L D"]:
        """Encodes the images; the other arguments as in ``loss``."""
        # Dropout's keys are split(key, layers), which equal fold_in(key, layer): no layer has this number.
        key = None if key is None else jax.random.fold_in(key, NOISE)
        instruction = self.mllm.instruction(observation.prompt, observation.prompt_mask, key)
        if skip_padding is None:
            return self.mllm.latents(observation.images, instruction)
        return self.mllm.latents(observation.images, instruction, observation.mask, skip_padding)

    def act(
        self,
        name: str,
        reading: Reading,
        latents: Float[Array, "B T L D"],
        step_mask: Bool[Array, "B T"],
        proprio: Float[Array, "B P"],
        past: Array,
        key: Keys | None = None,
        prefix: Prefix | None = None,
    ) -> Array:
        """Decodes the action tokens of the newest step.

        Args:
          name: the embodiment.
          reading: of the prompts, from ``mllm.read``.
          latents: of the steps so far, at most T.
          step_mask: which steps exist; those that do come first.
          proprio: of the newest step, in the environment's units.
          past: action tokens of the steps so far [B, T, ...]; those of the newest step are not read.
          key: draws from the distribution, with one for the batch or one per row; without it decoding is greedy.
          prefix: the chunk's committed actions, where the adapter takes some.

        Returns:
          The tokens; ``adapters[name].decode`` turns them into the action.
        """
        adapter = self.adapter(name)
        fed = adapter.embed(past)
        if self.mllm.config.history == "observations":
            fed = fed[..., :0, :]
        hidden, state = self.mllm.prefill(reading, latents, step_mask, fed)
        proprio = adapter.statistics.normalize_proprio(proprio)
        if prefix is None:
            return adapter.sample(hidden, proprio, self.mllm.extend, state, key)
        given, committed = adapter.encode(prefix.actions), adapter.committed(prefix.count)
        return adapter.sample_after(hidden, proprio, self.mllm.extend, state, key, given, committed)

    def adapter(self, name: str) -> Adapter:
        """Returns the adapter of an embodiment, with the language model's tables for one computation."""
        language = self.mllm.language
        embedding = placement.gathered(language.embedding[...], "language/embedding")
        head = embedding
        if language.head is not None:
            head = placement.gathered(language.head[...], "language/head")
        return self.adapters[name].with_rows(embedding, head)


def build_network(
    config: NetworkConfig, statistics: Mapping[str, Statistics], rngs: nnx.Rngs
) -> PolicyNetwork:
    """Makes a network with fresh parameters; under ``nnx.eval_shape`` with abstract ones.

    Args:
      config: what it is made of.
      statistics: of each embodiment, of single actions.
      rngs: the source of random parameters.

    Raises:
      UserError: if a choice of the model does not exist, or an adapter cannot be made from its config.
    """
    mllm = MLLM(config.model, rngs)
    adapters = {
        name: build_adapter(part, config.model, statistics[name], rngs)
        for name, part in config.embodiments.items()
    }
    return PolicyNetwork(mllm, adapters)


def build_adapter(
    config: EmbodimentConfig, model: MLLMConfig, statistics: Statistics, rngs: nnx.Rngs
) -> Adapter:
    """Makes the adapter of one embodiment; see ``build_network``."""
    if config.chunk > 1 and model.history != "observations":
        raise UserError(
            f"config.history: expected observations with chunks of {config.chunk} actions, found {model.history!r}: "
            "a step that continues a chunk decides nothing that later steps could see; change one of the two"
        )
    language = model.language
    vocabulary = Vocabulary(language.vocabulary, language.width, language.action_tokens)
    adapter = adapter_class(config.adapter).make(
        config.adapter_config, statistics.chunked(config.chunk), vocabulary, rngs
    )
    if config.max_delay:
        if not 0 < config.max_delay < config.chunk:
            raise UserError(
                f"config.max_delay: expected 0 to {config.chunk - 1}, less than the {config.chunk} actions of a chunk, "
                f"found {config.max_delay}; lower it, or raise config.chunk"
            )
        adapter.take_prefix(config.chunk, config.max_delay, rngs)
    return adapter


def longest_prompt(model: MLLMConfig, embodiment: EmbodimentConfig, tokens_per_action: int) -> int:
    """Returns how many tokens a prompt may have, so that the steps after it fit the model's positions."""
    step = model.latents_per_image * len(embodiment.cameras) + tokens_per_action
    return model.language.max_positions - embodiment.context * step


def empty_tokens(adapter: Adapter, batch: int, steps: int) -> Array:
    """Returns tokens [B, T, ...] of an arbitrary action, of the right shape and dtype for a history."""
    actions = len(adapter.statistics.action.min)
    return adapter.encode(jnp.zeros((batch, steps, actions)))
