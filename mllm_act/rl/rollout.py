"""Rollouts: the policy draws actions in many simulators, half of which compute while the policy decides for the others.

The keys and values of every episode are kept on the device, so that a decision reads its new images only. They are made
again at the beginning of a rollout, when the parameters have changed.

An episode is a function of the run's seed, its simulator and its number; a draw is one of the run's seed, the update,
the step and the simulator. So a rollout does not depend on timing, and a run that is resumed goes on bit for bit: its
episodes are played again up to where they were.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from mllm_act import placement
from mllm_act.envs.base import EnvObservation, Job
from mllm_act.envs.episodes import Simulators, Step
from mllm_act.models import episode
from mllm_act.models.episode import Memory
from mllm_act.policy.network import PolicyNetwork
from mllm_act.policy.prompt import Prompt, pad
from mllm_act.rl import losses
from mllm_act.rl.segments import Grid, Segment
from mllm_act.rl.update import Recipe

HALVES = 2


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Which episodes a run plays.

    Attributes:
      tasks: each as often as the others.
      configurations: likewise.
      seed: of the run.
    """

    tasks: tuple[str, ...]
    configurations: range
    seed: int

    def job(self, slot: int, number: int) -> Job:
        """Returns episode ``number`` of a simulator."""
        rng = np.random.default_rng((self.seed, slot, number))
        task = self.tasks[rng.integers(len(self.tasks))]
        configuration = self.configurations[int(rng.integers(len(self.configurations)))]
        return Job(task, configuration, int(rng.integers(2**31)))


@dataclasses.dataclass
class Player:
    """One simulator's episode.

    Attributes:
      number: of the episode.
      actions: executed so far; None for those that stand for nothing.
      earned: the sum of rewards so far.
      segment: the steps that its memory holds, and the newest observation.
    """

    number: int
    segment: Segment
    actions: list[list[float] | None] = dataclasses.field(default_factory=list)
    earned: float = 0.0

    def see(self, observation: EnvObservation, context: int) -> Segment | None:
        """Adds the newest observation; returns the segment before, where a new one begins."""
        full = None
        if len(self.segment.cells) == context:
            full, self.segment = self.segment, Segment(self.segment.prompt)
        self.segment.see(observation)
        return full


@dataclasses.dataclass
class Report:
    """What happened in a rollout: one entry per episode that ended in it, and counts.

    Attributes:
      episodes: return, length and success of each.
      lost: episodes that were dropped because their simulator's process died.
      invalid: actions that stood for nothing.
    """

    episodes: list[tuple[float, int, bool]] = dataclasses.field(default_factory=list)
    lost: int = 0
    invalid: int = 0

    def metrics(self, steps: int) -> dict[str, float]:
        """Returns scalars; those of episodes are NaN where none ended."""
        table = np.array(self.episodes, float).reshape(-1, 3)
        means = table.mean(0) if len(table) else np.full(3, np.nan)
        return {
            "success": float(means[2]), "return": float(means[0]), "length": float(means[1]),
            "episodes": float(len(table)), "lost": float(self.lost), "invalid": self.invalid / steps,
        }  # fmt: skip


