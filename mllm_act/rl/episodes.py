"""The episodes of a run: which are played, how far each is, and what came of them."""

import dataclasses

import numpy as np

from mllm_act.envs.base import EnvObservation, Job
from mllm_act.rl.segments import Segment


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
