"""Puts evaluated policies side by side: a table and plots.

    python -m mllm_act.report --out=DIR rvq=runs/metaworld/rvq vq=runs/metaworld/vq

Reads what ``evaluate`` and ``train`` left in each folder; writes ``success.csv``, ``success.md``, ``success.png``,
``training.png``, and of each policy the strips of its videos, ``rollouts_NAME.png``.
"""

import argparse
import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib

from mllm_act.errors import UserError, run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)


def read_summary(workdir: Path, split: str) -> dict[str, Any]:
    """Returns what ``evaluate`` found.

    Raises:
      UserError: if the policy was not evaluated.
    """
    path = workdir / "evaluation" / split / "summary.json"
    if not path.is_file():
        raise UserError(
            f"{path}: expected this file, found none; "
            f"run python -m mllm_act.evaluate --checkpoint={workdir} --split={split}"
        )
    return json.loads(path.read_text())


def read_metrics(workdir: Path, name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of one scalar in a run's ``metrics.jsonl``; empty where there is none."""
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = [(line["step"], float(line[name])) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def success_table(summaries: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: a task a row, a policy a column, as success with its 95 % interval."""
    tasks = [row["task"] for row in next(iter(summaries.values()))["tasks"]]
    body = []
    for task in tasks:
        cells = []
        for summary in summaries.values():
            row = next((row for row in summary["tasks"] if row["task"] == task), None)
            cells.append(
                ""
                if row is None
                else f"{row['success']:.0%} ({row['low']:.0%} to {row['high']:.0%})"
            )
        body.append([task, *cells])
    return ["task", *summaries], body


def markdown(header: list[str], body: list[list[str]]) -> str:
    """Returns a Markdown table whose columns line up as text, too."""
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    rows = [header, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def plot_success(summaries: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws success with 95 % intervals as bars, grouped by task."""
    tasks = [row["task"] for row in next(iter(summaries.values()))["tasks"]]
    figure, axis = plt.subplots(figsize=(1.5 + 1.4 * len(tasks), 4.2), layout="constrained")
    width = 0.8 / len(summaries)
    for i, (name, summary) in enumerate(summaries.items()):
        rows = {row["task"]: row for row in summary["tasks"]}
        places = [
            t + (i - (len(summaries) - 1) / 2) * width
            for t, task in enumerate(tasks)
            if task in rows
        ]
        found = [rows[task] for task in tasks if task in rows]
        rate = [100 * row["success"] for row in found]
        below = [100 * (row["success"] - row["low"]) for row in found]
        above = [100 * (row["high"] - row["success"]) for row in found]
        color = "0.75" if name == "untrained" else None
        axis.bar(places, rate, width * 0.95, label=name, color=color)
        axis.errorbar(
            places, rate, [below, above], fmt="none", ecolor="0.25", elinewidth=1, capsize=2
        )
    axis.set_xticks(
        range(len(tasks)), [task.removesuffix("-v3").replace("-", "\n", 1) for task in tasks]
    )
    axis.axvline(len(tasks) - 1.5, color="0.8", linewidth=1)
    axis.set(
        ylabel="success, %", ylim=(0, 105), title="Success on unseen configurations, 95 % intervals"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        frameon=False, ncols=len(summaries), loc="upper center", bbox_to_anchor=(0.5, -0.14)
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_training(workdirs: dict[str, Path], path: Path) -> None:
    """Draws loss and what is wrong with actions on held-out data, over the steps of each run."""
    logs = [(workdir / "metrics.jsonl").read_text().splitlines() for workdir in workdirs.values()]
    keys = sorted({key for log in logs for line in log for key in json.loads(line)})
    # A run of several embodiments has their names between.
    losses = [key for key in keys if re.fullmatch(r"val/(\w+/)?loss", key)]
    errors = [key for key in keys if re.fullmatch(r"val/(\w+/)?(error_\w+|wrong_actions)", key)]
    figure, axes = plt.subplots(
        1, 1 + len(errors), figsize=(3.4 * (1 + len(errors)), 3.2), layout="constrained"
    )
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for color, (name, workdir) in zip(itertools.cycle(colors), workdirs.items(), strict=False):
        axes[0].plot(*read_metrics(workdir, "train/loss"), color=color, alpha=0.35, label=name)
        for key in losses:
            axes[0].plot(*read_metrics(workdir, key), color=color, marker="o", markersize=3)
        for axis, error in zip(axes[1:], errors, strict=True):
            axis.plot(*read_metrics(workdir, error), color=color, marker="o", markersize=3)
            axis.set(title=_title(error), xlabel="step")
    axes[0].set(title="loss: training, held-out (dots)", xlabel="step", yscale="log")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _title(error: str) -> str:
    """Returns the title of a plot of ``val/[ENVIRONMENT/]error_NAME_UNIT`` or ``val/[ENVIRONMENT/]wrong_actions``."""
    *_, environment, key = error.split("/")
    of = "" if environment == "val" else f" ({environment})"
    if key == "wrong_actions":
        return f"share of actions not the expert's{of}"
    _, dimension, unit = key.rsplit("_", 2)
    return f"mean |error| of {dimension}, {unit}{of}"


def plot_rollouts(workdir: Path, split: str, path: Path, frames: int = 6) -> None:
    """Draws a strip of each task's video: from the first frame to the last."""
    videos = sorted((workdir / "evaluation" / split / "videos").glob("*.mp4"))
    strips = []
    for video in videos:
        film = iio.imread(video)
        strips.append([film[round(i * (len(film) - 1) / (frames - 1))] for i in range(frames)])
    figure, axes = plt.subplots(
        len(strips),
        frames,
        figsize=(1.5 * frames, 1.62 * len(strips)),
        layout="constrained",
        squeeze=False,
    )
    for row, video, strip in zip(axes, videos, strips, strict=True):
        row[0].set_title(video.stem.removesuffix("-v3"), fontsize=9, loc="left")
        for axis, frame in zip(row, strip, strict=True):
            axis.imshow(frame)
            axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(out: Path, workdirs: dict[str, Path], split: str) -> str:
    """Writes the table and the plots, and returns the table as text."""
    out.mkdir(parents=True, exist_ok=True)
    summaries = {name: read_summary(workdir, split) for name, workdir in workdirs.items()}
    header, body = success_table(summaries)
    with (out / "success.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", *next(iter(summaries.values()))["tasks"][0]])
        writer.writerows(
            [name, *row.values()] for name, s in summaries.items() for row in s["tasks"]
        )
    text = markdown(header, body)
    (out / "success.md").write_text(text + "\n")
    plot_success(summaries, out / "success.png")
    trained = {
        name: workdir
        for name, workdir in workdirs.items()
        if read_metrics(workdir, "train/loss")[0]
    }
    if trained:
        plot_training(trained, out / "training.png")
    for name, workdir in workdirs.items():
        if any((workdir / "evaluation" / split / "videos").glob("*.mp4")):
            plot_rollouts(workdir, split, out / f"rollouts_{name}.png")
    return text


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--split", default="test", help="which evaluation to read (default: test)")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="name and folder of a policy")
    args = parser.parse_args()
    named = [run.partition("=") for run in args.runs]
    if not all(workdir for _, _, workdir in named):
        raise UserError(f"expected NAME=RUN arguments, found {' '.join(args.runs)}")
    print(write(args.out, {name: Path(workdir) for name, _, workdir in named}, args.split))


if __name__ == "__main__":
    run(main)