def decide(
    recipe: Recipe,
    trained: nnx.State,
    frozen: nnx.State,
    memory: Memory,
    images: Mapping[str, Array],
    proprio: Array,
    position: Array,
    key: PRNGKeyArray,
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


class Rollout:
    """The simulators of a run, and the episodes that they play."""

    def __init__(
        self,
        recipe: Recipe,
        simulators: Simulators,
        episodes: Episodes,
        prompt: Prompt,
        cameras: Sequence[str],
        bootstrap: bool,
        context: int,
        steps: int,
        count: int,
    ) -> None:
        """Compiles nothing and starts no episode yet.

        Args:
          recipe: see there.
          simulators: as many as ``count``.
          episodes: which they play.
          prompt: turns instructions into tokens.
          cameras: that the policy sees.
          bootstrap: whether the last observation at a time limit has a value.
          context: T, the steps that a memory holds.
          steps: of a rollout, in each simulator.
          count: E, the simulators.
        """
        self.recipe, self.simulators, self.episodes = recipe, simulators, episodes
        self.prompt, self.cameras, self.bootstrap = prompt, tuple(cameras), bootstrap
        self.context, self.steps, self.count = context, steps, count
        self.players: list[Player] = []
        self._half = count // HALVES
        self._chunk = max(1, self._half // 8)  # rows whose prompts are read together
        self._key = jax.random.key(episodes.seed)
        self._batch = NamedSharding(recipe.mesh, PartitionSpec(placement.BATCH))
        self._memories: list[Memory] = []
        self._empty: Any = None

    def start(self, saved: Sequence[Any] | None = None) -> None:
        """Begins the first episodes, or plays those of ``state`` again up to where they were."""
        saved = [[0, [], 0.0]] * self.count if saved is None else saved
        slots = range(self.count)
        jobs = [self.episodes.job(slot, saved[slot][0]) for slot in slots]
        past = [saved[slot][1] for slot in slots]
        seen = self.simulators.begin(slots, jobs, past)
        for (number, actions, earned), observations in zip(saved, seen, strict=True):
            player = self._player(number, observations[0])
            for observation in observations[1:]:
                player.see(observation, self.context)
            player.actions, player.earned = list(actions), earned
            self.players.append(player)

    def state(self) -> list[Any]:
        """Returns what ``start`` needs to go on, as plain JSON types."""
        return [[p.number, p.actions, p.earned] for p in self.players]

    def _player(self, number: int, first: EnvObservation) -> Player:
        instruction = str(first["instruction"])
        self.prompt.tokens([instruction])  # reports one that is too long
        segment = Segment(self.prompt.encode(instruction))
        segment.see(first)
        return Player(number, segment)

    def collect(
        self, trained: nnx.State, frozen: nnx.State, update: int
    ) -> tuple[list[Segment], Grid, Report]:
        """Plays ``steps`` steps in every simulator.

        Args:
          trained: parameters.
          frozen: the others.
          update: its number, from 1 on.

        Raises:
          UserError: of the environment, a reward is not finite, or workers die again and again.
        """
        grid, report = Grid.empty(self.steps, self.count), Report()
        done: list[list[Segment]] = [[] for _ in range(self.count)]
        self._compile(trained, frozen)
        halves = [range(h * self._half, (h + 1) * self._half) for h in range(HALVES)]
        for h, slots in enumerate(halves):
            self._memories[h] = self._refill(trained, frozen, self._memories[h], slots)
        key = jax.random.fold_in(self._key, update)
        for step in range(self.steps + 1):
            for h, slots in enumerate(halves):
                if step > 0:
                    begun = [
                        slot
                        for slot in slots
                        if self._receive(slot, step - 1, grid, report, done[slot])
                    ]
                    self._read(trained, frozen, h, slots, begun)
                if step < self.steps:
                    self._act(trained, frozen, h, slots, step, key, grid, report)
        segments = [segment for parts in done for segment in parts]
        for slot, player in enumerate(self.players):
            segments.append(self._cut(slot, player, grid))
        return [segment for segment in segments if segment.counts], grid, report

    def _cut(self, slot: int, player: Player, grid: Grid) -> Segment:
        """Ends the rollout in an episode that goes on: its newest observation has a value."""
        segment, cell = player.segment, (self.steps - 1) * self.count + slot
        if grid.exists[-1, slot] and not grid.last[-1, slot]:
            segment.values_of[-1] = cell
            grid.last[-1, slot] = True
        player.segment = segment.past(len(segment.cells))
        return segment

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _act(
        self,
        trained: nnx.State,
        frozen: nnx.State,
        h: int,
        slots: range,
        step: int,
        key: PRNGKeyArray,
        grid: Grid,
        report: Report,
    ) -> None:
        players = [self.players[slot] for slot in slots]
        newest = [player.segment.observations[-1] for player in players]
        images = {c: np.stack([o["images"][c] for o in newest]) for c in self.cameras}
        proprio = np.stack([o["proprio"] for o in newest]).astype(np.float32)
        position = np.array([len(p.segment.cells) - 1 for p in players], np.int32)
        put = partial(jax.device_put, device=self._batch)
        tokens, actions, log_probs, self._memories[h] = self._decide(
            trained, frozen, self._memories[h], *put((images, proprio, position)),
            jax.random.fold_in(key, step), put(np.array(slots, np.int32)),
        )  # fmt: skip
        tokens, actions, log_probs = jax.device_get((tokens, actions, log_probs))
        discrete = trained is not None and self._discrete
        for i, slot in enumerate(slots):
            player, action = players[i], actions[i]
            nothing = discrete and action[0] < 0
            report.invalid += int(nothing)
            player.actions.append(None if nothing else [float(x) for x in action])
            player.segment.tokens[-1] = tokens[i]
            player.segment.cells[-1] = step * self.count + slot
            grid.exists[step, slot] = True
            grid.log_probs[step, slot] = log_probs[i]
            then = self.episodes.job(slot, player.number + 1)
            self.simulators.send(slot, None if nothing else action, then)

    def _receive(
        self, slot: int, step: int, grid: Grid, report: Report, done: list[Segment]
    ) -> bool:
        """Takes what followed an action; returns whether an episode has begun."""
        player, result = self.players[slot], self.simulators.receive(slot)
        if result is None:
            self._lose(slot, grid, report, done)
            return True
        grid.rewards[step, slot] = result.reward
        player.earned += result.reward
        cut = result.over and not result.success and self.bootstrap
        if not result.over or cut:
            full = player.see(result.observation, self.context)
            if full is not None:
                done.append(full)
        if not result.over:
            return False
        grid.last[step, slot] = True
        if cut:
            player.segment.values_of[-1] = step * self.count + slot
        done.append(player.segment)
        report.episodes.append((player.earned, len(player.actions), result.success))
        self._next(slot, result)
        return True

    def _next(self, slot: int, result: Step) -> None:
        assert result.first is not None
        number = self.players[slot].number + 1
        self.simulators.doing(slot, self.episodes.job(slot, number))
        self.players[slot] = self._player(number, result.first)

    def _lose(self, slot: int, grid: Grid, report: Report, done: list[Segment]) -> None:
        """Drops the episode of a simulator that died, and begins the next one."""
        player = self.players[slot]
        report.lost += 1
        for segment in (*done, player.segment):
            if segment is player.segment or segment.prompt is player.segment.prompt:
                for cell in segment.cells:
                    if cell >= 0:
                        grid.exists[divmod(cell, self.count)] = False
        done[:] = [s for s in done if s.prompt is not player.segment.prompt]
        job = self.episodes.job(slot, player.number + 1)
        ((first,),) = self.simulators.begin([slot], [job], [[]])
        self.players[slot] = self._player(player.number + 1, first)

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _compile(self, trained: nnx.State, frozen: nnx.State) -> None:
        if self._memories:
            return
        network: PolicyNetwork = nnx.merge(self.recipe.graph, trained, frozen)
        self._discrete = network.adapters[self.recipe.name].discrete
        latents = network.mllm.config.latents_per_image * len(self.cameras)

        def empty() -> Memory:
            merged: PolicyNetwork = nnx.merge(self.recipe.graph, trained, frozen)
            return episode.empty(merged.mllm, self._half, self.prompt.length, self.context, latents)

        shapes = jax.eval_shape(empty)

        def where(leaf: Any) -> NamedSharding:
            axis = leaf.ndim - 4 if leaf.ndim >= 4 else 0
            return NamedSharding(self.recipe.mesh, PartitionSpec(*[None] * axis, placement.BATCH))

        shardings = jax.tree.map(where, shapes)
        zeros = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            out_shardings=shardings,
        )
        self._memories = [zeros() for _ in range(HALVES)]
        self._decide = jax.jit(
            partial(decide, self.recipe),
            donate_argnums=2,
            out_shardings=(None, None, None, shardings),
        )
        self._read_rows = jax.jit(
            partial(read, self.recipe), donate_argnums=2, out_shardings=shardings
        )

    def _refill(
        self, trained: nnx.State, frozen: nnx.State, memory: Memory, slots: range
    ) -> Memory:
        """Reads all prompts, and the steps that episodes had before this rollout, with its parameters."""
        fresh = [s for s in slots if len(self.players[s].segment.cells) == 1]
        memory = self._into(trained, frozen, memory, slots, fresh, 0)
        running = [s for s in slots if s not in set(fresh)]
        return self._into(trained, frozen, memory, slots, running, self.context)

    def _read(
        self, trained: nnx.State, frozen: nnx.State, h: int, slots: range, begun: list[int]
    ) -> None:
        self._memories[h] = self._into(trained, frozen, self._memories[h], slots, begun, 0)

    def _into(
        self,
        trained: nnx.State,
        frozen: nnx.State,
        memory: Memory,
        slots: range,
        chosen: Sequence[int],
        steps: int,
    ) -> Memory:
        """Reads the prompts of some players, and up to ``steps`` past steps, into their rows."""
        for first in range(0, len(chosen), self._chunk):
            some = list(chosen[first : first + self._chunk])
            some += [some[0]] * (self._chunk - len(some))  # the same values once more
            segments = [self.players[slot].segment for slot in some]
            rows = np.array(some, np.int32) - slots[0]
            ids, mask = pad([segment.prompt for segment in segments], self.prompt.length)
            step_mask = np.zeros((len(some), steps), bool)
            images = {}
            if steps:
                images = self._past_images(segments, steps)
                for row, segment in enumerate(segments):
                    step_mask[row, : len(segment.cells) - 1] = True
            memory = self._read_rows(trained, frozen, memory, rows, ids, mask, images, step_mask)
        return memory

    def _past_images(self, segments: Sequence[Segment], steps: int) -> dict[str, np.ndarray]:
        first = segments[0].observations[0]["images"]
        images = {
            c: np.zeros((len(segments), steps, *first[c].shape), np.uint8) for c in self.cameras
        }
        for row, segment in enumerate(segments):
            for t, observation in enumerate(segment.observations[:-1]):
                for camera in self.cameras:
                    images[camera][row, t] = observation["images"][camera]
        return images
