"""A checkpoint as a policy: observation and instruction in, action out. Needs no config file, data set or TensorFlow.

    policy = Policy.load("runs/metaworld/rvq")
    memory = policy.start(batch=1)
    action, memory = policy.act(images, proprio, ["press the button"], first=np.array([True]), memory=memory)

Images of past steps are kept as the latents the model made of them, and are not encoded again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from mllm_act import network as networks
from mllm_act.errors import UserError
from mllm_act.models.acting import for_acting
from mllm_act.normalization import Statistics
from mllm_act.prompt import Prompt, pad
from mllm_act.training import checkpoint, rules
from mllm_act.training import frozen as frozen_arrays
from mllm_act.training.checkpoint import Checkpointer


@struct.dataclass
class Memory:
    """What the policy remembers of each of B episodes: at most T steps, those that exist first."""

    latents: Float[Array, "B T L D"]
    tokens: Array  # action tokens, [B, T, ...]
    count: Int[Array, " B"]  # how many steps are remembered


class Policy:
    """A trained network, ready to act in a batch of episodes at once."""

    def __init__(
        self, network: networks.PolicyNetwork, prompt: Prompt, context: int, meta: Mapping[str, Any]
    ) -> None:
        """Wraps a network; ``meta`` is the checkpoint's JSON document (``dataset`` names the action's units)."""
        self.prompt, self.context, self.meta = prompt, context, meta
        self._graph, state = nnx.split(network)
        # Flat: of hundreds of arrays, a tree of modules would cost the host as much time as the model takes.
        self._parameters, self._structure = jax.tree.flatten(state)
        self._cameras = network.mllm.config.cameras
        self._longest = networks.longest_prompt(network, context)
        self._prompts: dict[str, list[int]] = {}
        # The memory is written in place, so that arrays stay where they are and a GPU can replay its recorded launches.
        self._step = jax.jit(self._compute, donate_argnames="memory")

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Loads the newest checkpoint of a run's folder, or the step that ``path`` names.

        Raises:
          UserError: if there is no whole checkpoint, or it lacks what acting needs.
        """
        workdir, step = checkpoint.find(Path(path))
        with Checkpointer(workdir) as checkpoints:
            meta = checkpoints.meta(step)
            for key, what in (
                ("network", "description"),
                ("statistics", "action statistics"),
                ("prompt", "prompt"),
                ("frozen", "mark of the frozen parameters"),
            ):
                if key not in meta:
                    raise UserError(
                        f"{workdir}/checkpoints/{step}: expected {key!r} (the policy's {what}) in it, found "
                        f"{sorted(meta)}; is this a tokenizer's folder? Train a policy with python -m mllm_act.train"
                    )
            description = networks.Description.from_dict(meta["network"])
            if description.adapter in ("vq", "rvq") and description.tokenizer is None:
                raise UserError(
                    f"{workdir}/checkpoints/{step}: expected the {description.adapter} tokenizer in it, found "
                    "none; train the policy anew with --config.tokenizer=DIR"
                )
            statistics = Statistics.from_dict(meta["statistics"])
            network = nnx.eval_shape(lambda: networks.build(description, statistics, nnx.Rngs(0)))
            graph, *parts = rules.split(network, description.trained)
            place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            trained, frozen = (_placed(rules.flatten(part), place) for part in parts)
            arrays = checkpoints.restore(step, {"trained": trained})["trained"]
            arrays |= frozen_arrays.load(workdir, frozen, meta["frozen"])
        network = nnx.merge(graph, *(rules.unflatten(arrays, like=part) for part in parts))
        network.mllm = for_acting(network.mllm)
        return cls(network, Prompt(**meta["prompt"]), description.context, meta)

    def start(self, batch: int) -> Memory:
        """Returns an empty memory for ``batch`` episodes."""
        network = self._network(self._parameters)
        config = network.mllm.config
        count = config.latents_per_image * len(config.cameras)
        latents = jnp.zeros((batch, self.context, count, network.mllm.width), config.dtype)
        tokens = networks.empty_tokens(network.adapter, batch, self.context)
        memory = Memory(latents, tokens, jnp.zeros(batch, jnp.int32))
        # Where the parameters are, as what ``act`` returns: or the second step would be compiled anew.
        return jax.device_put(memory, self._parameters[0].sharding)

    def act(
        self,
        images: Mapping[str, UInt8[np.ndarray, "B H W 3"]],
        proprio: Float[np.ndarray, "B P"],
        instructions: Sequence[str],
        first: Bool[np.ndarray, " B"],
        memory: Memory,
    ) -> tuple[Float[np.ndarray, "B A"], Memory]:
        """Decides the next action of each episode, greedily.

        Args:
          images: the newest frame of each camera, as the simulator drew it.
          proprio: in the environment's own numbers.
          instructions: one sentence an episode.
          first: which episodes begin with this observation; what was remembered of their slot is forgotten.
          memory: from ``start`` or the last ``act``; it is used up.

        Returns:
          Actions in the environment's own numbers, and the new memory.

        Raises:
          UserError: if a camera the policy sees is missing, something has another dtype or shape, or an instruction is
            too long for the model.
        """
        first, proprio = np.asarray(first), np.asarray(proprio)
        if first.dtype != bool or first.shape != memory.count.shape or not len(first):
            raise UserError(
                f"first: expected bool{list(memory.count.shape)}, one for each episode of the memory, found "
                f"{first.dtype}{list(first.shape)}"
            )
        batch, proprios = len(first), len(self.meta["statistics"]["proprio"]["mean"])
        for camera in self._cameras:
            image = None if camera not in images else np.asarray(images[camera])
            fits = image is not None and image.dtype == np.uint8 and image.ndim == 4
            if (
                image is None
                or not fits
                or (len(image), image.shape[-1]) != (batch, 3)
                or not image.size
            ):
                found = (
                    f"{image.dtype}{list(image.shape)}"
                    if image is not None
                    else f"cameras {sorted(images)}"
                )
                raise UserError(
                    f"images[{camera!r}]: expected uint8[{batch}, H, W, 3] in RGB, found {found}; convert it"
                )
        if isinstance(instructions, str) or not all(isinstance(one, str) for one in instructions):
            raise UserError(
                "instructions: expected a sentence for each episode, in a list; found something else"
            )
        if not np.issubdtype(proprio.dtype, np.number) or not np.isfinite(proprio).all():
            raise UserError(f"proprio: expected finite numbers, found {proprio}")
        if proprio.shape != (batch, proprios) or len(instructions) != batch:
            raise UserError(
                f"expected proprio[{batch}, {proprios}] and {batch} instructions for {batch} episodes, found "
                f"proprio{list(proprio.shape)} and {len(instructions)}"
            )
        ids, exists = self._prompt_tokens(instructions)
        action, memory = self._step(
            self._parameters,
            {c: images[c] for c in self._cameras},
            proprio,
            ids,
            exists,
            first,
            memory,
        )
        return np.asarray(action), memory

    def _prompt_tokens(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts longer than in training are padded to the next multiple of that length: padding is not seen."""
        for instruction in set(instructions) - self._prompts.keys():
            ids = self.prompt.encode(instruction)
            if len(ids) > self._longest:
                raise UserError(
                    f"instruction: expected a prompt of at most {self._longest} tokens, what {self.context} steps "
                    f"leave of the model's context, found {len(ids)} for {instruction[:60]!r}; shorten it"
                )
            self._prompts[instruction] = ids
        longest = max(len(ids) for ids in self._prompts.values())
        length = -(-longest // self.prompt.length) * self.prompt.length
        return pad([self._prompts[instruction] for instruction in instructions], length)

    def _network(self, parameters: list[Array]) -> networks.PolicyNetwork:
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, parameters))

    def _compute(
        self,
        parameters: list[Array],
        images: Mapping[str, UInt8[Array, "B H W 3"]],
        proprio: Float[Array, "B P"],
        ids: Int[Array, "B N"],
        exists: Bool[Array, "B N"],
        first: Bool[Array, " B"],
        memory: Memory,
    ) -> tuple[Float[Array, "B A"], Memory]:
        network = self._network(parameters)
        newest = network.mllm.latents({camera: image[:, None] for camera, image in images.items()})[
            :, 0
        ]
        count = jnp.where(first, 0, memory.count)
        full = count == self.context
        place = jnp.where(full, self.context - 1, count)

        def shift(kept: Array) -> Array:
            wide = full.reshape(-1, *([1] * (kept.ndim - 1)))
            return jnp.where(wide, jnp.roll(kept, -1, axis=1), kept)

        rows = jnp.arange(len(first))
        latents = shift(memory.latents).at[rows, place].set(newest)
        past = shift(memory.tokens)
        step_mask = jnp.arange(self.context) <= place[:, None]
        tokens = network.act(ids, exists, latents, step_mask, proprio, past)
        memory = Memory(latents, past.at[rows, place].set(tokens), place + 1)
        return network.adapter.decode(tokens), memory


def _placed(
    arrays: Mapping[str, jax.ShapeDtypeStruct], place: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for path, leaf in arrays.items()
    }
