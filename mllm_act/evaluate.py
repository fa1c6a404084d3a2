"""Rolls a policy out in the simulator and counts successes.

    python -m mllm_act.evaluate --checkpoint=runs/metaworld/rvq --env=metaworld --split=test

All simulators are stepped together, spread over worker processes, and the policy acts on them as one batch. An
episode ends at its first success or at the horizon. Leaves in ``--out``: ``episodes.csv`` (a line an episode, with its
seed), ``tasks.csv`` (success and Wilson's 95 % interval), ``summary.json`` and a video of each task's first episode.
The same seed gives the same figures.
"""

import csv
import dataclasses
import json
import os
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from absl import app, flags
from tqdm import tqdm

from mllm_act import envs
from mllm_act.envs.base import EnvObservation, Job
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, nearest, run
from mllm_act.intervals import wilson
from mllm_act.policy import Policy

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder, or one step's folder in it.", required=True
)
ENV = flags.DEFINE_string("env", "metaworld", "The environment.")
SPLIT = flags.DEFINE_string("split", "test", "Which start/goal configurations: train or test.")
TASKS = flags.DEFINE_string(
    "tasks", None, "Task names or groups, comma-separated; by default those trained on."
)
EPISODES = flags.DEFINE_integer("episodes", 1, "Episodes for each configuration of each task.")
HORIZON = flags.DEFINE_integer(
    "horizon", None, "Most steps of an episode; by default the environment's own."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the first episode of each configuration.")
ENVS = flags.DEFINE_integer("envs", 16, "Simulators stepped together: the policy's batch.")
WORKERS = flags.DEFINE_integer(
    "workers", os.cpu_count() or 1, "Worker processes that the simulators are spread over."
)
VIDEOS = flags.DEFINE_bool("videos", True, "Whether to write a video of each task's first episode.")
OUT = flags.DEFINE_string("out", None, "Output folder; by default CHECKPOINT/evaluation/SPLIT.")


@dataclasses.dataclass
class Episode:
    """One rollout: its job and how it went. Frames are kept where a video is wanted."""

    job: Job
    steps: int = 0
    success: bool = False
    frames: list[np.ndarray] | None = None


def rollout(policy: Policy, pool: EnvPool, episodes: list[Episode], horizon: int) -> None:
    """Plays all episodes to their end, filling in their results; a free slot takes the next in the list."""
    sentences, spec, slots = envs.instructions(pool.spec.name), pool.spec, pool.num_envs
    waiting = deque(episodes)
    playing: dict[int, Episode] = {}
    # Slots without an episode keep what was there last: the batch has one shape throughout.
    shape = (slots, spec.image_size, spec.image_size, 3)
    images = {camera: np.zeros(shape, np.uint8) for camera in spec.cameras}
    proprio = np.zeros((slots, len(spec.proprio_names)), np.float32)
    texts = [""] * slots
    memory = policy.start(slots)

    def store(places: list[int], seen: EnvObservation) -> None:
        for camera, frames in seen["images"].items():
            images[camera][places] = frames
        proprio[places] = seen["proprio"]

    bar = tqdm(total=len(episodes), desc="evaluate", unit="episode")
    successes = 0
    while waiting or playing:
        fresh = [slot for slot in range(slots) if slot not in playing][: len(waiting)]
        first = np.isin(np.arange(slots), fresh)
        if fresh:
            playing |= {slot: waiting.popleft() for slot in fresh}
            store(fresh, pool.reset(fresh, [playing[slot].job for slot in fresh]))
            for slot in fresh:
                texts[slot] = sentences[playing[slot].job.task]
        action, memory = policy.act(images, proprio, texts, first, memory)
        busy = sorted(playing)
        seen, _, success = pool.step(action[busy], busy)
        store(busy, seen)
        for slot, done in zip(busy, success, strict=True):
            episode = playing[slot]
            episode.steps += 1
            episode.success = bool(done)
            if episode.frames is not None:
                episode.frames.append(images[spec.cameras[0]][slot].copy())
            if done or episode.steps == horizon:
                del playing[slot]
                successes += episode.success
                bar.update()
                bar.set_postfix(success=f"{successes / bar.n:.0%}")
    bar.close()


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


def write(
    out: Path,
    episodes: list[Episode],
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
    fps: float,
) -> None:
    """Writes the results; each file appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        partial = Path(scratch)
        with (partial / "episodes.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["task", "configuration", "seed", "success", "steps"])
            writer.writerows([*e.job, int(e.success), e.steps] for e in episodes)
        with (partial / "tasks.csv").open("w", newline="") as file:
            columns = csv.DictWriter(file, list(rows[0]))
            columns.writeheader()
            columns.writerows(rows)
        (partial / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (out / "videos").mkdir(exist_ok=True)
        for episode in episodes:
            if episode.frames:
                name = f"{episode.job.task}.mp4"
                iio.imwrite(
                    partial / name,
                    np.stack(episode.frames),
                    fps=fps,
                    codec="libx264",
                    macro_block_size=1,
                )
                os.replace(partial / name, out / "videos" / name)
        for name in ("episodes.csv", "tasks.csv", "summary.json"):
            os.replace(partial / name, out / name)


def main(_: list[str]) -> None:
    """Runs the program."""
    spec = envs.spec(ENV.value)
    if SPLIT.value not in envs.SPLITS:
        raise UserError(
            f"--split={SPLIT.value}: no such split of {ENV.value}; {nearest(SPLIT.value, envs.SPLITS)}"
        )
    if EPISODES.value < 1 or ENVS.value < 1:
        raise UserError(
            f"--episodes and --envs: expected at least 1, found {EPISODES.value} and {ENVS.value}"
        )
    policy = Policy.load(CHECKPOINT.value)
    trained_on = policy.meta["dataset"]
    if trained_on["name"] != ENV.value:
        raise UserError(
            f"--env={ENV.value}: expected {trained_on['name']!r}, which {CHECKPOINT.value} was trained on; "
            "evaluate it there"
        )
    tasks = envs.select_tasks(ENV.value, TASKS.value or ",".join(trained_on["tasks"]))
    horizon = HORIZON.value or spec.horizon
    episodes = [
        Episode(Job(task, configuration, SEED.value + repeat))
        for task in tasks
        for repeat in range(EPISODES.value)
        for configuration in envs.SPLITS[SPLIT.value]
    ]
    if VIDEOS.value:
        for task in tasks:
            next(e for e in episodes if e.job.task == task).frames = []
    with EnvPool(ENV.value, min(ENVS.value, len(episodes)), WORKERS.value) as pool:
        rollout(policy, pool, episodes, horizon)

    rows = summarize(episodes)
    out = Path(OUT.value) if OUT.value else Path(CHECKPOINT.value) / "evaluation" / SPLIT.value
    summary = {
        "checkpoint": str(Path(CHECKPOINT.value).resolve()), "step": policy.meta["step"], "env": ENV.value,
        "adapter": policy.meta["network"]["adapter"], "split": SPLIT.value, "seed": SEED.value, "horizon": horizon,
        "envs": ENVS.value, "tasks": rows,
    }  # fmt: skip
    write(out, episodes, rows, summary, spec.control_hz)
    print(table(rows))
    print(
        f"Wrote episodes.csv, tasks.csv, summary.json{' and videos/' if VIDEOS.value else ''} to {out}"
    )


if __name__ == "__main__":
    run(lambda: app.run(main))
