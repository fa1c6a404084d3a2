"""Evaluates a policy in the simulator: plays episodes and reports success rates.

    python -m mllm_act.evaluate --checkpoint=runs/metaworld/rvq --env=metaworld --split=test

All simulators are stepped together in worker processes, and the policy acts on them as one batch. An episode ends at
its first success or at the horizon. Writes to ``--out``: ``episodes.csv`` (one line per episode, with its seed),
``tasks.csv`` (success and Wilson's 95 % interval), ``summary.json`` and a video of each task's first episode. The same
seed gives the same results.
"""

import argparse
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
from mllm_act.envs.results import summarize, table
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, run
from mllm_act.files import write_csv, write_json
from mllm_act.policy import Policy


def rollout(
    policy: Policy,
    pool: EnvPool,
    episodes: list[Episode],
    horizon: int,
    key: PRNGKeyArray | None = None,
) -> Iterator[Episode]:
    """Plays all episodes with the policy, fills in their results, and yields each as it ends.

    With a key, actions are sampled from the policy's distribution; without one, they are the most likely.
    """
    memory, step = policy.start(pool.num_envs), 0

    def decide(
        playing: Mapping[int, Episode], started: Sequence[int], observation: EnvObservation
    ) -> np.ndarray:
        nonlocal memory, step
        first = np.isin(np.arange(pool.num_envs), started)
        images, proprio = observation["images"], observation["proprio"]
        instructions = observation["instruction"].tolist()
        step_key = None if key is None else jax.random.fold_in(key, step)
        action, memory = policy.act(images, proprio, instructions, first, memory, step_key)
        step += 1
        return action[sorted(playing)]

    yield from play.play(pool, episodes, horizon, decide, "evaluate")


def write_video(folder: Path, episode: Episode, hertz: float) -> None:
    """Writes an episode's frames as a real-time video named after its task, and frees them."""
    folder.mkdir(exist_ok=True)
    frames = np.stack(episode.frames or [])
    episode.frames = None
    path = folder / f"{episode.job.task}.mp4"
    iio.imwrite(path, frames, fps=hertz, codec="libx264", macro_block_size=1)


def write_results(
    folder: Path, episodes: list[Episode], rows: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Writes ``episodes.csv``, ``tasks.csv`` and ``summary.json``."""
    write_csv(
        folder / "episodes.csv",
        [{**e.job._asdict(), "success": int(e.success), "steps": e.steps} for e in episodes],
    )
    write_csv(folder / "tasks.csv", rows)
    write_json(folder / "summary.json", summary)


def publish(folder: Path, out: Path) -> None:
    """Moves complete results into ``out``, replacing those of an earlier evaluation, videos included."""
    shutil.rmtree(out / "videos", ignore_errors=True)
    for path in folder.iterdir():
        os.replace(path, out / path.name)


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        help="a run's folder, or the folder of one of its steps",
    )
    add("--env", default="metaworld", help="the environment (default: metaworld)")
    add(
        "--split",
        default="test",
        help="train, test or another split of the environment (default: test)",
    )
    add("--tasks", help="task names or groups, comma-separated (default: the training tasks)")
    add("--horizon", type=int, help="maximum steps per episode (default: the environment's)")
    add("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    add(
        "--envs",
        type=int,
        default=16,
        help="simulators stepped together: the policy's batch size (default: 16)",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="simulator processes (default: one per core)",
    )
    add("--sample", action="store_true", help="sample actions instead of taking the most likely")
    add(
        "--ensembling",
        type=float,
        metavar="DECAY",
        help="predict a chunk at every step and average the overlapping ones, as ACT does with 0.01 "
        "(default: execute chunks one after another)",
    )
    add("--no-videos", action="store_true", help="do not record each task's first episode")
    add("--out", type=Path, help="output folder (default: RUN/evaluation/SPLIT)")
    return parser


def main() -> None:
    """Runs the program."""
    args = arguments().parse_args()
    spec = envs.spec(args.env)
    horizon = spec.horizon if args.horizon is None else args.horizon
    if not 1 <= horizon <= spec.horizon:
        raise UserError(f"--horizon: expected 1 to {spec.horizon} for {args.env}, found {horizon}")
    for option in ("envs", "workers"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option}: expected at least 1, found {getattr(args, option)}")
    workdir, _ = checkpoint.find(args.checkpoint)
    policy = Policy.load(args.checkpoint, embodiment=args.env, ensembling=args.ensembling)
    if args.sample and policy.embodiment.adapter == "regression":
        raise UserError(
            f"--sample: expected a policy that predicts a distribution of actions, found the regression adapter in "
            f"{args.checkpoint}, which predicts a single action; omit --sample"
        )
    episodes = play.episodes(
        args.env,
        args.tasks or ",".join(policy.meta["dataset"][args.env]["tasks"]),
        args.split,
        args.seed,
        videos=not args.no_videos,
    )
    out = args.out or workdir / "evaluation" / args.split
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as scratch:
        with EnvPool(args.env, min(args.envs, len(episodes)), args.workers) as pool:
            key = jax.random.key(args.seed) if args.sample else None
            for episode in rollout(policy, pool, episodes, horizon, key):
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
    print(table({"success": rows}))
    written = "episodes.csv, tasks.csv, summary.json" + ("" if args.no_videos else " and videos/")
    print(f"Wrote {written} to {out}")


if __name__ == "__main__":
    run(main)
