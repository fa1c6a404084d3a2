"""A running scale of rewards: they are divided by the standard deviation of the discounted returns so far.

Then values are of the order of 1 in every environment, and a learning rate, a clip of values or an entropy bonus means
the same (Engstrom et al. 2020, arXiv 2005.12729, "reward scaling"). The return of a step is that of its episode so far,
the newest reward counting in full. Means are not subtracted: that would change which episodes are worth ending.
"""

import math
from typing import Any

import numpy as np

from mllm_act.rl.segments import Grid

EPSILON = 1e-8


class ReturnScale:
    """Count, mean and sum of squared differences of all returns so far, and the return of each running episode."""

    def __init__(self, count: int, discount: float, saved: dict[str, Any] | None = None) -> None:
        """Begins with nothing seen, or with ``saved``, what ``state`` has returned.

        Args:
          count: E, the simulators.
          discount: of rewards, gamma.
          saved: see above.
        """
        saved = saved or {"count": 0, "mean": 0.0, "squares": 0.0, "running": [0.0] * count}
        self._count, self._mean, self._squares = saved["count"], saved["mean"], saved["squares"]
        self._running = np.array(saved["running"], float)
        self._discount = discount

    def update(self, grid: Grid) -> float:
        """Adds a rollout; returns the factor of its rewards."""
        returns = np.zeros(grid.rewards.shape)
        for step, rewards in enumerate(grid.rewards):
            self._running = self._discount * self._running + rewards
            returns[step] = self._running
            self._running = np.where(grid.over[step], 0.0, self._running)
        seen = returns[grid.exists]
        if seen.size:  # Chan, Golub and LeVeque 1983, of two sets
            total = self._count + seen.size
            distance = float(seen.mean()) - self._mean
            self._squares += float(seen.var()) * seen.size
            self._squares += distance**2 * self._count * seen.size / total
            self._mean += distance * seen.size / total
            self._count = total
        variance = self._squares / max(self._count, 1)
        return 1 / math.sqrt(variance + EPSILON) if variance > 0 else 1.0

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain JSON types."""
        return {
            "count": self._count, "mean": self._mean, "squares": self._squares,
            "running": self._running.tolist(),
        }  # fmt: skip
