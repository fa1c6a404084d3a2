"""What an offline evaluation reports: errors of actions beside those of simple policies, tables and plots.

``mllm_act.evaluate_data`` says what is compared.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be set first)

Columns = Sequence[tuple[str, str, float]]  # the name, unit and scale of each dimension


@dataclasses.dataclass(frozen=True)
class Acted:
    """A recorded episode of n steps, and what the policy would have done, in the environment's own numbers.

    Attributes:
      number: of the episode in the split.
      location: its file and record.
      task: its group in the dataset, or "".
      instruction: the first.
      true: the recorded actions.
      predicted: the policy's.
      position: which action of its chunk each is, from 0.
    """

    number: int
    location: str
    task: str
    instruction: str
    true: Float[np.ndarray, "n A"]
    predicted: Float[np.ndarray, "n A"]
    position: Int[np.ndarray, " n"]


def most_frequent(episodes: Sequence[Acted]) -> Float[np.ndarray, " 1"]:
    """Returns the discrete action that was recorded most often."""
    values, counts = np.unique(np.concatenate([e.true for e in episodes]), return_counts=True)
    return values[[counts.argmax()]]


def earlier(
    episode: Acted, steps: int | Int[np.ndarray, " n"], usual: Float[np.ndarray, " A"]
) -> Float[np.ndarray, "n A"]:
    """Returns the action recorded ``steps`` before each step, and ``usual`` where the episode had not begun."""
    index = np.arange(len(episode.true)) - steps
    return np.where(index[:, None] >= 0, episode.true[np.maximum(index, 0)], usual)


def dimension_rows(
    episodes: Sequence[Acted],
    columns: Columns,
    usual: Float[np.ndarray, " A"],
    discrete: bool,
) -> list[dict[str, Any]]:
    """Returns the errors of each dimension of the action beside those of simple policies.

    ``r2`` is the share of the variance of the recorded actions that the policy explains; None where they are constant.
    """
    true = np.concatenate([episode.true for episode in episodes]).astype(np.float64)
    predicted = np.concatenate([episode.predicted for episode in episodes])
    last = np.concatenate([earlier(episode, 1, usual) for episode in episodes])
    rows: list[dict[str, Any]] = []
    for d, (name, unit, scale) in enumerate(columns):
        guesses = (predicted[:, d], usual[d], last[:, d])
        if discrete:
            wrong = [float((guess != true[:, d]).mean()) for guess in guesses]
            keys = ("wrong_actions", "wrong_most_frequent", "wrong_repeat_last")
            rows.append({"dimension": name, **dict(zip(keys, wrong, strict=True))})
            continue
        errors = [float(np.abs(guess - true[:, d]).mean()) * scale for guess in guesses]
        keys = ("error", "error_mean_action", "error_repeat_last")
        total = ((true[:, d] - true[:, d].mean()) ** 2).sum()
        left = ((true[:, d] - predicted[:, d]) ** 2).sum()
        r2 = float(1 - left / total) if np.ptp(true[:, d]) else None
        row = {"dimension": name, "unit": unit, **dict(zip(keys, errors, strict=True)), "r2": r2}
        rows.append(row)
    return rows


def episode_row(episode: Acted, columns: Columns, discrete: bool) -> dict[str, Any]:
    """Returns what ``episodes.csv`` says of an episode; errors have the names of the trainer's."""
    row: dict[str, Any] = {
        "episode": episode.number, "record": episode.location, "task": episode.task,
        "instruction": episode.instruction, "steps": len(episode.true),
    }  # fmt: skip
    if discrete:
        return row | {"wrong_actions": float((episode.predicted != episode.true).mean())}
    errors = np.abs(episode.predicted - episode.true).mean(0)
    return row | {
        "_".join(filter(None, ("error", name, unit))): float(errors[d]) * scale
        for d, (name, unit, scale) in enumerate(columns)
    }


def horizon_rows(
    episodes: Sequence[Acted],
    columns: Columns,
    usual: Float[np.ndarray, " A"],
) -> list[dict[str, Any]]:
    """Returns the errors at each position of a chunk, and those of the last action before the chunk."""
    position = np.concatenate([episode.position for episode in episodes])
    true = np.concatenate([episode.true for episode in episodes])
    predicted = np.concatenate([episode.predicted for episode in episodes])
    held = np.concatenate([earlier(e, e.position + 1, usual) for e in episodes])
    rows = []
    for p in range(int(position.max()) + 1):
        at = position == p
        row: dict[str, Any] = {"position": p, "steps": int(at.sum())}
        for kind, guess in (("error", predicted), ("error_repeat_last", held)):
            errors = np.abs(guess[at] - true[at]).mean(0)
            for d, (name, unit, scale) in enumerate(columns):
                row[f"{kind}_{name}_{unit}"] = float(errors[d]) * scale
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as aligned text under their keys."""

    def shown(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def plot(episode: Acted, columns: Columns, choices: Sequence[str], path: Path) -> None:
    """Plots an episode's predicted actions over the recorded ones, one panel for each dimension."""
    wide = 1 if len(columns) <= 4 else 2
    high = -(-len(columns) // wide)
    figure, axes = plt.subplots(
        high, wide, figsize=(7.5 * wide, 0.8 + 1.5 * high), sharex=True, squeeze=False, layout="constrained"
    )  # fmt: skip
    for d, (name, unit, scale) in enumerate(columns):
        axis = axes.flat[d]
        axis.plot(episode.true[:, d] * scale, color="0.55", linewidth=2.5, label="recorded")
        axis.plot(episode.predicted[:, d] * scale, color="tab:blue", linewidth=1.1, label="policy")
        axis.set_ylabel(f"{name}, {unit}" if unit else name)
        axis.spines[["top", "right"]].set_visible(False)
        if choices:
            axis.set_yticks(range(len(choices)), choices)
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes.flat[0].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    title = f"Episode {episode.number}: {episode.instruction[:80]}"
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # boxes, where the font lacks a script
        figure.savefig(path, dpi=110)
    plt.close(figure)
