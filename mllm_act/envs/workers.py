"""Many simulators stepped together in worker processes, for evaluation and replay."""

import importlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from mllm_act import envs
from mllm_act.envs.base import EnvObservation, Job
from mllm_act.envs.processes import TIMEOUT, StalledWorker, Worker
from mllm_act.errors import UserError


class EnvPool:
    """``num_envs`` simulators (slots 0 to num_envs - 1) in ``num_workers`` processes; any subset can be stepped.

    Results are in the order of the requested slots and do not depend on the number of workers. Images are sent through
    pipes: 0.1 ms each, against 7 ms to render one, so shared memory would not pay.

        with EnvPool("metaworld", num_envs=8, num_workers=2) as pool:
            observation = pool.reset(range(8), [Job("reach-v3", c, 0) for c in range(40, 48)])
            observation, reward, success = pool.step(actions)
    """

    def __init__(
        self,
        name: str,
        num_envs: int,
        num_workers: int,
        render: bool = True,
        timeout: float = TIMEOUT,
    ) -> None:
        """Starts the processes; each simulator is made at its first `reset`.

        Args:
          name: of the environment.
          num_envs: the simulators.
          num_workers: processes, at most one per simulator.
          render: whether observations contain images.
          timeout: seconds that one simulator may take for a reset, a step or an expert's action.

        Raises:
          UserError: no such environment, a number below 1, or a time limit that is not above 0.
        """
        if num_envs < 1 or num_workers < 1:
            raise UserError(
                f"expected at least one simulator and one worker, found {num_envs} and {num_workers}"
            )
        self.spec = envs.spec(name)
        # Workers get the module's path, so that an environment that only this process has registered works, too.
        module = envs.ENVS[name]
        self.num_envs = num_envs
        self._jobs: list[Job | None] = [None] * num_envs
        self._steps = [0] * num_envs  # of the episode in each slot
        self._workers = [
            Worker("mllm_act.envs.workers:serve", timeout=timeout, module=module, render=render)
            for _ in range(min(num_workers, num_envs))
        ]

    def reset(self, slots: Sequence[int], jobs: Sequence[Job]) -> EnvObservation:
        """Starts ``jobs[i]`` in ``slots[i]`` and returns their observations, batched in that order.

        Raises:
          UserError: raised by the environment's ``reset``, or a worker died or stalled.
        """
        for slot, job in zip(slots, jobs, strict=True):
            self._jobs[slot], self._steps[slot] = job, 0
        return _stack(self._ask("reset", slots, jobs))

    def step(
        self, actions: np.ndarray, slots: Sequence[int] | None = None
    ) -> tuple[EnvObservation, np.ndarray, np.ndarray]:
        """Executes one action in each of ``slots`` (default: all).

        Args:
          actions: float32[n, A], one per slot.
          slots: the slots to step, each of them reset before.

        Returns:
          Batched observations, rewards float32[n] and successes bool[n] (at this step).

        Raises:
          UserError: raised by the environment's ``step``, or a worker died or stalled; it names the task, the
            configuration and the step.
        """
        slots = self._all(slots)
        replies = self._ask("step", slots, list(np.asarray(actions, np.float32)))
        for slot in slots:
            self._steps[slot] += 1
        observations, rewards, successes = zip(*replies, strict=True)
        return _stack(observations), np.array(rewards, np.float32), np.array(successes, bool)

    def expert_actions(self, slots: Sequence[int] | None = None) -> np.ndarray:
        """Returns the scripted expert's action for the current state of each of ``slots`` (default: all):
        float32[n, A].
        """
        slots = self._all(slots)
        return np.stack(self._ask("expert_action", slots, [None] * len(slots)))

    def _all(self, slots: Sequence[int] | None) -> Sequence[int]:
        return range(self.num_envs) if slots is None else slots

    def _ask(self, method: str, slots: Sequence[int], payloads: Sequence[Any]) -> list[Any]:
        """Sends one request per slot, then collects the replies in the order of ``slots``."""
        for slot in slots:
            if not 0 <= slot < self.num_envs:
                raise UserError(f"no slot {slot} in a pool of {self.num_envs}")
        for slot, payload in zip(slots, payloads, strict=True):
            self._worker(slot).send((method, slot, payload))
        replies: list[Any] = []
        errors: list[Exception] = []
        for slot in slots:
            try:
                replies.append(self._worker(slot).receive(self._describe(method, slot)))
            except StalledWorker:
                self.close()  # the replies of the other workers could take as long
                raise
            except (UserError, RuntimeError) as error:
                errors.append(error)  # read the other replies first: the pool stays usable
        if errors:
            raise errors[0]
        return replies

    def _worker(self, slot: int) -> Worker:
        return self._workers[slot % len(self._workers)]

    def _describe(self, method: str, slot: int) -> str:
        """Returns what a slot is doing, for errors, e.g. ``reach-v3, configuration 40, step 12``."""
        job = self._jobs[slot]
        if job is None:
            return f"{method} of a simulator that was not reset"
        doing = {"reset": "reset", "step": f"step {self._steps[slot]}"}
        expert = f"the expert's action of step {self._steps[slot]}"
        return f"{job.task}, configuration {job.configuration}, {doing.get(method, expert)}"

    def close(self) -> None:
        """Kills the processes."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _stack(observations: Sequence[EnvObservation]) -> EnvObservation:
    cameras = observations[0]["images"]
    return {
        "images": {
            camera: np.stack([observation["images"][camera] for observation in observations])
            for camera in cameras
        },
        "proprio": np.stack([observation["proprio"] for observation in observations]),
        "instruction": np.stack([observation["instruction"] for observation in observations]),
    }


def serve(module: str, render: bool) -> Callable[[tuple[str, int, Any]], Any]:
    """Returns the handler of a worker: (method, slot, payload) -> result.

    Args:
      module: import path of the environment's module.
      render: whether observations contain images.
    """
    make = importlib.import_module(module).make
    simulators: dict[int, envs.Env] = {}

    def answer(request: tuple[str, int, Any]) -> Any:
        method, slot, payload = request
        if slot not in simulators:
            simulators[slot] = make(render=render)
        env = simulators[slot]
        if method == "reset":
            return env.reset(*payload)
        if method == "step":
            return env.step(payload)
        return env.expert_action()

    return answer
