"""Simulators and drawings in processes of their own, because other tests may have imported TensorFlow into this one."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from mllm_act.envs import EnvObservation, Job
from mllm_act.envs.language_rearrangement.scene import Scene
from mllm_act.envs.language_rearrangement.world import Episode, World
from mllm_act.envs.workers import EnvPool


class OneEnv:
    """An `Env` in its own process."""

    def __init__(self, name: str) -> None:
        self.pool = EnvPool(name, num_envs=1, num_workers=1)

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        return first(self.pool.reset([0], [Job(task, configuration, seed)]))

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        observation, reward, success = self.pool.step(action[None])
        return first(observation), float(reward[0]), bool(success[0])

    def expert_action(self) -> np.ndarray:
        return self.pool.expert_actions()[0]


def first(batched: EnvObservation) -> EnvObservation:
    images = {camera: images[0] for camera, images in batched["images"].items()}
    proprio, instruction = batched["proprio"][0], np.array(batched["instruction"][0])
    return {"images": images, "proprio": proprio, "instruction": instruction}


class OneScene:
    """A `Scene` in its own process."""

    def __init__(self, size: int) -> None:
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.process.submit(_make, size).result()

    def start(self, episode: Episode) -> None:
        self.process.submit(_start, episode).result()

    def render(self, world: World) -> np.ndarray:
        return self.process.submit(_render, world).result()


_scenes: list[Scene] = []  # of the process that draws


def _make(size: int) -> None:
    _scenes.append(Scene(size))


def _start(episode: Episode) -> None:
    _scenes[0].start(episode)


def _render(world: World) -> np.ndarray:
    return _scenes[0].render(world)
