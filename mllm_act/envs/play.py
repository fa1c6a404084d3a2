"""Plays many episodes in a pool of simulators, all stepped together: for evaluation and for replay."""

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
    """One episode: its job and how it went. Frames of the first camera are kept where ``frames`` is a list."""

    job: Job
    steps: int = 0
    success: bool = False
    frames: list[np.ndarray] | None = None


# (what is played, by slot; the slots that begin an episode; the newest observation of every slot)
# -> float32[n, A], an action for each slot that plays, in the order of the slots
Decide = Callable[[Mapping[int, Episode], Sequence[int], EnvObservation], np.ndarray]


def episodes(
    env: str, tasks: str, split: str, seed: int = 0, *, videos: bool = False
) -> list[Episode]:
    """Lists the episodes of all start/goal configurations of a split, task by task.

    Args:
      env: the environment's name.
      tasks: task and group names, comma-separated.
      split: one of the environment's, e.g. ``train`` or ``test``.
      seed: of every episode.
      videos: whether to keep the frames of each task's first episode.

    Raises:
      UserError: a task or split that does not exist.
    """
    splits = envs.splits(env)
    if split not in splits:
        raise UserError(f"--split={split}: no such split of {env}; {nearest(split, splits)}")
    found = []
    for task in envs.select_tasks(env, tasks):
        jobs = [Job(task, c, seed) for c in splits[split]]
        found += [
            Episode(job, frames=[] if videos and i == 0 else None) for i, job in enumerate(jobs)
        ]
    return found


def play(
    pool: EnvPool, todo: Sequence[Episode], horizon: int, decide: Decide, what: str
) -> Iterator[Episode]:
    """Plays episodes, filling in their results, and yields each when it ends; ``what`` names the progress bar.

    An episode ends at its first success or at the horizon; a free slot takes the next one in the list. Slots that do
    not play keep the observation that was there last, so that arrays have one shape throughout.
    """
    spec, slots = pool.spec, pool.num_envs
    shape = (slots, spec.image_size, spec.image_size, 3)
    seen: EnvObservation = {
        "images": {camera: np.zeros(shape, np.uint8) for camera in spec.cameras},
        "proprio": np.zeros((slots, len(spec.proprio_names)), np.float32),
        "instruction": np.full(slots, "", object),
    }

    def store(places: Sequence[int], new: EnvObservation) -> None:
        for camera, frames in new["images"].items():
            seen["images"][camera][places] = frames
        seen["proprio"][places] = new["proprio"]
        seen["instruction"][places] = new["instruction"]

    waiting = deque(todo)
    playing: dict[int, Episode] = {}
    finished = successes = 0
    with tqdm(total=len(todo), desc=what, unit="episode") as bar:
        while waiting or playing:
            fresh = [slot for slot in range(slots) if slot not in playing][: len(waiting)]
            if fresh:
                playing |= {slot: waiting.popleft() for slot in fresh}
                store(fresh, pool.reset(fresh, [playing[slot].job for slot in fresh]))
            actions = decide(playing, fresh, seen)
            busy = sorted(playing)
            new, _, success = pool.step(actions, busy)
            store(busy, new)
            for slot, done in zip(busy, success, strict=True):
                episode = playing[slot]
                episode.steps += 1
                episode.success = bool(done)
                if episode.frames is not None:
                    episode.frames.append(seen["images"][spec.cameras[0]][slot].copy())
                if done or episode.steps == horizon:
                    del playing[slot]
                    finished, successes = finished + 1, successes + episode.success
                    bar.update()
                    bar.set_postfix(success=f"{successes / finished:.0%}")
                    yield episode
