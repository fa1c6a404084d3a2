"""Generates demonstrations with an environment's scripted experts and writes them as RLDS.

    python -m data_pipelines.generate --env=metaworld --tasks=reach-v3,ml5 --episodes=40 \\
        --out=runs/data --workers=2
    python -m data_pipelines.generate --env=babyai --tasks=all --episodes=1000 --out=runs/babyai

Episode i of a task has training configuration i, modulo their number. Every 20th episode goes to the
split `val`, the others to `train`. The bytes of the dataset depend on the arguments, but not on the
number of workers, nor on whether the run was interrupted: generation.json has their digests. An
interrupted run continues when the same command is started again; until the dataset is complete,
recorded episodes are kept in DIR/.episodes.
"""

import argparse
import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines import resumable
from data_pipelines.reading.episodes import read_episodes
from data_pipelines.reading.rlds import Dataset, open_dataset
from data_pipelines.resumable import EPISODES
from data_pipelines.writing import recording
from mllm_act import envs, errors
from mllm_act.envs.processes import TIMEOUT, check_timeout
from mllm_act.errors import UserError
from mllm_act.files import user_path

VAL_EVERY = 20
MOST_EPISODES = 1_000_000  # of a task; their list is held in memory


@dataclasses.dataclass(frozen=True)
class Recording:
    """One episode to record."""

    task: str
    episode: int
    file: Path


def is_val(episode: int, episodes: int) -> bool:
    """Returns whether an episode is held out: every 20th of a task, or the last if a task has fewer than 20."""
    last_of_few = episodes < VAL_EVERY and episode == episodes - 1
    return episode % VAL_EVERY == VAL_EVERY - 1 or last_of_few


def generate(
    env: str,
    tasks: str,
    episodes: int,
    out: Path,
    workers: int,
    seed: int,
    timeout: float = TIMEOUT,
    beam_options: str | None = None,
) -> dict[str, Any]:
    """Writes the dataset to ``out``, unless it is complete already.

    Returns:
      The content of ``generation.json``: ``arguments``, ``recipe``, ``results`` per task and in total, and the
      ``sha256`` of every file of the dataset.

    Raises:
      UserError: an argument is wrong; ``out`` contains something else or a damaged dataset, is in use, or cannot be
        written to; no episode of a split succeeded; a worker died, or took longer than ``timeout`` seconds for an
        episode; or the run was interrupted.
    """
    names = envs.select_tasks(env, tasks)
    _check_numbers(episodes, workers, seed)
    check_timeout(timeout)
    arguments = {"env": env, "tasks": list(names), "episodes": episodes, "seed": seed}
    jobs = [
        Recording(task, episode, out / EPISODES / task / f"{episode:06d}.npz")
        for task in names
        for episode in range(episodes)
    ]
    with resumable.writing(out, [job.file for job in jobs]):
        record = _open(out, arguments)
        if "results" in record:
            _check_complete(out)
            shutil.rmtree(out / EPISODES, ignore_errors=True)
            print(f"{out} is complete: nothing to do")
            return record
        if beam_options is not None:
            return _on_beam(record, jobs, timeout, out, beam_options)
        return _complete(record, jobs, workers, timeout, out)


def _on_beam(
    record: dict[str, Any], jobs: Sequence[Recording], timeout: float, out: Path, options: str
) -> dict[str, Any]:
    """Records and writes the dataset on Apache Beam."""
    try:
        from data_pipelines.writing import on_beam
    except ImportError as error:
        raise UserError(
            f"--beam_options: expected the package apache-beam, found none ({error}); pip install 'mllm-act[beam]'"
        ) from None
    arguments = record["arguments"]
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "val": []}
    for job in jobs:
        split = "val" if is_val(job.episode, arguments["episodes"]) else "train"
        splits[split].append((job.task, job.episode))
    (out / EPISODES).mkdir(exist_ok=True)
    env, seed = arguments["env"], arguments["seed"]
    dataset = on_beam.write(env, splits, seed, timeout, resumable.staging(out), options)
    record["sha256"] = resumable.publish(dataset, out)
    record["results"] = _results_of(open_dataset(out))
    resumable.finish(out, record)
    print(f"{record['results']['episodes']} of {len(jobs)} episodes succeeded and are in {out}")
    return record


def _results_of(dataset: Dataset) -> dict[str, Any]:
    """Returns the numbers of episodes and frames of each task in a dataset, and in total."""
    tasks: dict[str, dict[str, int]] = {}
    for split in dataset.splits.values():
        for _, episode in read_episodes(dataset, split, images=False):
            row = tasks.setdefault(episode["task"].decode(), {"episodes": 0, "frames": 0})
            row["episodes"] += 1
            row["frames"] += len(episode["action"])
    total = {key: sum(row[key] for row in tasks.values()) for key in ("episodes", "frames")}
    return {"tasks": dict(sorted(tasks.items())), **total}


def _complete(
    record: dict[str, Any], jobs: Sequence[Recording], workers: int, timeout: float, out: Path
) -> dict[str, Any]:
    """Records the missing episodes, then writes the dataset and the results."""
    arguments = record["arguments"]
    started = time.perf_counter()
    frames = _record(arguments["env"], arguments["seed"], jobs, workers, timeout)
    seconds = time.perf_counter() - started
    summaries = {job: recording.summary(job.file) for job in jobs}
    record["results"] = results = _results(arguments["tasks"], summaries)
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    for job, summary in summaries.items():
        if summary["success"]:
            split = "val" if is_val(job.episode, arguments["episodes"]) else "train"
            splits[split].append(job.file)
    for split, files in splits.items():
        if not files:
            raise UserError(
                f"split {split}: expected at least one successful episode, found none; use more --episodes"
            )
    record["sha256"] = _write(arguments["env"], splits, out, workers, timeout)
    resumable.finish(out, record)
    _report(arguments["env"], out, results, frames, seconds, min(workers, len(jobs)))
    return record


