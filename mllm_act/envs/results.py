"""Success rates: Wilson's interval, the summary of episodes by task, and the table that is printed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mllm_act.envs.base import Job
from mllm_act.envs.play import Episode


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns Wilson's score interval of a success rate (J. Am. Stat. Assoc. 22, 1927); z = 1.96 gives 95 %.

    Unlike the normal approximation, it stays within [0, 1] and has a width at 0 and n successes. With n = 0 it
    is (0, 1).

    Raises:
      ValueError: unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, found {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the bound equals the rate; rounding must not push it beyond.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def summarize(
    episodes: Sequence[Episode],
    total: str = "mean",
    task_of: Callable[[Job], str] = lambda job: job.task,
) -> list[dict[str, Any]]:
    """Returns one row per task, in the order of the episodes, and a last row for all episodes together.

    Args:
      episodes: at least one, all finished.
      total: the task name of the last row.
      task_of: the task of an episode.

    Returns:
      Rows with ``task``, ``successes``, ``episodes``, ``success`` (the rate), ``low`` and ``high`` (Wilson's 95 %
      interval), and ``steps_to_success`` (mean over the successes, None without any).
    """
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(task_of(episode.job), []).append(episode)
    rows = [_row(task, group) for task, group in groups.items()]
    return [*rows, _row(total, episodes)]


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns a Markdown table of summaries, aligned so that it also reads well as plain text.

    It has one row per task of the first summary, one column per summary (success and 95 % interval, empty where a
    summary lacks the task) and a column with the number of episodes.

    Args:
      results: column title -> rows of `summarize`.
    """
    by_task = [{row["task"]: row for row in rows} for rows in results.values()]
    lines = [["task", *results, "episodes"]]
    for task in by_task[0]:
        rows = [column.get(task) for column in by_task]
        counts = dict.fromkeys(str(row["episodes"]) for row in rows if row)
        lines.append([task, *(_cell(row) if row else "" for row in rows), ", ".join(counts)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _row(task: str, episodes: Sequence[Episode]) -> dict[str, Any]:
    successes, n = sum(episode.success for episode in episodes), len(episodes)
    low, high = wilson(successes, n)
    steps = [episode.steps for episode in episodes if episode.success]
    return {
        "task": task,
        "successes": successes,
        "episodes": n,
        "success": successes / n,
        "low": low,
        "high": high,
        "steps_to_success": float(np.mean(steps)) if steps else None,
    }


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['success']:.0%} ({row['low']:.0%} to {row['high']:.0%})"
