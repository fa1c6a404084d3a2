"""Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

What follows a step says how its episode goes on there:

    the next step's value          the episode goes on in this rollout
    0                              the episode is over: success, or a time limit that is terminal
    the value of what came last    the episode is only cut, by the end of the rollout or a time limit that is not the
                                   task's. It is that of the observation before the reset: the one after it belongs to
                                   another episode.
"""

import numpy as np
from jaxtyping import Bool, Float


def advantages(
    rewards: Float[np.ndarray, "S E"],
    values: Float[np.ndarray, "S E"],
    next_values: Float[np.ndarray, "S E"],
    last: Bool[np.ndarray, "S E"],
    discount: float,
    decay: float,
) -> Float[np.ndarray, "S E"]:
    """Returns the advantages of S steps in E simulators; with ``values`` added they are the returns.

    Args:
      rewards: of each step.
      values: of the observation before it.
      next_values: of the observation after it, see above.
      last: whether it is the last of its episode, or of the rollout: nothing flows back across it.
      discount: of rewards, gamma.
      decay: of the mean over horizons, lambda.
    """
    errors = rewards + discount * next_values - values
    result = np.zeros_like(errors)
    running = np.zeros_like(errors[0])
    for step in reversed(range(len(errors))):
        running = errors[step] + discount * decay * np.where(last[step], 0, running)
        result[step] = running
    return result
