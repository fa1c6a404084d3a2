"""Plays many episodes in a pool of simulators that are stepped together, for evaluation and replay."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from mllm_act import envs
from mllm_act.envs.base import EnvObservation, Job
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, nearest


@dataclasses.dataclass
class Episode:
    """One episode: its job and its result; ``earned`` is the sum of its rewards.

    If ``frames`` is a list, it collects the frames of the first camera.
    """

    job: Job
    steps: int = 0
    success: bool = False
    earned: float = 0.0
    frames: list[np.ndarray] | None = None


# (slot -> the episode it plays, the slots that have just started one, the latest observation of every slot)
# -> float32[n, A], one action per playing slot, in the order of the slots
Decide = Callable[[Mapping[int, Episode], Sequence[int], EnvObservation], np.ndarray]


def episodes(
    env: str, tasks: str, split: str, seed: int = 0, *, videos: bool = False
) -> list[Episode]:
    """Returns the episodes of all start/goal configurations of a split, task by task.

    Args:
      env: name of the environment.
      tasks: task and group names, comma-separated.
      split: a split of the environment, e.g. ``train`` or ``test``.
      seed: seed of every episode.
      videos: whether to keep the frames of the first episode of each task.

    Raises:
      UserError: a task or split that does not exist, or a negative seed.
    """
    if seed < 0:
        raise UserError(f"--seed: expected 0 or more, found {seed}")
    splits = envs.splits(env)
    if split not in splits:
        raise UserError(f"--split={split}: no such split of {env}; {nearest(split, splits)}")
    listed = []
    for task in envs.select_tasks(env, tasks):
        jobs = [Job(task, configuration, seed) for configuration in splits[split]]
        listed += [
            Episode(job, frames=[] if videos and i == 0 else None) for i, job in enumerate(jobs)
        ]
    return listed


def play(
    pool: EnvPool,
    todo: Sequence[Episode],
    horizon: int,
    decide: Decide,
    label: str,
    follow: Callable[[Episode], Episode | None] = lambda episode: None,
) -> Iterator[Episode]:
    """Plays episodes, fills in their results, and yields each as it ends.

    An episode ends at its first success or at the horizon, and its slot takes the next one. Idle slots keep their
    last observation, so that the arrays have the same shape at every step.

    Args:
      pool: the simulators.
      todo: the episodes, started in this order.
      horizon: maximum steps per episode.
      decide: chooses the actions; see `Decide`.
      label: title of the progress bar.
      follow: the episode that the same simulator plays after another, if there is one: tasks that follow one another.
    """
    spec, num_envs = pool.spec, pool.num_envs
    sizes = {camera: spec.size_of(camera) for camera in spec.cameras}
    latest: EnvObservation = {
        "images": {c: np.zeros((num_envs, n, n, 3), np.uint8) for c, n in sizes.items()},
        "proprio": np.zeros((num_envs, len(spec.proprio_names)), np.float32),
        "instruction": np.full(num_envs, "", object),
    }

    def store(slots: Sequence[int], observation: EnvObservation) -> None:
        for camera, frames in observation["images"].items():
            latest["images"][camera][slots] = frames
        latest["proprio"][slots] = observation["proprio"]
        latest["instruction"][slots] = observation["instruction"]

    waiting = deque(todo)
    playing: dict[int, Episode] = {}
    following: dict[int, Episode] = {}
    finished = successes = 0
    with tqdm(total=len(todo), desc=label, unit="episode") as bar:
        while waiting or playing or following:
            free = [slot for slot in range(num_envs) if slot not in playing | following]
            following |= {slot: waiting.popleft() for slot in free[: len(waiting)]}
            if started := sorted(following):
                playing |= following
                following.clear()
                store(started, pool.reset(started, [playing[slot].job for slot in started]))
            actions = decide(playing, started, latest)
            busy = sorted(playing)
            observation, rewards, success = pool.step(actions, busy)
            store(busy, observation)
            for slot, reward, done in zip(busy, rewards, success, strict=True):
                episode = playing[slot]
                episode.steps += 1
                episode.earned += float(reward)
                episode.success = bool(done)
                if episode.frames is not None:
                    episode.frames.append(latest["images"][spec.cameras[0]][slot].copy())
                if done or episode.steps == horizon:
                    del playing[slot]
                    finished, successes = finished + 1, successes + episode.success
                    bar.update()
                    if (after := follow(episode)) is not None:
                        following[slot] = after
                        bar.total += 1
                    bar.set_postfix(success=f"{successes / finished:.0%}")
                    yield episode
