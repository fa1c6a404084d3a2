"""Rollouts: the policy draws actions in many simulators, half of which compute while the policy decides for the others.

The keys and values of every episode are kept on the device, so that a decision reads its new images only. They are made
again at the beginning of a rollout, when the parameters have changed.

An episode is a function of the run's seed, its simulator and its number; a draw is one of the run's seed, the update,
the step and the simulator. So a rollout does not depend on timing, and a run that is resumed goes on bit for bit: its
episodes are played again up to where they were.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from mllm_act.envs.base import EnvObservation
from mllm_act.envs.episodes import Simulators, Step
from mllm_act.policy.prompt import Prompt
from mllm_act.rl.acting import Actor
from mllm_act.rl.episodes import Episodes, Player, Report
from mllm_act.rl.segments import Grid, Segment
from mllm_act.rl.update import Recipe

HALVES = 2


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
        discrete: bool,
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
          discrete: whether actions are indices.
          context: T, the steps that a memory holds.
          steps: of a rollout, in each simulator.
          count: E, the simulators.
        """
        self.recipe, self.simulators, self.episodes = recipe, simulators, episodes
        self.prompt, self.cameras, self.bootstrap = prompt, tuple(cameras), bootstrap
        self.discrete, self.context, self.steps, self.count = discrete, context, steps, count
        self.players: list[Player] = []
        self._key = jax.random.key(episodes.seed)
        self._actors: list[Actor] = []

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
        actors = self._halves(trained, frozen)
        for actor in actors:
            actor.refill(trained, frozen, self._segments(actor))
        key = jax.random.fold_in(self._key, update)
        for step in range(self.steps + 1):
            for actor in actors:
                if step > 0:
                    received = [
                        self._receive(slot, step - 1, grid, report, done[slot])
                        for slot in actor.slots
                    ]
                    begun = [row for row, new in enumerate(received) if new]
                    actor.read(trained, frozen, self._segments(actor), begun)
                if step < self.steps:
                    drawn = actor.act(
                        trained, frozen, self._segments(actor), jax.random.fold_in(key, step)
                    )
                    for slot, tokens, action, log_prob in zip(actor.slots, *drawn, strict=True):
                        self._send(slot, step, tokens, action, grid, report)
                        grid.log_probs[step, slot] = log_prob
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

    def _halves(self, trained: nnx.State, frozen: nnx.State) -> list[Actor]:
        half = self.count // HALVES
        compiled: dict[str, Any] = {}
        for h in range(HALVES if not self._actors else 0):
            slots = range(h * half, (h + 1) * half)
            self._actors.append(
                Actor(
                    self.recipe, compiled, trained, frozen, slots, self.cameras,
                    self.prompt.length, self.context,
                )
            )  # fmt: skip
        return self._actors

    def _segments(self, actor: Actor) -> list[Segment]:
        return [self.players[slot].segment for slot in actor.slots]

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _send(
        self,
        slot: int,
        step: int,
        tokens: np.ndarray,
        action: np.ndarray,
        grid: Grid,
        report: Report,
    ) -> None:
        """Has a simulator execute an action; tokens that are none decode to -1 (see ``adapters.language``)."""
        player = self.players[slot]
        nothing = self.discrete and action[0] < 0
        report.invalid += int(nothing)
        player.actions.append(None if nothing else [float(x) for x in action])
        player.segment.tokens[-1] = tokens
        player.segment.cells[-1] = step * self.count + slot
        grid.exists[step, slot] = True
        then = self.episodes.job(slot, player.number + 1)
        self.simulators.send(slot, None if nothing else action, then)

    def _receive(
        self, slot: int, step: int, grid: Grid, report: Report, done: list[Segment]
    ) -> bool:
        """Takes what followed an action; returns whether an episode has begun."""
        player, result = self.players[slot], self.simulators.receive(slot)
        if result is None:
            grid.over[step, slot] = True
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
        grid.last[step, slot] = grid.over[step, slot] = True
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
