"""The multimodal language model: prompt, images and action tokens in; the hidden states that predict actions out.

The sequence is the prompt, then for every step t the latents of each camera's image, then that step's action tokens:

    prompt | latents_0 actions_0 | latents_1 actions_1 | ...

``history`` decides what a step may know of earlier ones. With ``observations`` (the paper's reading) action tokens
are seen by their own step alone and take up no positions in the steps after them, so one pass over T steps equals T
separate passes. With ``observations_and_actions`` later steps see them too.

The hidden state that predicts a step's first token is that of its last latent; the one that predicts the next token
is that of the token before it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from mllm_act.batch import Images
from mllm_act.errors import UserError
from mllm_act.models.acting import kernels
from mllm_act.models.bridge.bridge import Bridge
from mllm_act.models.bridge.film import FilmConfig
from mllm_act.models.bridge.mixer import MixerConfig
from mllm_act.models.bridge.perceiver import PerceiverConfig
from mllm_act.models.language import Cache, LanguageConfig, LanguageModel
from mllm_act.models.layers import MULTIPLE, REMAT, WEIGHT_DTYPES, LoRA
from mllm_act.models.skip_padding import skip_padding
from mllm_act.models.vision import VisionConfig, VisionTransformer

HISTORIES = ("observations", "observations_and_actions")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class MLLMConfig:
    """All sizes of the model.

    Attributes:
      bridge: the parts between vision and language in their order; see ``models.bridge``.
      history: one of ``HISTORIES``.
      dtype: what it computes in; one of ``DTYPES``.
      weight_dtype: how the matrices of vision encoder and language model are held; one of ``layers.WEIGHT_DTYPES``.
      remat: what the backward pass computes again; one of ``layers.REMAT``.
    """

    vision: VisionConfig
    bridge: tuple[str, ...]
    perceiver: PerceiverConfig
    language: LanguageConfig
    mixer: MixerConfig = MixerConfig()
    film: FilmConfig = FilmConfig()
    history: str = "observations"
    dtype: str = "bfloat16"
    weight_dtype: str = "float32"
    remat: str = "none"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MLLMConfig":
        """Makes a config from its JSON form, which ``dataclasses.asdict`` gives."""
        language = dict(values["language"])
        lora = language.pop("lora")
        return cls(**{
            **values,
            "vision": VisionConfig(**values["vision"]),
            "bridge": tuple(values["bridge"]),
            "perceiver": PerceiverConfig(**values["perceiver"]),
            "mixer": MixerConfig(**values["mixer"]),
            "film": FilmConfig(**values.get("film", {})),  # weights imported before it was there
            "language": LanguageConfig(**language, lora=None if lora is None else LoRA(**lora)),
        })  # fmt: skip

    @property
    def latents_per_image(self) -> int:
        """How many embeddings of the language model one image becomes."""
        makers: dict[str, PerceiverConfig | MixerConfig | FilmConfig] = {
            "perceiver": self.perceiver, "mixer": self.mixer, "film": self.film,
        }  # fmt: skip
        for part in reversed(self.bridge):
            if part in makers:
                return makers[part].latents
        return self.vision.patches


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things stand in the sequence after the prompt, as int arrays over its S = T * (latents + fed) places."""

    step: Int[Array, " S"]
    slot: Int[Array, " S"]  # place within the step: latents first, then action tokens
    is_action: Bool[Array, " S"]
    stride: int  # positions a step takes up

    @classmethod
    def of(cls, steps: int, latents: int, fed: int, history: str) -> "Layout":
        """Lays out ``steps`` steps of ``latents`` latents and ``fed`` action tokens each."""
        slot = jnp.tile(jnp.arange(latents + fed), steps)
        step = jnp.repeat(jnp.arange(steps), latents + fed)
        stride = latents if history == "observations" else latents + fed
        return cls(step, slot, slot >= latents, stride)


