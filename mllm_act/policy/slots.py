"""Many episodes of one policy that do not keep step: any few of them act together, each with its own memory.

    slots = Slots(policy, count=64, sizes=(1, 2, 4, 8), tokens=32)
    slots.compile()
    slots.read(5, "press the button", again=False)
    chunks, actions = slots.act([5], images, proprio, first=np.array([True]), decide=np.array([True]))

A slot is one row of arrays that stay on the device: what the policy remembers of an episode, and its instruction as
last read. Acting takes the rows of a batch, computes as ``Policy.act`` does, and writes them back in place, in one
compiled program for each batch size. Smaller batches are padded; padding writes to no row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from mllm_act.errors import UserError
from mllm_act.models.mllm import Reading
from mllm_act.policy import chunks
from mllm_act.policy.network import Prefix
from mllm_act.policy.policy import Policy, Steps
from mllm_act.policy.prompt import pad


def _row(steps: Any, row: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), steps)


def _put(old: Array, new: Array, row: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)


class Slots:
    """The memories of ``count`` episodes. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        policy: Policy,
        count: int,
        sizes: Sequence[int],
        tokens: int,
        image_shapes: Mapping[str, tuple[int, int, int]],
        sample: bool = False,
    ) -> None:
        """Makes empty slots.

        Args:
          policy: acts.
          count: of slots.
          sizes: of batches, ascending; one program is compiled for each.
          tokens: that prompts are padded to.
          image_shapes: (height, width, 3) of each camera.
          sample: draw actions, with a key for each row, instead of taking the most likely.

        Raises:
          UserError: if prompts of so many tokens do not fit the model.
        """
        longest = policy.longest_prompt
        if not 1 <= tokens <= longest:
            raise UserError(
                f"prompt tokens: expected 1 to {longest}, what {policy.context} steps leave of the model's positions, "
                f"found {tokens}"
            )
        self.policy, self.count, self.sizes, self.tokens = policy, count, tuple(sizes), tokens
        self.image_shapes, self.sample = dict(image_shapes), sample
        self._act = jax.jit(self._compute, donate_argnames="steps")
        self._row = jax.jit(_row)
        self._put = jax.jit(
            lambda steps, one, row: jax.tree.map(lambda x, y: _put(x, y, row), steps, one),
            donate_argnums=0,
        )
        self._read = jax.jit(self._compute_reading, donate_argnames=("steps", "reading"))
        self.clear()

    def clear(self) -> None:
        """Empties all slots."""
        self._steps = self.policy.start(self.count).steps
        ids = jnp.zeros((self.count, self.tokens), jnp.int32)
        shapes = jax.eval_shape(self.policy.read, self.policy.parameters, ids, ids.astype(bool))
        reading = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        self._reading = jax.device_put(reading, self.policy.parameters[0].sharding)

    def compile(self) -> None:
        """Compiles the programs for all batch sizes, and runs each once. Slots are not changed."""
        none = self.count
        self._read_into(
            none - 1, *pad([self.policy.prompt.encode("")[: self.tokens]], self.tokens), True
        )
        self.clear()
        for size in self.sizes:
            self.act(
                [none] * size,
                {
                    camera: np.zeros((size, *shape), np.uint8)
                    for camera, shape in self.image_shapes.items()
                },
                np.zeros((size, self.policy.proprios), np.float32),
                np.ones(size, bool),
                np.ones(size, bool),
                np.zeros((size, 2), np.uint32) if self.sample else None,
            )

    def encode(self, instruction: str) -> list[int]:
        """Returns the token ids of an instruction's prompt.

        Raises:
          UserError: if there are too many.
        """
        ids = self.policy.prompt.encode(instruction)
        if len(ids) > self.tokens:
            raise UserError(
                f"prompt: expected an instruction whose prompt has at most {self.tokens} tokens, found {len(ids)} for "
                f"{instruction[:60]!r}; shorten it, or start the server with --prompt-tokens={len(ids)}"
            )
        return ids

    def read(self, slot: int, ids: Sequence[int], again: bool) -> None:
        """Reads a new instruction into a slot.

        Args:
          slot: below ``count``.
          ids: of its prompt, see ``encode``.
          again: whether it changes inside an episode: then what is remembered is seen under the new instruction.
        """
        self._read_into(slot, *pad([ids], self.tokens), again)

    def _read_into(
        self, slot: int, ids: Int[np.ndarray, "1 N"], mask: Bool[np.ndarray, "1 N"], again: bool
    ) -> None:
        self._steps, self._reading = self._read(
            self.policy.parameters, self._steps, self._reading, np.int32(slot), ids, mask, np.array([again])
        )  # fmt: skip

    def save(self, slot: int) -> list[np.ndarray]:
        """Returns what is remembered in a slot, without the instruction; numbers of 16 bits as integers."""
        leaves = jax.device_get(jax.tree.leaves(self._row(self._steps, np.int32(slot))))
        return [x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for x in leaves]

    def restore(self, slot: int, arrays: Sequence[np.ndarray], ids: Sequence[int]) -> None:
        """Puts what ``save`` returned into a slot, and reads the instruction with the token ids ``ids``.

        Raises:
          ValueError: the arrays are of another policy.
        """
        like, structure = jax.tree.flatten(jax.eval_shape(self._row, self._steps, np.int32(slot)))
        if len(like) != len(arrays):
            raise ValueError(f"expected {len(like)} arrays, found {len(arrays)}")
        leaves = [
            array.view(jnp.bfloat16) if leaf.dtype == jnp.bfloat16 else array
            for array, leaf in zip(arrays, like, strict=True)
        ]
        for array, leaf in zip(leaves, like, strict=True):
            if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(
                    f"expected {leaf.dtype}{leaf.shape}, found {array.dtype}{array.shape}"
                )
        self._steps = self._put(self._steps, jax.tree.unflatten(structure, leaves), np.int32(slot))
        self.read(slot, ids, again=False)

    def act(
        self,
        slots: Sequence[int],
        images: Mapping[str, UInt8[np.ndarray, "B H W 3"]],
        proprio: Float[np.ndarray, "B P"],
        first: Bool[np.ndarray, " B"],
        decide: Bool[np.ndarray, " B"],
        words: UInt32[np.ndarray, "B 2"] | None = None,
        committed: Sequence[Float[np.ndarray, "_ A"] | None] | None = None,
    ) -> tuple[Float[np.ndarray, "B chunk A"], Float[np.ndarray, "B A"]]:
        """Takes one observation into each of the slots, and decides.

        Args:
          slots: distinct; B of them, at most the largest size.
          images: the newest frame of each camera, of the shape in ``image_shapes``.
          proprio: in the environment's units.
          first: which begin an episode with this observation.
          decide: which decide on a new chunk now, even if the last one is not used up.
          words: of each row's random key; needed if and only if it samples.
          committed: the actions of each that are executed from this observation on while it is decided; at most
            ``max_delay`` of the policy. The chunk begins with them.

        Returns:
          The newest chunk of each, H actions, and the action to take now, in the environment's units.
        """
        batch = len(slots)
        size = next(size for size in self.sizes if size >= batch)
        rows = np.full(size, self.count, np.int32)  # padding: outside, so that nothing is written
        rows[:batch] = slots

        def padded(x: np.ndarray) -> np.ndarray:
            return (
                np.concatenate([x, np.zeros((size - batch, *x.shape[1:]), x.dtype)])
                if size > batch
                else x
            )

        action, chunk, self._steps = self._act(
            self.policy.parameters,
            self._reading,
            rows,
            {camera: padded(images[camera]) for camera in self.policy.embodiment.cameras},
            padded(proprio),
            padded(first),
            padded(decide),
            None if words is None else padded(words),
            self._prefix(committed or [], size),
            steps=self._steps,
        )
        action, chunk = jax.device_get((action, chunk))
        return chunk[:batch], action[:batch]

    def _prefix(
        self, committed: Sequence[Float[np.ndarray, "_ A"] | None], size: int
    ) -> Prefix | None:
        embodiment = self.policy.embodiment
        if not embodiment.max_delay:
            return None
        actions = np.zeros((size, embodiment.chunk, self.policy.actions), np.float32)
        count = np.zeros(size, np.int32)
        for i, given in enumerate(committed):
            if given is not None:
                actions[i, : len(given)], count[i] = given, len(given)
        return Prefix(actions.reshape(size, -1), count)  # type: ignore[arg-type]

    def _compute(
        self,
        parameters: list[Array],
        reading: Reading,
        rows: Int[Array, " B"],
        images: Mapping[str, UInt8[Array, "B H W 3"]],
        proprio: Float[Array, "B P"],
        first: Bool[Array, " B"],
        decide: Bool[Array, " B"],
        words: UInt32[Array, "B 2"] | None,
        prefix: Prefix | None,
        steps: Steps,
    ) -> tuple[Float[Array, "B A"], Float[Array, "B chunk A"], Steps]:
        some = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), steps)
        some = dataclasses.replace(some, plan=chunks.forget(some.plan, decide))
        instruction = reading.instruction
        read = Reading(
            jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4, mode="clip"), reading.cache),
            reading.mask.at[rows].get(mode="clip"),
            None if instruction is None else instruction.at[rows].get(mode="clip"),
        )
        key = None if words is None else jax.random.wrap_key_data(words, impl="threefry2x32")
        action, some = self.policy.compute(
            parameters, read, images, proprio, first, some, key, prefix
        )
        steps = jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), steps, some)
        return action, some.plan.chunks[:, -1], steps

    def _compute_reading(
        self,
        parameters: list[Array],
        steps: Steps,
        reading: Reading,
        row: Int[Array, ""],
        ids: Int[Array, "1 N"],
        mask: Bool[Array, "1 N"],
        again: Bool[Array, " 1"],
    ) -> tuple[Steps, Reading]:
        new = self.policy.read(parameters, ids, mask)
        one = _row(steps, row)
        one = self.policy.latents_again(parameters, new, again, one)

        def put(old: Array, new: Array, axis: int = 0) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, row, axis)

        cache = jax.tree.map(lambda x, y: put(x, y, x.ndim - 4), reading.cache, new.cache)
        instruction = reading.instruction
        if instruction is not None and new.instruction is not None:
            instruction = put(instruction, new.instruction)
        return jax.tree.map(put, steps, one), Reading(
            cache, put(reading.mask, new.mask), instruction
        )
