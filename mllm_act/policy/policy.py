"""A checkpoint as a policy: observation and instruction in, action out. Needs no config file, data set or TensorFlow.

    policy = Policy.load("runs/metaworld/rvq")      # and embodiment="metaworld", where it was trained for several
    memory = policy.start(batch=1)
    action, memory = policy.act(images, proprio, ["press the button"], first=np.array([True]), memory=memory)

Images of past steps are kept as the latents the model made of them, and are not encoded again; instructions are read
when they change. Where a decision holds several actions (a chunk), they are carried out one after another, and the
language model runs once a chunk; or it runs at every step, and what the chunks say of the present one is averaged
(temporal ensembling).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from mllm_act import parameters
from mllm_act.checkpoints import checkpoint
from mllm_act.checkpoints import frozen as frozen_arrays
from mllm_act.checkpoints.checkpoint import Checkpointer
from mllm_act.errors import UserError
from mllm_act.models.acting.prepare import for_acting
from mllm_act.models.mllm import Reading
from mllm_act.normalization import Statistics
from mllm_act.policy import chunks
from mllm_act.policy import network as networks
from mllm_act.policy.prompt import Prompt, pad

SMALL = 2**14  # bytes of an array that becomes a constant


@struct.dataclass
class Steps:
    """What the policy remembers of each of B episodes: at most T steps, those that exist first."""

    latents: Float[Array, "B T L D"]
    tokens: Array  # action tokens, [B, T, ...]
    count: Int[Array, " B"]  # how many steps are remembered
    plan: chunks.Plan  # actions decided on and not yet carried out


@dataclasses.dataclass(frozen=True)
class Memory:
    """The steps, and the instructions, which are read when they change."""

    steps: Steps
    instructions: tuple[str, ...] = ()
    reading: Reading | None = None


class Policy:
    """A trained network, ready to act in a batch of episodes at once."""

    def __init__(
        self,
        network: networks.PolicyNetwork,
        name: str,
        embodiment: networks.Embodiment,
        prompt: Prompt,
        meta: Mapping[str, Any],
        ensembling: float | None = None,
    ) -> None:
        """Wraps a network for one embodiment.

        Args:
          network: ready to act (``models.acting``); with the adapter of ``name`` alone.
          name: the embodiment's.
          embodiment: its part of the network's description.
          prompt: turns its instructions into tokens.
          meta: the checkpoint's JSON document; for information.
          ensembling: see ``load``.

        Raises:
          UserError: if there is nothing to average, or the decay is no number from 0 on.
        """
        if ensembling is not None and not 0 <= ensembling < math.inf:
            raise UserError(f"ensembling: expected a decay of 0 or more, found {ensembling}")
        if ensembling is not None and embodiment.chunk == 1:
            raise UserError(
                f"ensembling: expected a policy that decides on several actions at once, found chunks of 1 for {name}; "
                "leave it out, or train with --config.chunk=8"
            )
        self.name, self.embodiment, self.prompt, self.meta = name, embodiment, prompt, meta
        self.context, self._ensembling = embodiment.context, ensembling
        self._graph, state = nnx.split(network)
        # Arguments cost the host time at every call, so that they are a flat list of the large arrays; the small ones
        # (norms, biases, scales) are constants of the program.
        leaves, self._structure = jax.tree.flatten(state)
        self._constants = {i: np.asarray(x) for i, x in enumerate(leaves) if x.nbytes <= SMALL}
        self._parameters = [x for i, x in enumerate(leaves) if i not in self._constants]
        adapter, model = network.adapters[name], network.mllm.config
        self._cameras, self._proprios = embodiment.cameras, len(adapter.statistics.proprio.mean)
        self._longest = networks.longest_prompt(model, embodiment, adapter.tokens_per_action)
        self._prompts: dict[str, list[int]] = {}
        # The steps are written in place, so that arrays stay where they are and a GPU can replay its recorded launches.
        self._step = jax.jit(self._compute, donate_argnames="steps")
        self._read = jax.jit(lambda parameters, *ids: self._network(parameters).mllm.read(*ids))

    @classmethod
    def load(
        cls, path: str | Path, embodiment: str | None = None, ensembling: float | None = None
    ) -> "Policy":
        """Loads a policy.

        Args:
          path: a run's folder, whose newest checkpoint is taken, or one step of it.
          embodiment: which of those it was trained for; may be left out where there is one.
          ensembling: decide at every step, and average what the chunks that reach it say of it, with weights
            ``exp(-ensembling * i)``, i = 0 for the oldest of them (ACT, arXiv 2304.13705; 0.01 there).

        Raises:
          UserError: if there is no whole checkpoint, or it lacks what acting needs, or the embodiment.
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
            for name, one in description.embodiments.items():
                if one.adapter in networks.TOKENIZED and one.tokenizer is None:
                    raise UserError(
                        f"{workdir}/checkpoints/{step}: expected the {one.adapter} tokenizer in it, found none for "
                        f"{name}; train the policy anew with --config.tokenizer=DIR"
                    )
            name = _choose(description, embodiment, workdir)
            statistics = {
                key: Statistics.from_dict(values) for key, values in meta["statistics"].items()
            }
            network = nnx.eval_shape(lambda: networks.build(description, statistics, nnx.Rngs(0)))
            graph, *parts = parameters.split(network, description.trained)
            place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            trained, frozen = (_placed(parameters.flatten(part), place) for part in parts)
            arrays = checkpoints.restore(step, {"trained": trained})["trained"]
            arrays |= frozen_arrays.load(workdir, frozen, meta["frozen"])
        network = nnx.merge(graph, *(parameters.unflatten(arrays, like=part) for part in parts))
        network = networks.PolicyNetwork(for_acting(network.mllm), {name: network.adapters[name]})
        prompt = Prompt(**meta["prompt"][name])
        return cls(network, name, description.embodiments[name], prompt, meta, ensembling)

    def start(self, batch: int) -> Memory:
        """Returns an empty memory for ``batch`` episodes."""
        network = self._network(self._parameters)
        config = network.mllm.config
        count = config.latents_per_image * len(self._cameras)
        latents = jnp.zeros((batch, self.context, count, network.mllm.width), config.dtype)
        tokens = networks.empty_tokens(network.adapter, batch, self.context)
        chunk = self.embodiment.chunk
        actions = len(network.adapter.statistics.action.min) // chunk
        plan = chunks.start(batch, chunk, actions, self._ensembling is not None)
        steps = Steps(latents, tokens, jnp.zeros(batch, jnp.int32), plan)
        # Where the parameters are, as what ``act`` returns: or the second step would be compiled anew.
        return Memory(jax.device_put(steps, self._parameters[0].sharding))

    def act(
        self,
        images: Mapping[str, UInt8[np.ndarray, "B H W 3"]],
        proprio: Float[np.ndarray, "B P"],
        instructions: Sequence[str],
        first: Bool[np.ndarray, " B"],
        memory: Memory,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[np.ndarray, "B A"], Memory]:
        """Decides the next action of each episode.

        Args:
          images: the newest frame of each camera, as the simulator drew it.
          proprio: in the environment's own numbers.
          instructions: one sentence an episode.
          first: which episodes begin with this observation; what was remembered of their slot is forgotten.
          memory: from ``start`` or the last ``act``; it is used up.
          key: draws from the policy's distribution; without it decoding is greedy. Regression has no distribution.

        Returns:
          Actions in the environment's own numbers, and the new memory.

        Raises:
          UserError: if a camera the policy sees is missing, something has another dtype or shape, or an instruction is
            too long for the model.
        """
        first, proprio = np.asarray(first), np.asarray(proprio)
        if first.dtype != bool or first.shape != memory.steps.count.shape or not len(first):
            raise UserError(
                f"first: expected bool{list(memory.steps.count.shape)}, one for each episode of the memory, found "
                f"{first.dtype}{list(first.shape)}"
            )
        batch, proprios = len(first), self._proprios
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
        reading, texts = memory.reading, tuple(instructions)
        if texts != memory.instructions:
            reading = self._read(self._parameters, *self._prompt_tokens(texts))
        pictures = {camera: images[camera] for camera in self._cameras}
        action, steps = self._step(
            self._parameters, reading, pictures, proprio, first, memory.steps, key
        )
        return np.asarray(action), Memory(steps, texts, reading)

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

    def _network(self, parameters: list[Array]) -> networks.Embodied:
        large, count = iter(parameters), len(parameters) + len(self._constants)
        leaves = [self._constants[i] if i in self._constants else next(large) for i in range(count)]
        state = jax.tree.unflatten(self._structure, [jnp.asarray(leaf) for leaf in leaves])
        return nnx.merge(self._graph, state).embodied(self.name)

    def _compute(
        self,
        parameters: list[Array],
        reading: Reading,
        images: Mapping[str, UInt8[Array, "B H W 3"]],
        proprio: Float[Array, "B P"],
        first: Bool[Array, " B"],
        steps: Steps,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B A"], Steps]:
        network = self._network(parameters)
        now = {camera: image[:, None] for camera, image in images.items()}
        newest = network.mllm.latents(now, reading.instruction)[:, 0]
        count = jnp.where(first, 0, steps.count)
        full = count == self.context
        place = jnp.where(full, self.context - 1, count)

        def shift(kept: Array) -> Array:
            wide = full.reshape(-1, *([1] * (kept.ndim - 1)))
            return jnp.where(wide, jnp.roll(kept, -1, axis=1), kept)

        rows = jnp.arange(len(first))
        latents = shift(steps.latents).at[rows, place].set(newest)
        past = shift(steps.tokens)
        step_mask = jnp.arange(self.context) <= place[:, None]
        plan = chunks.forget(steps.plan, first)
        due = chunks.due(plan)

        def decide() -> tuple[Array, Array]:
            tokens = network.act(reading, latents, step_mask, proprio, past, key)
            return tokens, network.adapter.decode(tokens)

        def wait() -> tuple[Array, Array]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(decide))

        # With chunks of one, and where they are averaged, every step decides.
        every_step = self.embodiment.chunk == 1 or self._ensembling is not None
        tokens, chunk = decide() if every_step else jax.lax.cond(due.any(), decide, wait)
        action, plan = chunks.take(chunks.push(plan, chunk, due), self._ensembling)
        return action, Steps(latents, past.at[rows, place].set(tokens), place + 1, plan)


def _choose(description: networks.Description, embodiment: str | None, workdir: Path) -> str:
    """Returns the embodiment's name, where it is not given the only one's."""
    there = list(description.embodiments)
    if embodiment is None and len(there) == 1:
        return there[0]
    if embodiment not in there:
        raise UserError(
            f"embodiment: expected one of {', '.join(there)}, which {workdir} was trained for, found {embodiment!r}; "
            "name one of them"
        )
    return embodiment


def _placed(
    arrays: Mapping[str, jax.ShapeDtypeStruct], place: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for path, leaf in arrays.items()
    }
