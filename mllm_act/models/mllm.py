"""The multimodal language model: prompt, images and action tokens in; the hidden states that predict actions out.

The sequence is the prompt, then for every step t the latents of each camera's image and the action tokens:

    prompt | latents_0 actions_0 | latents_1 actions_1 | ...

``history`` decides what a step may see of earlier ones. With ``observations`` (the paper's reading) action tokens are
visible only within their own step and take up no positions in later steps, so one pass over T steps equals T separate
passes. With ``observations_and_actions`` later steps see them too.

A step's last latent predicts its first token; each token predicts the next.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, no_type_check

import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from mllm_act.batch import Images
from mllm_act.errors import UserError
from mllm_act.models.bridge.bridge import PARTS, Bridge, Sizes, latents_per_image
from mllm_act.models.language import Cache, LanguageConfig, LanguageModel
from mllm_act.models.layers import MULTIPLE, REMAT, WEIGHT_DTYPES, LoRA
from mllm_act.models.skip_padding import skip_padding
from mllm_act.models.vision import FITS, VisionConfig, VisionTransformer

HISTORIES = ("observations", "observations_and_actions")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class MLLMConfig:
    """All sizes of the model.

    Attributes:
      bridge: the parts between vision and language, in their order; see ``models.bridge``.
      sizes: of bridge parts whose defaults do not fit, as (name, config) pairs.
      history: one of ``HISTORIES``.
      dtype: of the computation; one of ``DTYPES``.
      weight_dtype: of the matrices of vision encoder and language model; one of ``layers.WEIGHT_DTYPES``.
      remat: what the backward pass recomputes; one of ``layers.REMAT``.
      fit: how an image that is not square becomes the vision encoder's square; one of ``vision.FITS``.
    """

    vision: VisionConfig
    bridge: tuple[str, ...]
    language: LanguageConfig
    sizes: Sizes = ()
    history: str = "observations"
    dtype: str = "bfloat16"
    weight_dtype: str = "float32"
    remat: str = "none"
    fit: str = "squash"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MLLMConfig":
        """Makes a config from its JSON form, which ``dataclasses.asdict`` returns."""
        language = dict(values["language"])
        lora = language.pop("lora")
        return cls(**{
            **values,
            "vision": VisionConfig(**values["vision"]),
            "bridge": tuple(values["bridge"]),
            "sizes": tuple((name, PARTS[name].Config(**fields)) for name, fields in values["sizes"]),
            "language": LanguageConfig(**language, lora=None if lora is None else LoRA(**lora)),
        })  # fmt: skip

    @property
    def latents_per_image(self) -> int:
        """How many embeddings of the language model one image becomes."""
        return latents_per_image(self.bridge, self.sizes, self.vision.patches)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of the sequence after the prompt, as arrays over its S = T * (latents + fed) elements."""

    step: Int[Array, " S"]
    slot: Int[Array, " S"]  # index within the step: latents first, then action tokens
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
    """Vision encoder, bridge and language model as one network."""

    def __init__(self, config: MLLMConfig, rngs: nnx.Rngs) -> None:
        """Makes the three parts.

        Raises:
          UserError: if a choice in the config does not exist.
        """
        for key, choices in (
            ("history", HISTORIES), ("dtype", DTYPES), ("weight_dtype", WEIGHT_DTYPES), ("remat", REMAT),
            ("fit", FITS),
        ):  # fmt: skip
            found = getattr(config, key)
            if found not in choices:
                raise UserError(f"{key}: expected one of {', '.join(choices)}, found {found!r}")
        self.config = config
        vision, language = config.vision, config.language
        self.vision = VisionTransformer(vision, config.weight_dtype, rngs)
        self.bridge = Bridge(
            config.bridge, config.sizes, vision.patches, vision.width, language.width, rngs
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
        """Returns what the bridge needs of the prompt, None where it needs nothing.

        Args:
          prompt: token ids. They see no image, so the result is the same for all steps.
          prompt_mask: which of them exist.
          key: turns the bridge's noise on.
        """
        reader = self.bridge.reader
        if reader is None:
            return None
        x, positions, mask = self._prompt(prompt, prompt_mask)
        hidden = self.language.first_layers(
            x, positions, mask, reader.instruction_layer, self.config.remat
        )
        return reader.attend_instruction(hidden, prompt_mask, key)

    def _prompt(
        self, prompt: Int[Array, "B N"], prompt_mask: Bool[Array, "B N"]
    ) -> tuple[Float[Array, "B N D"], Int[Array, "B N"], Bool[Array, "B N N"]]:
        """Returns the embeddings of prompts, their positions, and the attention mask."""
        none = jnp.zeros((len(prompt), 0, 0, self.width), jnp.dtype(self.config.dtype))
        steps = jnp.zeros((len(prompt), 0), bool)
        _, positions, mask = self._sequence(prompt_mask, none, steps, none, prompt.shape[1])
        return self.language.embed(prompt, none.dtype), positions, mask

    def latents(
        self,
        images: Images,
        instruction: Float[Array, "B C"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        shards: int = 1,
    ) -> Float[Array, "B T L D"]:
        """Encodes the images of all cameras in the order of their names; L counts the latents of all cameras.

        Args:
          images: of every camera.
          instruction: of every window, from ``instruction``.
          mask: which steps exist, if padding is to be skipped: it then costs nothing, and its latents are zero.
          shards: the number of equal parts that the devices split the batch into; read only with a mask.
        """

        def encode(
            image: UInt8[Array, "B T H W 3"], instruction: Float[Array, "B T C"] | None
        ) -> Float[Array, "B T L D"]:
            return self._bridged(self._features(image), instruction)

        if mask is None:
            return self.bridged(self.features(images), instruction)
        cameras = [image for _, image in sorted(images.items())]
        return jnp.concatenate(
            [skip_padding(encode, image, instruction, mask, shards) for image in cameras], axis=2
        )

    def features(self, images: Images) -> list[Float[Array, "B T N F"]]:
        """Encodes the images of each camera, in the order of their names, without the bridge."""
        return [self._features(image) for _, image in sorted(images.items())]

    def bridged(
        self,
        features: Sequence[Float[Array, "B T N F"]],
        instruction: Float[Array, "B C"] | None = None,
    ) -> Float[Array, "B T L D"]:
        """Makes the latents of ``features``; see ``latents``."""
        per_step = None
        if instruction is not None:
            per_step = jnp.repeat(instruction[:, None], features[0].shape[1], axis=1)
        return jnp.concatenate([self._bridged(x, per_step) for x in features], axis=2)

    def _features(self, image: UInt8[Array, "B T H W 3"]) -> Float[Array, "B T N F"]:
        flat, dtype = image.reshape(-1, *image.shape[2:]), jnp.dtype(self.config.dtype)
        features = self.vision(flat, dtype=dtype, remat=self.config.remat, fit=self.config.fit)
        return features.reshape(*image.shape[:2], *features.shape[1:])

    def _bridged(
        self, features: Float[Array, "B T N F"], instruction: Float[Array, "B T C"] | None
    ) -> Float[Array, "B T L D"]:
        flat = None if instruction is None else instruction.reshape(-1, instruction.shape[-1])
        each = features.reshape(-1, *features.shape[2:])
        latents = self.bridge(each, flat, remat=self.config.remat)
        return latents.reshape(*features.shape[:2], *latents.shape[1:])

    def _sequence(
        self,
        prompt_mask: Bool[Array, "B N"],
        latents: Float[Array, "B T L D"],
        step_mask: Bool[Array, "B T"],
        fed: Float[Array, "B T F D"],
        length: int,
    ) -> tuple[Float[Array, "B S D"], Int[Array, "B N+S"], Bool[Array, "B N+S N+S"]]:
        """Returns the embeddings of the steps, all positions, and the attention mask.

        The steps are padded at the end to S, so that prompt and steps together have ``length`` elements.
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
        """Reads prompts, once for all steps of their episodes: they see nothing of what follows them."""
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
        """Reads everything up to the newest step's last latent, in preparation for decoding that step's tokens.

        Args:
          reading: of the prompts.
          latents: see ``__call__``.
          step_mask: see ``__call__``.
          fed: embeddings of the action tokens of *past* steps (F = 0 if the history has no actions; those of the newest
            step are ignored).

        Returns:
          The hidden state that predicts the newest step's first token, and the state for ``extend``.
        """
        n, (b, t, count, _) = reading.mask.shape[1], latents.shape
        each = count + fed.shape[2]
        length = n + self.padded_rows(t * each)
        x, positions, mask = self._sequence(reading.mask, latents, step_mask, fed, length)
        past = (reading.cache,)
        hidden, cache = self.language(x, positions[:, n:], mask[:, n:], past=past, keep_cache=True)
        assert cache is not None
        last = (step_mask.sum(1) - 1) * each + count - 1
        row = jnp.arange(b)
        state = Decoding((*past, cache), mask[row, n + last], positions[row, n + last])
        return hidden[row, last], state

    def padded_rows(self, rows: int) -> int:
        """Returns how many elements the steps are padded to for one decision."""
        return -(-rows // MULTIPLE) * MULTIPLE

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


@no_type_check  # JAX rebuilds it with shapes in place of arrays
@struct.dataclass
class Reading:
    """Prompts as ``MLLM.read`` returns them."""

    cache: Cache
    mask: Bool[Array, "B N"]  # which tokens exist
    instruction: Float[Array, "B C"] | None  # see ``MLLM.instruction``


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The state of decoding one step's tokens."""

    past: tuple[Cache, ...]
    readable: Bool[Array, "B past"]
    position: Int[Array, " B"]
