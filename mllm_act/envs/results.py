"""Confidence intervals of success rates."""

import math


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate (J. Am. Stat. Assoc. 22, 1927); z = 1.96 is 95 %.

    Unlike the normal approximation it stays in [0, 1] and has a width at 0 and n successes too.

    Raises:
      ValueError: unless 0 <= successes <= n. With n = 0 nothing is known: (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, found {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the bound is the rate itself; rounding must not put it beyond.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high
