"""Rolls a policy out in the simulator and counts successes.

    python -m mllm_act.evaluate --checkpoint=runs/metaworld/rvq --env=metaworld --split=test

All simulators are stepped together, spread over worker processes, and the policy acts on them as one batch. An
episode ends at its first success or at the horizon. Leaves in ``--out``: ``episodes.csv`` (a line an episode, with its
seed), ``tasks.csv`` (success and Wilson's 95 % interval), ``summary.json`` and a video of each task's first episode.
The same seed gives the same figures.
"""

import argparse
import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from mllm_act import envs
from mllm_act.checkpoints import checkpoint
from mllm_act.envs import play
from mllm_act.envs.base import EnvObservation
from mllm_act.envs.play import Episode
from mllm_act.envs.results import wilson
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, run
from mllm_act.policy import Policy


def rollout(
    policy: Policy,
    pool: EnvPool,
    episodes: list[Episode],
    horizon: int,
    key: PRNGKeyArray | None = None,
) -> Iterator[Episode]:
    """Plays all episodes with the policy, filling in their results, and yields each when it ends.

    With a key actions are drawn from the policy's distribution; without it they are its likeliest.
    """
    memory, step = policy.start(pool.num_envs), 0

    def decide(
        playing: Mapping[int, Episode], fresh: Sequence[int], seen: EnvObservation
    ) -> np.ndarray:
        nonlocal memory, step
        first = np.isin(np.arange(pool.num_envs), fresh)
        texts = seen["instruction"].tolist()
        draw = None if key is None else jax.random.fold_in(key, step)
        action, memory = policy.act(seen["images"], seen["proprio"], texts, first, memory, draw)
        step += 1
        return action[sorted(playing)]

    yield from play.play(pool, episodes, horizon, decide, "evaluate")


def summarize(episodes: list[Episode]) -> list[dict[str, Any]]:
    """Returns one row a task, then their mean: successes, episodes, rate and Wilson's 95 % interval.

    The mean's interval is that of all episodes together.
    """
    rows = []
    tasks = list(dict.fromkeys(episode.job.task for episode in episodes))
    for name, group in [(t, [e for e in episodes if e.job.task == t]) for t in tasks] + [
        ("mean", episodes)
    ]:
        won, total = sum(e.success for e in group), len(group)
        low, high = wilson(won, total)
        steps = [e.steps for e in group if e.success]
        rows.append({
            "task": name, "successes": won, "episodes": total, "success": won / total, "low": low, "high": high,
            "steps_to_success": float(np.mean(steps)) if steps else None,
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as text."""
    width = max(len(row["task"]) for row in rows)
    lines = [f"{'task':<{width}}  success  95 % interval   episodes"]
    for row in rows:
        interval = f"{row['low']:>4.0%} .. {row['high']:.0%}"
        lines.append(
            f"{row['task']:<{width}}  {row['success']:>7.0%}  {interval:<14}  {row['episodes']:>8}"
        )
    return "\n".join(lines)


def write_video(folder: Path, episode: Episode, hertz: float) -> None:
    """Writes an episode's frames in real time, named for its task, and drops them from memory."""
    folder.mkdir(exist_ok=True)
    frames = np.stack(episode.frames or [])
    episode.frames = None
    path = folder / f"{episode.job.task}.mp4"
    iio.imwrite(path, frames, fps=hertz, codec="libx264", macro_block_size=1)


def write_results(
    folder: Path, episodes: list[Episode], rows: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Writes ``episodes.csv``, ``tasks.csv`` and ``summary.json``."""
    with (folder / "episodes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "configuration", "seed", "success", "steps"])
        writer.writerows([*e.job, int(e.success), e.steps] for e in episodes)
    with (folder / "tasks.csv").open("w", newline="") as file:
        columns = csv.DictWriter(file, list(rows[0]))
        columns.writeheader()
        columns.writerows(rows)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def publish(folder: Path, out: Path) -> None:
    """Moves finished results into ``out``; those of an earlier evaluation are replaced, videos too."""
    shutil.rmtree(out / "videos", ignore_errors=True)
    for path in folder.iterdir():
        os.replace(path, out / path.name)


def arguments() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a run's folder, or one step's folder in it")
    add("--env", default="metaworld", help="the environment (default: metaworld)")
    add("--split", default="test", help="the environment's: train, test, ... (default: test)")
    add("--tasks", help="task names or groups, comma-separated (default: those trained on)")
    add("--horizon", type=int, help="most steps of an episode (default: the environment's own)")
    add("--seed", type=int, default=0, help="of the episodes (default: 0)")
    add(
        "--envs",
        type=int,
        default=16,
        help="simulators stepped together, the policy's batch (default: 16)",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="simulator processes (default: one a core)",
    )
    add(
        "--sample", action="store_true", help="draw actions by their probability, not the likeliest"
    )
    add(
        "--ensembling",
        type=float,
        metavar="DECAY",
        help="decide at every step and average overlapping chunks of actions, as ACT does with 0.01 "
        "(default: carry chunks out one after another)",
    )
    add("--no-videos", action="store_true", help="write no video of each task's first episode")
    add("--out", type=Path, help="output folder (default: RUN/evaluation/SPLIT)")
    return parser


def main() -> None:
    """Runs the program."""
    args = arguments().parse_args()
    spec = envs.spec(args.env)
    horizon = spec.horizon if args.horizon is None else args.horizon
    if not 1 <= horizon <= spec.horizon:
        raise UserError(
            f"--horizon: expected 1 to {spec.horizon}, {args.env}'s own, found {horizon}"
        )
    for key in ("envs", "workers"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key}: expected at least 1, found {getattr(args, key)}")
    workdir, _ = checkpoint.find(args.checkpoint)
    policy = Policy.load(args.checkpoint, embodiment=args.env, ensembling=args.ensembling)
    if args.sample and policy.embodiment.adapter == "regression":
        raise UserError(
            f"--sample: expected a policy with a distribution of actions, found the regression adapter in "
            f"{args.checkpoint}, which predicts one; leave it out"
        )
    trained_on = policy.meta["dataset"][args.env]
    episodes = play.episodes(
        args.env,
        args.tasks or ",".join(trained_on["tasks"]),
        args.split,
        args.seed,
        videos=not args.no_videos,
    )
    out = args.out or workdir / "evaluation" / args.split
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as scratch:
        with EnvPool(args.env, min(args.envs, len(episodes)), args.workers) as pool:
            draw = jax.random.key(args.seed) if args.sample else None
            for episode in rollout(policy, pool, episodes, horizon, draw):
                if episode.frames is not None:
                    write_video(Path(scratch, "videos"), episode, spec.control_hz)
        rows = summarize(episodes)
        summary = {
            "checkpoint": str(args.checkpoint.resolve()), "step": policy.meta["step"], "env": args.env,
            "adapter": policy.embodiment.adapter, "chunk": policy.embodiment.chunk, "ensembling": args.ensembling,
            "sample": args.sample, "split": args.split, "seed": args.seed, "horizon": horizon, "envs": args.envs,
            "tasks": rows,
        }  # fmt: skip
        write_results(Path(scratch), episodes, rows, summary)
        publish(Path(scratch), out)
    print(table(rows))
    names = "episodes.csv, tasks.csv, summary.json" + ("" if args.no_videos else " and videos/")
    print(f"Wrote {names} to {out}")


if __name__ == "__main__":
    run(main)
