"""Compares evaluated policies: a table of success rates and plots, or one page with everything.

    python -m mllm_act.report --out=DIR rvq=runs/metaworld/rvq vq=runs/metaworld/vq
    python -m mllm_act.report --out=report.html runs/metaworld/rvq runs/metaworld/vq

An ``--out`` that ends with ``.html`` becomes one self-contained page of all that is in the runs: success in every
environment and split, beside the paper's, curves, precision of the tokenizers, speed, videos, differences between the
configs. Any other is a folder for tables and plots.

Reads the results of ``evaluate`` and the metrics of ``train`` from each folder; ``--env`` chooses the environment where
a run was evaluated in several. Writes ``success.csv``,
``success.md``, ``success.png``, ``training.png``, and for each policy frames of its videos, ``rollouts_NAME.png``.

Of runs of ``train_ppo``, it plots success over environment steps, ``learning.png``; they need not be evaluated.

Of training, it prints where the time went over all starts of a run, and writes ``goodput.md``. ``--goodput`` does only
this, for runs that are not evaluated yet.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib

from mllm_act import goodput
from mllm_act.envs.results import table
from mllm_act.errors import UserError, expect_values, run
from mllm_act.files import user_path, whole_file, write_csv
from mllm_act.reporting import page

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be set first)


def choose_env(workdirs: Iterable[Path], split: str) -> str:
    """Returns the environment in which the policies were evaluated on this split.

    Raises:
      UserError: there are none, or several.
    """
    names: set[str] = set()
    for workdir in workdirs:
        folder = workdir / "evaluation"
        evaluated = folder.iterdir() if folder.is_dir() else ()
        names |= {env.name for env in evaluated if (env / split / "summary.json").is_file()}
    if not names:
        raise UserError(
            f"--split={split}: expected RUN/evaluation/ENV/{split}/summary.json, found none in any run; "
            f"run python -m mllm_act.evaluate --checkpoint=RUN --split={split}"
        )
    if len(names) > 1:
        raise UserError(
            f"--env: expected one of {', '.join(sorted(names))}, in which the runs were evaluated, found none; name one"
        )
    return names.pop()


def read_summary(workdir: Path, env: str, split: str) -> dict[str, Any]:
    """Returns the ``summary.json`` of an evaluation.

    Raises:
      UserError: the policy was not evaluated in this environment on this split.
    """
    path = workdir / "evaluation" / env / split / "summary.json"
    if not path.is_file():
        raise UserError(
            f"{path}: expected this file, found none; "
            f"run python -m mllm_act.evaluate --checkpoint={workdir} --env={env} --split={split}"
        )
    return json.loads(path.read_text())


def read_metrics(workdir: Path, name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of one scalar of a run's ``metrics.jsonl``; empty if it was never logged."""
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if name in line]
    return [line["step"] for line in lines], [float(line[name]) for line in lines]