def _check_numbers(episodes: int, workers: int, seed: int) -> None:
    if not 2 <= episodes <= MOST_EPISODES:
        raise UserError(
            f"--episodes: expected at least 2 (one is held out) and at most {MOST_EPISODES}, found {episodes}"
        )
    if workers < 1:
        raise UserError(f"--workers: expected at least 1, found {workers}")
    if seed < 0:
        raise UserError(f"--seed: expected 0 or more, found {seed}")


def _open(out: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of ``generation.json``; see ``resumable.open_record``."""
    recipe = recording.recipe(envs.spec(arguments["env"]))
    return resumable.open_record(out, {"arguments": arguments, "recipe": recipe}, "this command")


def _check_complete(out: Path) -> None:
    """Raises UserError if the dataset in ``out`` is no longer as it was written."""
    try:
        open_dataset(out)
    except UserError as error:
        raise UserError(f"{error}; to generate it again here, delete {out} first") from None


def _record(env: str, seed: int, jobs: Sequence[Recording], workers: int, timeout: float) -> int:
    """Records the missing episodes; returns the number of frames simulated for them."""
    missing = [job for job in jobs if not resumable.kept(job.file)]
    for job in missing:
        job.file.parent.mkdir(parents=True, exist_ok=True)
    frames = 0
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(missing), unit="episode", desc="recording"
    ) as bar:
        for job, _ in resumable.in_workers(
            "data_pipelines.writing.recording:serve", missing, min(workers, len(missing)), timeout,
            request=lambda job: (job.task, job.episode, str(job.file)),
            doing=lambda job: f"{job.task}, episode {job.episode}",
            env=env, seed=seed,
        ):  # fmt: skip
            frames += recording.summary(job.file)["frames_drawn"]
            bar.update()
            bar.set_postfix_str(f"{frames / bar.format_dict['elapsed']:.0f} frames/s, {job.task}")
    return frames


def _write(
    env: str, splits: dict[str, list[Path]], out: Path, workers: int, timeout: float
) -> dict[str, str]:
    """Writes the dataset with TFDS to a temporary folder, then moves its files to ``out``; returns their SHA-256."""
    from data_pipelines import shards  # imports TensorFlow

    return resumable.publish(
        shards.write(env, splits, resumable.staging(out), workers, timeout), out
    )


def _results(tasks: Sequence[str], summaries: dict[Recording, dict[str, Any]]) -> dict[str, Any]:
    results: dict[str, Any] = {"tasks": {}, "failed": []}
    for task in tasks:
        episodes = {job.episode: summary for job, summary in summaries.items() if job.task == task}
        successes = [summary for summary in episodes.values() if summary["success"]]
        results["tasks"][task] = {
            "episodes": len(successes),
            "frames": sum(summary["steps"] for summary in successes),
            "attempts": sum(summary["attempts"] for summary in episodes.values()),
        }
        results["failed"] += [
            f"{task}, episode {episode}"
            for episode, summary in episodes.items()
            if not summary["success"]
        ]
    for key in ("episodes", "frames", "attempts"):
        results[key] = sum(task[key] for task in results["tasks"].values())
    return results


def _report(
    env: str, out: Path, results: dict[str, Any], frames: int, seconds: float, workers: int
) -> None:
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    print(f"\n{'task':32s} episodes  mean steps  success per attempt")
    for task, row in results["tasks"].items():
        steps = row["frames"] / max(row["episodes"], 1)
        rate = row["episodes"] / row["attempts"]
        print(f"{task:32s} {row['episodes']:8d}  {steps:10.1f}  {rate:19.1%}")
    rate = results["episodes"] / results["attempts"]
    print(
        f"\n{results['episodes']} episodes, {results['frames']} frames, {size / 1e6:.1f} MB "
        f"in {out}; {rate:.1%} of the attempts succeeded"
    )
    if frames:
        speed = frames / seconds
        print(
            f"{frames} frames simulated in {seconds:.1f} s: {speed:.1f} frames/s, "
            f"{speed / workers:.1f} per worker ({workers})"
        )
    for failed in results["failed"]:
        print(f"omitted, no success in {recording.MAX_ATTEMPTS} attempts: {failed}")
    if not envs.spec(env).choices:  # discrete actions need no tokenizer
        print(
            f"next: python -m mllm_act.train_tokenizer --config=configs/tokenizer/{env}.py:rvq "
            f"--config.data.directory={out} --workdir=runs/tokenizer"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--env", default="metaworld", help="environment (default: metaworld)")
    parser.add_argument(
        "--tasks",
        required=True,
        help="comma-separated names of tasks and groups; metaworld: ml45 (train), ml5 (held out); "
        "babyai, language_rearrangement, calvin: all",
    )
    parser.add_argument("--episodes", type=int, default=40, help="per task (default: 40)")
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder to write the dataset to"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes with one simulator each (default: number of cores)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help="seconds that a worker may take for an episode (default: %(default)g)",
    )
    parser.add_argument(
        "--beam_options",
        help="record and write on Apache Beam, with these options of its pipeline, such as "
        "--beam_options='--runner=DataflowRunner --project=...'; --workers is not used",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of noise and layouts (default: 0)"
    )
    options = vars(parser.parse_args())
    errors.expect_values(options)
    generate(**options)


if __name__ == "__main__":
    errors.run(main)
