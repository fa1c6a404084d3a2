"""Simulators in worker processes: order, determinism, and workers that die."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mllm_act import envs
from mllm_act.envs import Job
from mllm_act.envs.processes import Worker
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError

pytestmark = pytest.mark.slow

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
            UserError, match="SIGKILL during: step of drawer-close-v3 configuration 41"
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


def test_workers_end_when_their_parent_is_killed() -> None:
    program = (
        "from mllm_act.envs.workers import EnvPool; import time;"
        "pool = EnvPool('metaworld', 2, 2, render=False);"
        "print(*[worker.pid for worker in pool._workers], flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = parent.stdout.readline().split()
    assert len(pids) == 2
    parent.kill()
    parent.communicate()
    for _ in range(600):
        if not any(_running(int(pid)) for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail("workers outlived their parent")


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
