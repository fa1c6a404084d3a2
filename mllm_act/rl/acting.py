"""The policy in a rollout: it draws actions, and keeps the keys and values of every episode on the device."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mllm_act import placement
from mllm_act.models import episode
from mllm_act.models.episode import Memory
from mllm_act.policy.network import PolicyNetwork
from mllm_act.policy.prompt import pad
from mllm_act.rl import losses
from mllm_act.rl.segments import Segment
from mllm_act.rl.update import Recipe


def decide(
    recipe: Recipe,
    trained: nnx.State,
    frozen: nnx.State,
    memory: Memory,
    images: Mapping[str, Array],
    proprio: Array,
    position: Array,
    key: Array,
    slots: Array,
) -> tuple[Array, Array, Array, Memory]:
    """Draws the actions of one half; returns tokens, actions, log-probabilities and the new memory."""
    with recipe.placed():
        network: PolicyNetwork = nnx.merge(recipe.graph, trained, frozen)
        mllm, adapter = network.mllm, network.adapter(recipe.name)
        seen = mllm.features({camera: image[:, None] for camera, image in images.items()})
        latents = mllm.bridged(seen, memory.instruction)[:, 0]
        hidden, decoding, memory = episode.look(mllm, memory, latents, position)
        states = [hidden]

        def extend(embedding: Array, decoding: Any) -> tuple[Array, Any]:
            hidden, decoding = mllm.extend(embedding, decoding)
            states.append(hidden)
            return hidden, decoding

        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, slots)
        proprio = adapter.statistics.normalize_proprio(proprio)
        tokens = adapter.sample(hidden, proprio, extend, decoding, keys)
        # The tokens after the last one that is chosen have probability 1, whatever the hidden state.
        states += [states[-1]] * (adapter.tokens_per_action - len(states))
        log_probs, column = adapter.log_probs(jnp.stack(states, 1)[:, None], tokens[:, None])
        log_prob = losses.log_prob(log_probs, column, recipe.ppo.log_prob)[:, 0]
    return tokens, adapter.decode(tokens), log_prob, memory


def read(
    recipe: Recipe, trained: nnx.State, frozen: nnx.State, memory: Memory, *inputs: Any
) -> Memory:
    """``models.episode.read`` of the network."""
    with recipe.placed():
        network: PolicyNetwork = nnx.merge(recipe.graph, trained, frozen)
        return episode.read(network.mllm, memory, *inputs)


class Actor:
    """The policy with the memory of B episodes: one half of a rollout."""

    def __init__(
        self,
        recipe: Recipe,
        compiled: dict[str, Any],
        trained: nnx.State,
        frozen: nnx.State,
        slots: range,
        cameras: Sequence[str],
        prompt_tokens: int,
        context: int,
    ) -> None:
        """Makes an empty memory.

        Args:
          recipe: see there.
          compiled: of actors of the same sizes, filled by the first.
          trained: parameters, for their shapes.
          frozen: the others.
          slots: the simulators that it decides for.
          cameras: that it sees.
          prompt_tokens: N.
          context: T.
        """
        self.slots, self._cameras, self._context = slots, tuple(cameras), context
        self._prompt_tokens = prompt_tokens
        self._chunk = max(1, len(slots) // 8)  # rows whose prompts are read together
        self._batch = NamedSharding(recipe.mesh, PartitionSpec(placement.BATCH))

        def empty() -> Memory:
            mllm = nnx.merge(recipe.graph, trained, frozen).mllm
            latents = mllm.config.latents_per_image * len(self._cameras)
            return episode.empty(mllm, len(slots), prompt_tokens, context, latents)

        shapes = jax.eval_shape(empty)

        def where(leaf: Any) -> NamedSharding:
            axis = leaf.ndim - 4 if leaf.ndim >= 4 else 0
            partition = PartitionSpec(*[None] * axis, placement.BATCH)
            return NamedSharding(recipe.mesh, partition)

        shardings = jax.tree.map(where, shapes)
        if not compiled:
            compiled["zeros"] = jax.jit(
                lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
                out_shardings=shardings,
            )
            compiled["decide"] = jax.jit(
                partial(decide, recipe),
                donate_argnums=2,
                out_shardings=(None, None, None, shardings),
            )
            compiled["read"] = jax.jit(
                partial(read, recipe), donate_argnums=2, out_shardings=shardings
            )
        self._compiled = compiled
        self._memory: Memory = compiled["zeros"]()

    def act(
        self,
        trained: nnx.State,
        frozen: nnx.State,
        segments: Sequence[Segment],
        key: Array,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws an action for the newest observation of each segment; returns tokens, actions and log-probabilities."""
        newest = [segment.observations[-1] for segment in segments]
        images = {c: np.stack([o["images"][c] for o in newest]) for c in self._cameras}
        proprio = np.stack([o["proprio"] for o in newest]).astype(np.float32)
        position = np.array([len(segment.cells) - 1 for segment in segments], np.int32)
        inputs = (images, proprio, position, np.array(self.slots, np.int32))
        images, proprio, position, slots = jax.device_put(inputs, self._batch)
        *drawn, self._memory = self._compiled["decide"](
            trained, frozen, self._memory, images, proprio, position, key, slots
        )
        tokens, actions, log_probs = jax.device_get(drawn)
        return tokens, actions, log_probs

    def refill(self, trained: nnx.State, frozen: nnx.State, segments: Sequence[Segment]) -> None:
        """Reads all prompts, and the steps that the episodes have had, with new parameters."""
        fresh = [i for i, segment in enumerate(segments) if len(segment.cells) == 1]
        running = [i for i, segment in enumerate(segments) if len(segment.cells) > 1]
        self.read(trained, frozen, segments, fresh)
        self.read(trained, frozen, segments, running, self._context)

    def read(
        self,
        trained: nnx.State,
        frozen: nnx.State,
        segments: Sequence[Segment],
        rows: Sequence[int],
        steps: int = 0,
    ) -> None:
        """Reads the prompts of some rows, and up to ``steps`` past steps of each."""
        for first in range(0, len(rows), self._chunk):
            some = list(rows[first : first + self._chunk])
            some += [some[0]] * (self._chunk - len(some))  # the same values once more
            chosen = [segments[row] for row in some]
            ids, mask = pad([segment.prompt for segment in chosen], self._prompt_tokens)
            step_mask = np.zeros((len(some), steps), bool)
            images = {}
            if steps:
                images = self._past_images(chosen, steps)
                for i, segment in enumerate(chosen):
                    step_mask[i, : len(segment.cells) - 1] = True
            self._memory = self._compiled["read"](
                trained, frozen, self._memory, np.array(some, np.int32), ids, mask, images,
                step_mask,
            )  # fmt: skip

    def _past_images(self, segments: Sequence[Segment], steps: int) -> dict[str, np.ndarray]:
        first = segments[0].observations[0]["images"]
        images = {
            c: np.zeros((len(segments), steps, *first[c].shape), np.uint8) for c in self._cameras
        }
        for row, segment in enumerate(segments):
            for t, observation in enumerate(segment.observations[:-1]):
                for camera in self._cameras:
                    images[camera][row, t] = observation["images"][camera]
        return images