class MLLM(nnx.Module):
    """Vision encoder, Perceiver and language model as one network."""

    def __init__(self, config: MLLMConfig, rngs: nnx.Rngs) -> None:
        """Makes the three parts.

        Raises:
          UserError: if a choice in the config does not exist.
        """
        for key, choices in (
            ("history", HISTORIES), ("dtype", DTYPES), ("weight_dtype", WEIGHT_DTYPES), ("remat", REMAT),
        ):  # fmt: skip
            found = getattr(config, key)
            if found not in choices:
                raise UserError(f"{key}: expected one of {', '.join(choices)}, found {found!r}")
        self.config = config
        vision, language = config.vision, config.language
        self.vision = VisionTransformer(vision, config.weight_dtype, rngs)
        self.bridge = Bridge(
            config.bridge,
            config.perceiver,
            config.mixer,
            config.film,
            vision.patches,
            vision.width,
            language.width,
            rngs,
        )
        self.language = LanguageModel(language, config.weight_dtype, rngs)

    @property
    def width(self) -> int:
        """D, the width of hidden states and embeddings."""
        return self.config.language.width

    def instruction(
        self,
        prompt: Int[Array, "B N"],
        prompt_mask: Bool[Array, "B N"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B C"] | None:
        """Returns what the bridge has to know of the prompt, None where it reads none.

        Args:
          prompt: token ids. They see no picture, so what is made of them is the same for all steps.
          prompt_mask: which of them exist.
          key: turns the bridge's noise on.
        """
        if not self.bridge.reads_instruction:
            return None
        x, positions, mask = self._prompt(prompt, prompt_mask)
        layers, remat = self.config.film.instruction_layer, self.config.remat
        hidden = self.language.first_layers(x, positions, mask, layers, remat)
        return self.bridge.film.listener(hidden, prompt_mask, key)

    def _prompt(
        self, prompt: Int[Array, "B N"], prompt_mask: Bool[Array, "B N"]
    ) -> tuple[Float[Array, "B N D"], Int[Array, "B N"], Bool[Array, "B N N"]]:
        """Returns the embeddings of prompts, positions, and who may see whom."""
        none = jnp.zeros((len(prompt), 0, 0, self.width), jnp.dtype(self.config.dtype))
        steps = jnp.zeros((len(prompt), 0), bool)
        _, positions, mask = self._sequence(prompt_mask, none, steps, none, prompt.shape[1])
        return self.language.embed(prompt, none.dtype), positions, mask

    def latents(
        self,
        images: Images,
        instruction: Float[Array, "B C"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        parts: int = 1,
    ) -> Float[Array, "B T L D"]:
        """Encodes every camera's images in the order of their names; L counts all cameras' latents together.

        Args:
          images: of every camera.
          instruction: of every window, from ``instruction``.
          mask: which steps exist, where that is to be used: the others cost nothing then, and their latents are zero.
          parts: into how many equal parts the devices split the batch; read where there is a mask.
        """

        def encode(
            image: UInt8[Array, "B T H W 3"], told: Float[Array, "B T C"] | None
        ) -> Float[Array, "B T L D"]:
            features = self.vision(
                image.reshape(-1, *image.shape[2:]),
                dtype=jnp.dtype(self.config.dtype),
                remat=self.config.remat,
            )
            flat = None if told is None else told.reshape(-1, told.shape[-1])
            latents = self.bridge(features, flat, remat=self.config.remat)
            return latents.reshape(*image.shape[:2], *latents.shape[1:])

        cameras = [image for _, image in sorted(images.items())]
        if mask is None:
            told = None
            if instruction is not None:
                told = jnp.repeat(instruction[:, None], cameras[0].shape[1], axis=1)
            return jnp.concatenate([encode(image, told) for image in cameras], axis=2)
        return jnp.concatenate(
            [skip_padding(encode, image, instruction, mask, parts) for image in cameras], axis=2
        )

    def _sequence(
        self,
        prompt_mask: Bool[Array, "B N"],
        latents: Float[Array, "B T L D"],
        step_mask: Bool[Array, "B T"],
        fed: Float[Array, "B T F D"],
        length: int,
    ) -> tuple[Float[Array, "B S D"], Int[Array, "B N+S"], Bool[Array, "B N+S N+S"]]:
        """Returns the steps' embeddings, all positions, and who may see whom.

        The steps are padded at their end to S, so that prompt and steps are ``length`` long.
        """
        b, t, count, d = latents.shape
        layout = Layout.of(t, count, fed.shape[2], self.config.history)
        fed = fed.astype(jnp.dtype(self.config.dtype))
        steps = jnp.concatenate([latents, fed], axis=2).reshape(b, -1, d)
        n = prompt_mask.shape[1]
        extra = length - n - steps.shape[1]
        steps = jnp.pad(steps, ((0, 0), (0, extra), (0, 0)))

        prompt_positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0)
        after = prompt_mask.sum(1, keepdims=True) + layout.step * layout.stride + layout.slot
        positions = jnp.concatenate([prompt_positions, after], axis=1)
        positions = jnp.pad(positions, ((0, 0), (0, extra)))

        exists = jnp.concatenate([prompt_mask, step_mask[:, layout.step]], axis=1)
        exists = jnp.pad(exists, ((0, 0), (0, extra)))
        order = jnp.arange(length)
        causal = order[:, None] >= order[None, :]
        if self.config.history == "observations":
            step = jnp.pad(layout.step, (n, extra), constant_values=-1)
            is_action = jnp.pad(layout.is_action, (n, extra))
            hidden = is_action[None, :] & (step[:, None] != step[None, :])
            causal = causal & ~hidden
        itself = order[:, None] == order[None, :]  # keeps the softmax of padding finite
        return steps, positions, (causal & exists[:, None, :]) | itself

    def __call__(
        self,
        prompt: Int[Array, "B N"],
        prompt_mask: Bool[Array, "B N"],
        latents: Float[Array, "B T L D"],
        step_mask: Bool[Array, "B T"],
        fed: Float[Array, "B T F D"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T F+1 D"]:
        """Runs all T steps at once with the true action tokens fed back (teacher forcing).

        Args:
          prompt: token ids, with ``prompt_mask`` saying which exist.
          prompt_mask: see above.
          latents: of the images, from ``latents``.
          step_mask: which steps exist; those that do come first.
          fed: embeddings of the first F action tokens of each step.
          key: turns dropout on.

        Returns:
          For each step the hidden states of its last latent and of its F action tokens.
        """
        b, t, count, d = latents.shape
        start, each = prompt.shape[1], count + fed.shape[2]
        length = -(-(start + t * each) // MULTIPLE) * MULTIPLE
        steps, positions, mask = self._sequence(prompt_mask, latents, step_mask, fed, length)
        x = jnp.concatenate([self.language.embed(prompt, steps.dtype), steps], axis=1)
        hidden, _ = self.language(x, positions, mask, key=key, remat=self.config.remat)
        return hidden[:, start : start + t * each].reshape(b, t, each, d)[:, :, count - 1 :]

    def read(self, prompt: Int[Array, "B N"], prompt_mask: Bool[Array, "B N"]) -> "Reading":
        """Reads prompts, which see nothing of what comes after them, once for all steps of their episodes."""
        x, positions, mask = self._prompt(prompt, prompt_mask)
        _, cache = self.language(x, positions, mask, keep_cache=True)
        assert cache is not None
        return Reading(cache, prompt_mask, self.instruction(prompt, prompt_mask))

    def prefill(
        self,
        reading: "Reading",
        latents: Float[Array, "B T L D"],
        step_mask: Bool[Array, "B T"],
        fed: Float[Array, "B T F D"],
    ) -> tuple[Float[Array, "B D"], "Decoding"]:
        """Reads everything up to the newest step's last latent, and readies the decoding of that step's tokens.

        Args:
          reading: of the prompts.
          latents: see ``__call__``.
          step_mask: see ``__call__``.
          fed: the action tokens of *past* steps (F = 0 when actions are not in the history; the newest step's are
            ignored).

        Returns:
          The hidden state that predicts the newest step's first token, and the state for ``extend``.
        """
        n, (b, t, count, _) = reading.mask.shape[1], latents.shape
        each = count + fed.shape[2]
        length = n + kernels.filled_up(t * each)
        x, positions, mask = self._sequence(reading.mask, latents, step_mask, fed, length)
        past = (reading.cache,)
        hidden, cache = self.language(x, positions[:, n:], mask[:, n:], past=past, keep_cache=True)
        assert cache is not None
        last = (step_mask.sum(1) - 1) * each + count - 1
        row = jnp.arange(b)
        state = Decoding((*past, cache), mask[row, n + last], positions[row, n + last])
        return hidden[row, last], state

    def extend(
        self, embedding: Float[Array, "B D"], state: "Decoding"
    ) -> tuple[Float[Array, "B D"], "Decoding"]:
        """Feeds one action token's embedding and returns the hidden state that predicts the next token."""
        readable = jnp.concatenate([state.readable, jnp.ones((len(embedding), 1), bool)], axis=1)
        position = state.position + 1
        x = embedding.astype(jnp.dtype(self.config.dtype))[:, None]
        hidden, cache = self.language(
            x, position[:, None], readable[:, None], past=state.past, keep_cache=True
        )
        assert cache is not None
        return hidden[:, 0], Decoding((*state.past, cache), readable, position)


@struct.dataclass
class Reading:
    """Prompts that were read."""

    cache: Cache
    mask: Bool[Array, "B N"]  # which tokens exist
    instruction: Float[Array, "B C"] | None  # see ``MLLM.instruction``


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What decoding one step's tokens carries on."""

    past: tuple[Cache, ...]
    readable: Bool[Array, "B past"]
    position: Int[Array, " B"]