def plot_success(summaries: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Plots success rates as bars with 95 % intervals, grouped by task."""
    tasks = [row["task"] for row in next(iter(summaries.values()))["tasks"]]
    figure, axis = plt.subplots(figsize=(1.5 + 1.4 * len(tasks), 4.2), layout="constrained")
    width = 0.8 / len(summaries)
    for i, (name, summary) in enumerate(summaries.items()):
        rows = {row["task"]: row for row in summary["tasks"]}
        offset = (i - (len(summaries) - 1) / 2) * width
        x = [t + offset for t, task in enumerate(tasks) if task in rows]
        plotted = [rows[task] for task in tasks if task in rows]
        rate = [100 * row["success"] for row in plotted]
        below = [100 * (row["success"] - row["low"]) for row in plotted]
        above = [100 * (row["high"] - row["success"]) for row in plotted]
        color = "0.75" if name == "untrained" else None
        axis.bar(x, rate, width * 0.95, label=name, color=color)
        axis.errorbar(x, rate, [below, above], fmt="none", ecolor="0.25", elinewidth=1, capsize=2)
    axis.set_xticks(
        range(len(tasks)), [task.removesuffix("-v3").replace("-", "\n", 1) for task in tasks]
    )
    axis.axvline(len(tasks) - 1.5, color="0.8", linewidth=1)
    axis.set(ylabel="success, %", ylim=(0, 105), title=title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        frameon=False, ncols=len(summaries), loc="upper center", bbox_to_anchor=(0.5, -0.14)
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_training(workdirs: dict[str, Path], path: Path) -> None:
    """Plots the loss and the action errors on held-out data over the steps of each run."""
    logs = [(workdir / "metrics.jsonl").read_text().splitlines() for workdir in workdirs.values()]
    keys = sorted({key for log in logs for line in log for key in json.loads(line)})
    # With several embodiments, the keys contain the embodiment's name: val/NAME/loss.
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


def plot_learning(workdirs: dict[str, Path], path: Path) -> None:
    """Plots success over environment steps of runs of ``train_ppo``: in rollouts, and as dots in evaluations."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for color, (name, workdir) in zip(itertools.cycle(colors), workdirs.items(), strict=False):
        updates, played = read_metrics(workdir, "steps")
        per_update = played[0] / updates[0]
        x, y = read_metrics(workdir, "rollout/success")
        axis.plot([per_update * i for i in x], [100 * s for s in y], color=color, label=name)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        keys = {key for line in lines for key in json.loads(line)}
        for key in sorted(k for k in keys if re.fullmatch(r"evaluate/.*/success", k)):
            x, y = read_metrics(workdir, key)
            marker = "o" if key == "evaluate/train/success" else "x"
            label = f"{name}, evaluated on {key.split('/')[1]}"
            points = [per_update * i for i in x], [100 * s for s in y]
            axis.plot(*points, color=color, marker=marker, linestyle="none", label=label)
    axis.set(xlabel="environment steps", ylabel="success, %", ylim=(-2, 105))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _title(error: str) -> str:
    """Returns the plot title of ``val/[EMBODIMENT/]error_NAME_UNIT`` or ``val/[EMBODIMENT/]wrong_actions``."""
    *_, embodiment, key = error.split("/")
    suffix = "" if embodiment == "val" else f" ({embodiment})"
    if key == "wrong_actions":
        return f"share of actions unlike the expert's{suffix}"
    _, dimension, unit = key.rsplit("_", 2)
    return f"mean |error| of {dimension}, {unit}{suffix}"


def plot_rollouts(videos: Sequence[Path], path: Path, frames: int = 6) -> None:
    """Plots one row of frames per video, evenly spaced from its first frame to the last."""
    strips = []
    for video in videos:
        images = iio.imread(video)
        last = len(images) - 1
        strips.append([images[round(i * last / (frames - 1))] for i in range(frames)])
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


def write(out: Path, workdirs: dict[str, Path], split: str, env: str | None = None) -> str:
    """Writes the tables and plots, and returns the table as text.

    Args:
      out: folder to write to.
      workdirs: policy -> its run's folder.
      split: which evaluation to read.
      env: in which environment; may be left out where the runs were evaluated in one only.

    Raises:
      UserError: there is no such evaluation of a run, or ``env`` is left out and there are several.
    """
    env = env or choose_env(workdirs.values(), split)
    summaries = {name: read_summary(workdir, env, split) for name, workdir in workdirs.items()}
    out.mkdir(parents=True, exist_ok=True)
    results = {name: summary["tasks"] for name, summary in summaries.items()}
    write_csv(
        out / "success.csv",
        [{"policy": name, **row} for name, rows in results.items() for row in rows],
    )
    text = table(results)
    with whole_file(out / "success.md") as partial:
        partial.write_text(text + "\n")
    title = f"Success in {env}, split {split}, 95 % intervals"
    plot_success(summaries, title, out / "success.png")
    trained = {
        name: workdir
        for name, workdir in workdirs.items()
        if read_metrics(workdir, "train/loss")[0]
    }
    if trained:
        plot_training(trained, out / "training.png")
    for name, workdir in workdirs.items():
        videos = sorted((workdir / "evaluation" / env / split / "videos").glob("*.mp4"))
        if videos:
            plot_rollouts(videos, out / f"rollouts_{name}.png")
    return text


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=user_path, required=True, help="output folder, or a file.html"
    )
    parser.add_argument(
        "--env", help="in which environment (default: the only one that the runs were evaluated in)"
    )
    parser.add_argument("--split", default="test", help="which evaluation to read (default: test)")
    parser.add_argument("--goodput", action="store_true", help="only where the time went")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a run's folder (default of its name: the folder's)",
    )
    args = parser.parse_args()
    expect_values(vars(args))
    workdirs = {}
    for text in args.runs:
        name, _, folder = text.rpartition("=")
        workdir = user_path(folder)
        name = name or workdir.resolve().name
        if name in workdirs:
            raise UserError(
                f"{text}: expected runs with different names, found two that are called {name}; use NAME=RUN"
            )
        workdirs[name] = workdir
    if args.out.suffix == ".html":
        page.write_page(args.out, workdirs)
        print(f"Wrote {args.out}")
        return
    times = {name: goodput.table(workdir) for name, workdir in workdirs.items()}
    text = "\n\n".join(f"{name}: {table}" for name, table in times.items() if table)
    args.out.mkdir(parents=True, exist_ok=True)
    if text:
        with whole_file(args.out / "goodput.md") as partial:
            partial.write_text(text + "\n")
        print(text + "\n")
    learned = {n: w for n, w in workdirs.items() if read_metrics(w, "rollout/success")[0]}
    if learned:
        plot_learning(learned, args.out / "learning.png")
        print(f"Wrote {args.out / 'learning.png'}")
    if learned and not any((workdir / "evaluation").is_dir() for workdir in workdirs.values()):
        return
    if not args.goodput:
        print(write(args.out, workdirs, args.split, args.env))
    elif not text:
        raise UserError(f"{args.runs[0]}: expected a run with {goodput.EVENTS}, found none")


if __name__ == "__main__":
    run(main)
