"""Simulators in worker processes: order, determinism, and workers that die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mllm_act import envs
from mllm_act.envs import Job
from mllm_act.envs.processes import Worker
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
JOBS = [Job("reach-v3", 40, 0), Job("drawer-close-v3", 41, 0), Job("reach-v3", 42, 0)]


def episode(num_workers: int) -> list[np.ndarray]:
    """Ten expert steps of all slots, then five of slots 2 and 0 only."""
    with EnvPool("metaworld", 3, num_workers) as pool:
        observations = [pool.reset(range(3), JOBS)]
        rewards = []
        for slots in [[0, 1, 2]] * 10 + [[2, 0]] * 5:
            observation, reward, _ = pool.step(pool.expert_actions(slots), slots)
            observations.append(observation)
            rewards.append(reward)
    first, last = (observations[i]["images"]["corner4"] for i in (0, -1))
    assert last.shape == (2, 200, 200, 3)
    return [first, last, np.concatenate(rewards)]


def test_results_do_not_depend_on_the_number_of_workers() -> None:
    for by_one, by_two in zip(episode(1), episode(2), strict=True):
        np.testing.assert_array_equal(by_one, by_two)


def test_slots_equal_single_environments_in_order() -> None:
    env = envs.make("metaworld", render=False)
    with EnvPool("metaworld", 3, 2, render=False) as pool:
        together = pool.reset([2, 0, 1], [JOBS[2], JOBS[0], JOBS[1]])
        assert together["images"] == {}
        actions = np.random.default_rng(0).uniform(-1, 1, (3, 4))
        stepped, rewards, successes = pool.step(actions)
        assert rewards.dtype == np.float32 and successes.dtype == bool
        for slot, job in enumerate(JOBS):
            first = env.reset(*job)
            np.testing.assert_array_equal(together["proprio"][[1, 2, 0][slot]], first["proprio"])
            after, reward, _ = env.step(actions[slot])
            np.testing.assert_array_equal(stepped["proprio"][slot], after["proprio"])
            assert rewards[slot] == np.float32(reward)


def test_an_error_in_a_worker_is_raised_to_the_caller_and_the_pool_stays_usable() -> None:
    with EnvPool("metaworld", 2, 2, render=False) as pool:
        with pytest.raises(UserError, match="'reach-v3'"):
            pool.reset([0, 1], [JOBS[0], Job("raech-v3", 0, 0)])
        assert pool.reset([0, 1], JOBS[:2])["proprio"].shape == (2, 4)
        with pytest.raises(UserError, match="drawer-close-v3, configuration 41, step 0"):
            pool.step(np.full((2, 4), [[0], [np.nan]]))


def test_the_error_of_a_dead_worker_names_its_task_and_configuration() -> None:
    with EnvPool("metaworld", 2, 2, render=False) as pool:
        pool.reset([0, 1], JOBS[:2])
        os.kill(pool._workers[1].pid, signal.SIGKILL)
        with pytest.raises(
            UserError, match=r"SIGKILL during: drawer-close-v3, configuration 41, step \d+"
        ):
            for _ in range(100):
                pool.step(np.zeros((2, 4)))


def test_after_a_failed_factory_every_request_is_answered_with_its_error() -> None:
    worker = Worker("mllm_act.envs:make", name="meta-world")
    for _ in range(2):
        worker.send("anything")
        with pytest.raises(UserError, match="unknown environment 'meta-world'"):
            worker.receive("a test")
    worker.close()


def test_a_stalled_worker_is_killed_and_the_error_names_task_configuration_and_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(envs.ENVS, "toy", "tests.envs.toy_env")
    with EnvPool("toy", 4, 2) as pool:
        pool.reset(range(4), [Job(task, c, 0) for task in ("left", "right") for c in (3, 4)])
        for _ in range(3):
            pool.step(np.zeros((4, 1)))
        for worker in pool._workers:
            worker.timeout = 0.5
        os.kill(pool._workers[1].pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(UserError, match="within 0.5 s .*: left, configuration 4, step 3;"):
            pool.step(np.zeros((4, 1)))
        assert time.monotonic() - started < 10
        assert not any(_running(worker.pid) for worker in pool._workers)


def test_a_worker_that_needs_longer_for_many_answers_than_for_one_is_not_stalled() -> None:
    worker = Worker("tests.envs.test_workers:sleeper", timeout=30.0)
    worker.send(0)
    worker.receive("a test")
    worker.timeout = 0.5
    for _ in range(100):  # more than are sent at once
        worker.send(0.02)
    assert [worker.receive("a test") for _ in range(100)] == [0.02] * 100
    worker.send(60)
    with pytest.raises(UserError, match="within 0.5 s and was killed during: a test"):
        worker.receive("a test")
    assert not _running(worker.pid)


def sleeper() -> Callable[[float], float]:
    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    return sleep


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_time_limit_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(UserError, match="--timeout: expected seconds, more than 0"):
        EnvPool("metaworld", 1, 1, timeout=timeout)


STEPPING = """
from mllm_act import envs, errors
from mllm_act.envs import Job
from mllm_act.envs.workers import EnvPool
import numpy as np

def main():
    envs.ENVS["toy"] = "tests.envs.toy_env"
    with EnvPool("toy", 2, 2) as pool:
        pool.reset([0, 1], [Job("left", 0, 0), Job("right", 0, 0)])
        print(*[worker.pid for worker in pool._workers], flush=True)
        while True:
            pool.step(np.zeros((2, 1)))

errors.run(main)
"""


@pytest.mark.parametrize("stalled", [False, True])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_program_and_its_workers(end: signal.Signals, stalled: bool) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", STEPPING],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if stalled:
        os.kill(pids[0], signal.SIGSTOP)
        time.sleep(0.2)
    killed = end == signal.SIGKILL
    if killed:
        parent.kill()
    else:  # as a terminal and a scheduler do: to all processes at once
        os.killpg(parent.pid, end)
    _, stderr = parent.communicate(timeout=20)
    assert parent.returncode == (-end if killed else 128 + end)
    assert stderr.strip() == ("" if killed else "interrupted")
    for _ in range(100):
        if not any(_running(pid) for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail("workers outlived their parent")


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
