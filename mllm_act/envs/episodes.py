"""Simulators for reinforcement learning: each plays one episode after another, and a dead one is replaced.

Requests and answers are separate, so that some simulators compute while the policy decides for others. A worker begins
the next episode in the same request that ends the last one.
"""

import importlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mllm_act import envs
from mllm_act.envs.base import EnvObservation, Job
from mllm_act.envs.processes import TIMEOUT, DeadWorker, Worker
from mllm_act.errors import UserError

REPLACED = 3  # how often a worker may die without an answer in between


class Step(NamedTuple):
    """What followed an action.

    Attributes:
      observation: after the action.
      reward: of the action.
      success: whether the task is solved.
      over: whether the episode has ended, by success or at the horizon.
      first: the first observation of the next episode, if this one is over.
    """

    observation: EnvObservation
    reward: float
    success: bool
    over: bool
    first: EnvObservation | None


class Simulators:
    """``count`` simulators (slots 0 to count - 1) in worker processes. Use as a context manager."""

    def __init__(
        self, name: str, count: int, workers: int, horizon: int, timeout: float = TIMEOUT
    ) -> None:
        """Starts the processes.

        Args:
          name: of the environment.
          count: the simulators.
          workers: processes, at most one per simulator.
          horizon: steps of an episode at most.
          timeout: seconds that one simulator may take for a step and a reset.
        """
        self._arguments: dict[str, Any] = {
            "timeout": timeout, "module": envs.ENVS[name], "horizon": horizon,
        }  # fmt: skip
        self._workers = [self._start() for _ in range(min(workers, count))]
        # A worker answers in the order of its requests; the answers may be asked for in another.
        self._asked: list[deque[int]] = [deque() for _ in self._workers]  # slots
        self._answers: dict[int, Any] = {}  # by slot; None from a worker that died
        self._deaths = [0] * len(self._workers)
        self._doing = [""] * count

    def _start(self) -> Worker:
        return Worker("mllm_act.envs.episodes:serve", **self._arguments)

    def begin(
        self, slots: Sequence[int], jobs: Sequence[Job], actions: Sequence[Sequence[Any]]
    ) -> list[list[EnvObservation]]:
        """Starts episodes and executes their first actions again; returns all observations of each.

        Raises:
          UserError: of the environment, or workers die again and again.
        """
        requests = dict(zip(slots, zip(jobs, map(list, actions), strict=True), strict=True))
        found: dict[int, list[EnvObservation]] = {}
        while missing := [slot for slot in slots if slot not in found]:  # again, if a worker died
            for slot in missing:
                job, past = requests[slot]
                self.doing(slot, job)
                self._send(slot, ("begin", slot, job, past))
            answers = {slot: self._answer(slot) for slot in missing}
            found |= {slot: answer for slot, answer in answers.items() if answer is not None}
        return [found[slot] for slot in slots]

    def send(self, slot: int, action: np.ndarray | None, then: Job) -> None:
        """Has a simulator execute an action, float32[A]; None executes nothing and takes a step all the same.

        ``then`` is the episode that it begins if this one is over.
        """
        self._send(slot, ("step", slot, action, then))

    def receive(self, slot: int) -> Step | None:
        """Returns what followed the action that was sent, or None if the worker died: its episodes are lost.

        The worker has then been replaced, and the slot has to ``begin``.

        Raises:
          UserError: of the environment, the reward is not finite, or workers die again and again.
        """
        step: Step | None = self._answer(slot)
        if step is not None and not np.isfinite(step.reward):
            raise UserError(
                f"{self._doing[slot]}: expected a finite reward, found {step.reward}; fix the environment"
            )
        return step

    def _answer(self, slot: int) -> Any:
        worker = slot % len(self._workers)
        while slot not in self._answers:
            first = self._asked[worker].popleft()
            try:
                self._answers[first] = self._workers[worker].receive(self._doing[first])
                self._deaths[worker] = 0
            except DeadWorker as error:
                self._replace(worker, error)
                self._answers |= dict.fromkeys((first, *self._asked[worker]))
                self._asked[worker].clear()
        return self._answers.pop(slot)

    def _replace(self, worker: int, error: DeadWorker) -> None:
        self._deaths[worker] += 1
        if self._deaths[worker] > REPLACED:
            raise UserError(
                f"{error}; it was replaced {REPLACED} times and died again before it gave an answer"
            ) from error
        self._workers[worker].close()
        self._workers[worker] = self._start()

    def doing(self, slot: int, job: Job) -> None:
        """Names the episode of a slot, for errors."""
        self._doing[slot] = f"{job.task}, configuration {job.configuration}, seed {job.seed}"

    def _send(self, slot: int, request: Any) -> None:
        worker = slot % len(self._workers)
        self._asked[worker].append(slot)
        self._workers[worker].send(request)

    def close(self) -> None:
        """Kills the processes."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> "Simulators":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Playing:
    """One simulator in a worker, and how far its episode is."""

    def __init__(self, module: str, horizon: int) -> None:
        self._env: envs.Env = importlib.import_module(module).make(render=True)
        self._horizon = horizon

    def begin(self, job: Job) -> EnvObservation:
        self._steps, self._latest = 0, self._env.reset(*job)
        return self._latest

    def step(self, action: np.ndarray | None) -> tuple[EnvObservation, float, bool, bool]:
        reward, success = 0.0, False
        if action is not None:
            self._latest, reward, success = self._env.step(np.asarray(action, np.float32))
        self._steps += 1
        return self._latest, float(reward), bool(success), success or self._steps == self._horizon


def serve(module: str, horizon: int) -> Callable[[tuple], Any]:
    """Returns the handler of a worker, which has the simulators of its slots; see ``Simulators``."""
    playing: dict[int, _Playing] = {}

    def answer(request: tuple) -> Any:
        kind, slot, *rest = request
        if slot not in playing:
            playing[slot] = _Playing(module, horizon)
        simulator = playing[slot]
        if kind == "begin":
            job, actions = rest
            return [simulator.begin(job), *(simulator.step(action)[0] for action in actions)]
        action, then = rest
        observation, reward, success, over = simulator.step(action)
        first = simulator.begin(then) if over else None
        return Step(observation, reward, success, over, first)

    return answer
