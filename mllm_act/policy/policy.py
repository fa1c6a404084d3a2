"""A checkpoint as a policy: observation and instruction in, action out. No config file, dataset or TensorFlow needed.

    policy = Policy.load("runs/metaworld/rvq")      # and embodiment="metaworld", where it was trained for several
    memory = policy.start(batch=1)
    action, memory = policy.act(images, proprio, ["press the button"], first=np.array([True]), memory=memory)

Past images are kept as latents and are not encoded again; instructions are read when they change. Where a decision
holds several actions (a chunk), they are executed one after another and the language model runs once per chunk. With
temporal ensembling it runs at every step, and the actions that overlapping chunks give for the present are averaged.

Where an instruction changes inside an episode, the past is seen as if the new one had been given from the start:
latents that depend on it are made again, and what is left of a chunk is dropped.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from mllm_act.adapters.token_filter import Keys
from mllm_act.errors import UserError
from mllm_act.models.acting.prepare import for_acting
from mllm_act.models.mllm import Reading
from mllm_act.policy import chunks
from mllm_act.policy.load import load_network
from mllm_act.policy.network import (
    EmbodimentConfig,
    NetworkConfig,
    PolicyNetwork,
    Prefix,
    empty_tokens,
    longest_prompt,
)
from mllm_act.policy.prompt import Prompt, pad

SMALL = 2**14  # bytes; arrays up to this size become constants of the program


@no_type_check  # JAX rebuilds it with shapes in place of arrays
@struct.dataclass
class Steps:
    """What the policy remembers of each of B episodes: at most T steps, the existing ones first."""

    latents: Float[Array, "B T L D"]
    features: list[
        Float[Array, "B T N F"]
    ]  # of each camera, where latents depend on the instruction; else none
    tokens: Array  # action tokens, [B, T, ...]
    count: Int[Array, " B"]  # how many steps are remembered
    plan: chunks.Plan  # actions decided on and not yet executed


@dataclasses.dataclass(frozen=True)
class Memory:
    """The steps, and the instructions as last read."""

    steps: Steps
    instructions: tuple[str, ...] = ()
    reading: Reading | None = None


class Policy:
    """A trained network, ready to act in a batch of episodes at once."""

    def __init__(
        self,
        network: PolicyNetwork,
        name: str,
        embodiment: EmbodimentConfig,
        prompt: Prompt,
        meta: Mapping[str, Any],
        ensembling: float | None = None,
    ) -> None:
        """Wraps a network for one embodiment.

        Args:
          network: prepared by ``models.acting``, with only the adapter of ``name``.
          name: of the embodiment.
          embodiment: its part of the network's config.
          prompt: turns its instructions into tokens.
          meta: the checkpoint's JSON document; for information.
          ensembling: see ``load``.

        Raises:
          UserError: if there is nothing to average, or the decay is negative or not finite.
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
        # Every argument costs host time at every call, so they are a flat list of the large arrays. The small ones
        # (norms, biases, scales) are constants of the program.
        leaves, self._structure = jax.tree.flatten(state)
        self._constants = {i: np.asarray(x) for i, x in enumerate(leaves) if x.nbytes <= SMALL}
        self.parameters = [x for i, x in enumerate(leaves) if i not in self._constants]
        adapter, model = network.adapters[name], network.mllm.config
        self._reads_instruction = network.mllm.bridge.reader is not None
        self._cameras, self.proprios = embodiment.cameras, len(adapter.statistics.proprio.mean)
        self.actions = len(adapter.statistics.action.min) // embodiment.chunk
        self.longest_prompt = longest_prompt(model, embodiment, adapter.tokens_per_action)
        self._prompts: dict[str, list[int]] = {}
        # The steps are updated in place: arrays keep their addresses, and a GPU can replay its recorded launches.
        self._step = jax.jit(self.compute, donate_argnames="steps")
        self._read = jax.jit(self.read)
        self._look_again = jax.jit(self.latents_again, donate_argnames="steps")

    @classmethod
    def load(
        cls, path: str | Path, embodiment: str | None = None, ensembling: float | None = None
    ) -> "Policy":
        """Loads a policy.

        Args:
          path: a run's folder, whose newest checkpoint is taken, or one step of it.
          embodiment: one of those it was trained for; may be left out where there is only one.
          ensembling: decide at every step and average the actions that overlapping chunks give for it, with weights
            ``exp(-ensembling * i)``, i = 0 for the oldest (ACT, arXiv 2304.13705; 0.01 there).

        Raises:
          UserError: if there is no whole checkpoint of a policy, another version wrote it, or it lacks the embodiment.
        """
        saved = load_network(Path(path), jax.local_devices()[0])
        name = _choose(saved.config, embodiment, saved.workdir)
        network = saved.network()
        network = PolicyNetwork(for_acting(network.mllm), {name: network.adapters[name]})
        prompt = Prompt(**saved.meta["prompt"][name])
        return cls(network, name, saved.config.embodiments[name], prompt, saved.meta, ensembling)

    def start(self, batch: int) -> Memory:
        """Returns an empty memory for ``batch`` episodes."""
        network = self._network(self.parameters)
        adapter, config = network.adapters[self.name], network.mllm.config
        count = config.latents_per_image * len(self._cameras)
        latents = jnp.zeros((batch, self.context, count, network.mllm.width), config.dtype)
        tokens = empty_tokens(adapter, batch, self.context)
        chunk = self.embodiment.chunk
        plan = chunks.start(batch, chunk, self.actions, self._ensembling is not None)
        features = []
        if self._reads_instruction:
            shape = (batch, self.context, config.vision.patches, config.vision.width)
            features = [jnp.zeros(shape, config.dtype) for _ in self._cameras]
        steps = Steps(latents, features, tokens, jnp.zeros(batch, jnp.int32), plan)
        # On the parameters' device, as what ``act`` returns; otherwise the second step would be compiled again.
        return Memory(jax.device_put(steps, self.parameters[0].sharding))

    @no_type_check  # it checks its arguments itself, and reports them by name
    def act(
        self,
        images: Mapping[str, UInt8[np.ndarray, "B H W 3"]],
        proprio: Float[np.ndarray, "B P"],
        instructions: Sequence[str],
        first: Bool[np.ndarray, " B"],
        memory: Memory,
        key: Keys | None = None,
    ) -> tuple[Float[np.ndarray, "B A"], Memory]:
        """Decides the next action of each episode.

        Args:
          images: the newest frame of each camera, as the simulator drew it.
          proprio: in the environment's units.
          instructions: one sentence per episode.
          first: which episodes begin with this observation; their memory is cleared.
          memory: from ``start`` or the last ``act``; it must not be used again.
          key: draws from the policy's distribution; without it decoding is greedy. With one key per episode, what is
            drawn for an episode does not depend on the others in the batch. Regression has no distribution.

        Returns:
          Actions in the environment's units, and the new memory.

        Raises:
          UserError: if a camera is missing, an array has the wrong dtype or shape, or an instruction is too long for
            the model.
        """
        first, proprio = np.asarray(first), np.asarray(proprio)
        self._check(images, proprio, instructions, first, memory)
        if key is not None and key.ndim and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if key.shape != first.shape:
                raise UserError(
                    f"key: expected one, or one for each of {len(first)} episodes, found {list(key.shape)}"
                )
        images = {camera: images[camera] for camera in self._cameras}
        reading, steps, texts = memory.reading, memory.steps, tuple(instructions)
        if texts != memory.instructions:
            reading = self._read(self.parameters, *self._prompt_tokens(texts))
            before = memory.instructions or texts
            changed = np.array([a != b for a, b in zip(before, texts, strict=True)])
            if (changed & ~first).any():
                steps = self._look_again(self.parameters, reading, changed, steps)
        action, steps = self._step(self.parameters, reading, images, proprio, first, steps, key)
        return np.asarray(action), Memory(steps, texts, reading)

    @no_type_check
    def _check(
        self,
        images: Mapping[str, UInt8[np.ndarray, "B H W 3"]],
        proprio: Float[np.ndarray, "B P"],
        instructions: Sequence[str],
        first: Bool[np.ndarray, " B"],
        memory: Memory,
    ) -> None:
        """Raises UserError where an argument of ``act`` has the wrong type, dtype or shape."""
        shape = memory.steps.count.shape
        if first.dtype != bool or first.shape != shape or not len(first):
            raise UserError(
                f"first: expected bool{list(shape)}, one value per episode of the memory, found "
                f"{first.dtype}{list(first.shape)}"
            )
        batch, proprios = len(first), self.proprios
        for camera in self._cameras:
            found = f"the cameras {', '.join(sorted(images)) or 'none'}"
            if camera in images:
                image = np.asarray(images[camera])
                fits = image.ndim == 4 and (len(image), image.shape[-1]) == (batch, 3)
                if image.dtype == np.uint8 and fits and image.size:
                    continue
                found = f"{image.dtype}{list(image.shape)}"
            raise UserError(
                f"images[{camera!r}]: expected uint8[{batch}, H, W, 3] in RGB, found {found}; convert it"
            )
        if isinstance(instructions, str) or not all(isinstance(x, str) for x in instructions):
            raise UserError(
                "instructions: expected a list with one sentence per episode, found something else"
            )
        if not np.issubdtype(proprio.dtype, np.number) or not np.isfinite(proprio).all():
            raise UserError(f"proprio: expected finite numbers, found {proprio}")
        if proprio.shape != (batch, proprios) or len(instructions) != batch:
            raise UserError(
                f"expected proprio[{batch}, {proprios}] and {batch} instructions for {batch} episodes, found "
                f"proprio{list(proprio.shape)} and {len(instructions)}"
            )

    def _prompt_tokens(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns prompts, padded to a multiple of their length in training: padding is not attended to."""
        for instruction in set(instructions) - self._prompts.keys():
            ids = self.prompt.encode(instruction)
            if len(ids) > self.longest_prompt:
                raise UserError(
                    f"instruction: expected a prompt of at most {self.longest_prompt} tokens, what {self.context} "
                    f"steps leave of the model's positions, found {len(ids)} for {instruction[:60]!r}; shorten it"
                )
            self._prompts[instruction] = ids
        longest = max(len(ids) for ids in self._prompts.values())
        length = -(-longest // self.prompt.length) * self.prompt.length
        return pad([self._prompts[instruction] for instruction in instructions], length)

    def _network(self, parameters: list[Array]) -> PolicyNetwork:
        large, count = iter(parameters), len(parameters) + len(self._constants)
        leaves = [self._constants[i] if i in self._constants else next(large) for i in range(count)]
        state = jax.tree.unflatten(self._structure, [jnp.asarray(leaf) for leaf in leaves])
        return nnx.merge(self._graph, state)

    def read(
        self, parameters: list[Array], ids: Int[Array, "B N"], mask: Bool[Array, "B N"]
    ) -> Reading:
        """Reads prompts; traceable. ``mask`` says which tokens exist."""
        return self._network(parameters).mllm.read(ids, mask)

    def compute(
        self,
        parameters: list[Array],
        reading: Reading,
        images: Mapping[str, UInt8[Array, "B H W 3"]],
        proprio: Float[Array, "B P"],
        first: Bool[Array, " B"],
        steps: Steps,
        key: Keys | None,
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, "B A"], Steps]:
        """Computes ``act`` for read prompts; traceable. Returns the actions and what is remembered from now on.

        A chunk that is decided on begins with the actions of ``prefix``.
        """
        network = self._network(parameters)
        seen = network.mllm.features({camera: image[:, None] for camera, image in images.items()})
        newest = network.mllm.bridged(seen, reading.instruction)
        count = jnp.where(first, 0, steps.count)
        full = count == self.context
        position = jnp.where(full, self.context - 1, count)

        def shift(kept: Array) -> Array:
            is_full = full.reshape(-1, *([1] * (kept.ndim - 1)))
            return jnp.where(is_full, jnp.roll(kept, -1, axis=1), kept)

        rows = jnp.arange(len(first))

        def keep(kept: Array, new: Array) -> Array:
            return shift(kept).at[rows, position].set(new[:, 0])

        latents = keep(steps.latents, newest)
        features = [keep(*pair) for pair in zip(steps.features, seen, strict=False)]
        past = shift(steps.tokens)
        step_mask = jnp.arange(self.context) <= position[:, None]
        plan = chunks.forget(steps.plan, first)
        due = chunks.due(plan)

        def decide() -> tuple[Array, Array]:
            tokens = network.act(self.name, reading, latents, step_mask, proprio, past, key, prefix)
            adapter = network.adapters[self.name]
            chunk = adapter.decode(tokens)
            if prefix is not None:  # exactly, whatever decoding rounds
                chunk = jnp.where(adapter.committed(prefix.count), prefix.actions, chunk)
            return tokens, chunk

        def wait() -> tuple[Array, Array]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(decide))

        # With chunks of one action, and with ensembling, every step decides.
        every_step = self.embodiment.chunk == 1 or self._ensembling is not None
        tokens, chunk = decide() if every_step else jax.lax.cond(due.any(), decide, wait)
        action, plan = chunks.take(chunks.push(plan, chunk, due), self._ensembling)
        if self._ensembling is not None and self.embodiment.chunk > 1:  # a mean need not be valid
            action = network.adapters[self.name].statistics.valid_action(action)
        past = past.at[rows, position].set(tokens)
        return action, Steps(latents, features, past, position + 1, plan)

    def latents_again(
        self, parameters: list[Array], reading: Reading, changed: Bool[Array, " B"], steps: Steps
    ) -> Steps:
        """Returns what is remembered of the episodes whose instruction changed as under the new instruction."""
        latents = steps.latents
        if self._reads_instruction:
            new = self._network(parameters).mllm.bridged(steps.features, reading.instruction)
            latents = jnp.where(changed[:, None, None, None], new, latents)
        return dataclasses.replace(steps, latents=latents, plan=chunks.forget(steps.plan, changed))


def _choose(config: NetworkConfig, embodiment: str | None, workdir: Path) -> str:
    """Returns the name of the embodiment; where none is asked for, that of the only one."""
    names = list(config.embodiments)
    if embodiment is None and len(names) == 1:
        return names[0]
    if embodiment not in names:
        raise UserError(
            f"embodiment: expected one of {', '.join(names)}, which {workdir} was trained for, found {embodiment!r}; "
            "name one of them"
        )
    return embodiment
