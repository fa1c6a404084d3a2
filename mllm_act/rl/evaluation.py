"""Evaluates a PPO run's checkpoints while it trains: success on splits of the environment, and videos.

The policy is that of the checkpoint, so it acts as it will later: greedily, through ``mllm_act.evaluate``. Its episodes
are in simulators of its own, so the training does not depend on them.
"""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from ml_collections.config_dict import ConfigDict

from mllm_act import envs
from mllm_act.envs.base import Job
from mllm_act.envs.play import Episode
from mllm_act.envs.results import table, wilson
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, nearest
from mllm_act.evaluate import rollout
from mllm_act.policy import Policy
from mllm_act.rl.episodes import Episodes
from mllm_act.training.stop import Stop

PREFIX = "evaluate/"
SIMULATORS = 16  # at most: the frames of all running episodes are kept
SEED = 0  # of all episodes; those of training have seeds of 31 random bits


class Evaluation:
    """The splits of a run, and how many episodes of each are played."""

    def __init__(
        self, config: ConfigDict, episodes: Episodes, workdir: Path, workers: int, horizon: int
    ) -> None:
        """Starts nothing yet.

        Args:
          config: of the run; see ``config.evaluate`` in configs/rl/common.py.
          episodes: of training: their tasks, and as the split of training their configurations.
          workdir: of the run; videos go to ``workdir/videos``.
          workers: processes.
          horizon: steps of an episode at most.

        Raises:
          UserError: no such split.
        """
        self._env, self._tasks = config.env.name, episodes.tasks
        self._workdir, self._workers, self._horizon = workdir, workers, horizon
        self._timeout = config.rollout.timeout
        known, count = envs.splits(self._env), config.evaluate.configurations
        self._splits: dict[str, list[int]] = {}
        for split in config.evaluate.splits.split(","):
            if split not in known:
                raise UserError(
                    f"config.evaluate.splits: expected some of {', '.join(known)}, found {split!r}; "
                    f"{nearest(split, known)}"
                )
            numbers = episodes.configurations if split == config.env.split else known[split]
            chosen = np.linspace(0, len(numbers), min(count, len(numbers)), endpoint=False)
            self._splits[split] = [numbers[int(i)] for i in chosen]

    def run(self, step: int, stop: Stop) -> dict[str, float] | None:
        """Plays the checkpoint of update ``step``; returns metrics, or None if a signal has arrived."""
        policy = Policy.load(self._workdir / "checkpoints" / str(step), embodiment=self._env)
        found: dict[str, float] = {}
        for split, configurations in self._splits.items():
            if stop.requested():
                return None
            todo = [
                Episode(Job(task, number, SEED), frames=[])
                for task in self._tasks
                for number in configurations
            ]
            count = min(SIMULATORS, len(todo))
            with EnvPool(self._env, count, self._workers, timeout=self._timeout) as pool:
                self._play(policy, pool, todo, f"{step:06}_{split}")
            found |= {
                f"{PREFIX}{split}/success": float(np.mean([e.success for e in todo])),
                f"{PREFIX}{split}/return": float(np.mean([e.earned for e in todo])),
                f"{PREFIX}{split}/length": float(np.mean([e.steps for e in todo])),
                f"{PREFIX}{split}/episodes": float(len(todo)),
            }
        return found

    def _play(self, policy: Policy, pool: EnvPool, todo: list[Episode], name: str) -> None:
        """Plays episodes and writes the videos of the best and the worst: by success, return, and length."""
        best: Episode | None = None
        worst: Episode | None = None
        for episode in rollout(policy, pool, todo, self._horizon):
            if best is None or _rank(episode) > _rank(best):
                best = _kept(episode, best, worst)
            if worst is None or _rank(episode) < _rank(worst):
                worst = _kept(episode, worst, best)
            if episode is not best and episode is not worst:
                episode.frames = None
        folder = self._workdir / "videos"
        folder.mkdir(exist_ok=True)
        for kind, shown in (("best", best), ("worst", worst)):
            assert shown is not None and shown.frames is not None
            frames, path = np.stack(shown.frames), folder / f"{name}_{kind}.mp4"
            iio.imwrite(path, frames, fps=pool.spec.control_hz, codec="libx264", macro_block_size=1)


def _rank(episode: Episode) -> tuple[bool, float, int]:
    return episode.success, episode.earned, -episode.steps


def _kept(new: Episode, old: Episode | None, other: Episode | None) -> Episode:
    """Returns ``new`` in place of ``old``, whose frames are dropped unless it is ``other``, too."""
    if old is not None and old is not other:
        old.frames = None
    return new


def compare(path: Path) -> str:
    """Returns a table of the first and the last evaluation in a ``metrics.jsonl``; empty if there is none."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if any(name.startswith(PREFIX) for name in line)]
    columns = {}
    for line in lines[:1] + lines[-1:]:
        rows = []
        for name in line:
            if name.startswith(PREFIX) and name.endswith("/success"):
                split = name.removeprefix(PREFIX).removesuffix("/success")
                n = int(line[f"{PREFIX}{split}/episodes"])
                low, high = wilson(round(line[name] * n), n)
                rows.append({
                    "task": split, "success": line[name], "low": low, "high": high, "episodes": n,
                })  # fmt: skip
        columns[f"update {line['step']}"] = rows
    return table(columns) if columns else ""
