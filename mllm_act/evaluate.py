"""Evaluates a policy in the simulator, or on recorded episodes.

    python -m mllm_act.evaluate --checkpoint=runs/metaworld/rvq --env=metaworld --split=test
    python -m mllm_act.evaluate --checkpoint=runs/my_robot --data=DIR --split=val

With ``--env`` it plays episodes and reports success rates. All simulators are stepped together in worker processes, and
the policy acts on them as one batch. An episode ends at its first success or at the horizon. Writes to ``--out``:
``episodes.csv`` (one line per episode, with its seed), ``tasks.csv`` (success and Wilson's 95 % interval),
``summary.json`` and a video of each task's first episode. The same seed gives the same results, with ``--sample`` too.
With ``--policy=ws://HOST:PORT`` in place of ``--checkpoint``, the policy is that of ``python -m mllm_act.serve``. The
results are the same; the package in ``clients/python`` must be installed.

With ``--data`` recorded frames pass through the policy as on the robot, and its actions are compared with the recorded
ones: see ``mllm_act.evaluate_data``. Writes ``dimensions.csv``, ``episodes.csv``, ``horizon.csv`` (of policies with
chunks), ``summary.json``, and plots of up to 8 episodes.

The files of an earlier evaluation, which its ``summary.json`` lists, are replaced; a folder that holds others is
refused. Several processes (see ``launch``) share out the episodes; all must see --out.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mllm_act import envs
from mllm_act.checkpoints import checkpoint
from mllm_act.distributed.exchange import group
from mllm_act.distributed.start import start
from mllm_act.envs import play
from mllm_act.envs.base import EnvObservation, Job
from mllm_act.envs.play import Episode
from mllm_act.envs.processes import TIMEOUT, check_timeout
from mllm_act.envs.results import summarize, table
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, expect_values, run
from mllm_act.evaluate_remote import RemotePolicy, check_source
from mllm_act.files import LOCK, locked, user_path, write_csv, write_json
from mllm_act.policy import Policy

SUMMARY = (
    "summary.json"  # of an evaluation; its key "files" lists all files that the evaluation wrote
)
PARTIAL = ".partial-"  # prefix of what a killed evaluation leaves
# Options that are read only with a simulator, or only with --data.
SIMULATED = ("tasks", "horizon", "seed", "workers", "timeout", "sample", "no_videos")
RECORDED = ("mapping", "embodiment", "episodes")


def step_keys(steps: Sequence[tuple[Job, int]]) -> Key[Array, " B"]:
    """Returns the random key of each step of an episode; it depends on the job and the step only."""
    words = [
        np.frombuffer(
            hashlib.blake2b(repr((*job, step)).encode(), digest_size=8).digest(), np.uint32
        )
        for job, step in steps
    ]
    return jax.random.wrap_key_data(jnp.asarray(np.stack(words)), impl="threefry2x32")


def rollout(
    policy: Policy | RemotePolicy,
    pool: EnvPool,
    episodes: list[Episode],
    horizon: int,
    sample: bool = False,
    follow: Callable[[Episode], Episode | None] = lambda episode: None,
) -> Iterator[Episode]:
    """Plays all episodes with the policy, fills in their results, and yields each as it ends.

    Args:
      policy: decides the actions.
      pool: the simulators.
      episodes: to play.
      horizon: maximum steps per episode.
      sample: draw actions from the policy's distribution instead of taking the most likely. An episode's draws depend
        on its job only, not on the pool.
      follow: see ``play.play``.
    """
    memory: Any = policy.start(pool.num_envs)

    def decide(
        playing: Mapping[int, Episode], started: Sequence[int], observation: EnvObservation
    ) -> np.ndarray:
        nonlocal memory
        first = np.isin(np.arange(pool.num_envs), started)
        images, proprio = observation["images"], observation["proprio"]
        instructions = observation["instruction"].tolist()
        keys: Any = None
        if sample:
            idle = Episode(Job("", 0, 0))
            slots = [playing.get(slot, idle) for slot in range(pool.num_envs)]
            keys = step_keys([(episode.job, episode.steps) for episode in slots])
            if isinstance(policy, RemotePolicy):
                keys = np.asarray(jax.random.key_data(keys))
        action, memory = policy.act(images, proprio, instructions, first, memory, keys)
        return action[sorted(playing)]

    yield from play.play(pool, episodes, horizon, decide, "evaluate", follow)


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
    """Writes ``episodes.csv``, ``tasks.csv`` and ``summary.json``, which lists these and the videos in ``folder``."""
    write_csv(
        folder / "episodes.csv",
        [{**e.job._asdict(), "success": int(e.success), "steps": e.steps} for e in episodes],
    )
    write_csv(folder / "tasks.csv", rows)
    write_summary(folder, summary)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes ``summary.json``, which lists all files in ``folder``."""
    write_json(folder / SUMMARY, summary | {"files": sorted({SUMMARY, *_files(folder)})})


def _files(folder: Path) -> Iterator[str]:
    """Yields all that ``folder`` and its folders contain, except for empty folders and what killed programs left."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(PARTIAL) or path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from (f"{path.name}/{name}" for name in _files(path))
        else:
            yield path.name


def own_files(out: Path) -> set[str]:
    """Returns the files in ``out``, all of them written by an earlier evaluation.

    Raises:
      UserError: it holds another file, or is none that can be read.
    """
    if not os.path.lexists(out):
        return set()
    try:
        present = set(_files(out))
        listed = json.loads((out / SUMMARY).read_text())["files"] if SUMMARY in present else []
        foreign = sorted(name for name in present if name not in listed)
    except OSError as error:
        raise UserError(f"--out={out}: expected a folder, found {error.strerror}") from None
    except (ValueError, TypeError, KeyError):  # another program's summary.json
        foreign = [SUMMARY]
    if foreign:
        raise UserError(
            f"--out={out}: expected an empty folder, or only files of an earlier evaluation ({SUMMARY} lists them), "
            f"found {foreign[0]}; move it, or choose another --out"
        )
    return present


def publish(folder: Path, out: Path) -> None:
    """Moves complete results into ``out``, replacing those of an earlier evaluation, videos included."""
    old, summary = own_files(out), json.loads((folder / SUMMARY).read_text())
    new = set(summary["files"])
    # Listed before anything is moved: after a kill the next evaluation still knows all files as its own.
    write_json(out / SUMMARY, summary | {"files": sorted(old | new)})
    for name in old - new:
        (out / name).unlink()
    for name in sorted(new - {SUMMARY}):
        (out / name).parent.mkdir(exist_ok=True)
        os.replace(folder / name, out / name)
    os.replace(folder / SUMMARY, out / SUMMARY)


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yields an empty folder for results; if the block ends without an error, they replace earlier ones in ``out``.

    No other program writes to ``out``.
    """
    own_files(out)
    for left_by_a_kill in out.glob(PARTIAL + "*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=PARTIAL) as scratch:
        yield Path(scratch)
        publish(Path(scratch), out)


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
        type=user_path,
        help="a run's folder, or the folder of one of its steps",
    )
    add("--policy", metavar="URL", help="in place of --checkpoint: a server, ws://HOST:PORT")
    add("--env", help="the environment (default: metaworld)")
    add("--data", help="in place of --env: a folder of recorded episodes, or several: DIR,DIR")
    add(
        "--mapping",
        help="how to read --data: a file, or a shipped name (default: as in training)",
    )
    add("--embodiment", help="whose --data it is, of a policy that was trained for several")
    add("--episodes", type=int, help="of --data, evenly spaced over the split (default: all)")
    add("--split", help="a split of the environment (default: test) or of --data (default: val)")
    add("--tasks", help="task names or groups, comma-separated (default: the training tasks)")
    add("--horizon", type=int, help="maximum steps per episode (default: the environment's)")
    add("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    add(
        "--envs",
        type=int,
        default=16,
        help="simulators, or recorded episodes, stepped together: the policy's batch size (default: 16)",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="simulator processes (default: one per core)",
    )
    add(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help="seconds that a simulator may take for a step (default: %(default)g)",
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
    add(
        "--out",
        type=user_path,
        help="output folder (default: RUN/evaluation/ENV/SPLIT, or RUN/offline/NAME/SPLIT)",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for options that exclude each other, or are out of range."""
    parser = arguments()
    if args.env is not None and args.data is not None:
        raise UserError(
            "--env, --data: expected a simulator or recorded episodes, found both; leave one out"
        )
    check_source(args)
    for option in RECORDED if args.data is None else SIMULATED:
        if getattr(args, option) != parser.get_default(option):
            kind = "--data" if args.data is None else "a simulator"
            raise UserError(
                f"--{option.replace('_', '-')}: expected it only with {kind}, found it without; leave it out"
            )
    for option in ("envs", "workers", "episodes"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UserError(f"--{option}: expected at least 1, found {value}")


def main() -> None:
    """Runs the program."""
    args = arguments().parse_args(start(sys.argv)[1:])
    expect_values(vars(args))
    check_options(args)
    group.expect_same("evaluation", {f"--{key}": str(x) for key, x in vars(args).items()})
    if args.data is None:
        simulate(args)
    else:
        replay_recorded(args)


def replay_recorded(args: argparse.Namespace) -> None:
    """Evaluates on recorded episodes."""
    from data_pipelines.mapping import load_mapping
    from mllm_act import evaluate_data  # not at the top: it imports TensorFlow

    if group.count > 1:
        raise UserError(
            f"--data: expected one process, found {group.count}; recorded episodes are evaluated by --processes=1"
        )
    workdir, _ = checkpoint.find(args.checkpoint)
    split = args.split or "val"
    mapping = None if args.mapping is None else load_mapping(args.mapping)
    name = args.embodiment or (None if mapping is None else mapping.name)
    policy = Policy.load(args.checkpoint, embodiment=name, ensembling=args.ensembling)
    recordings = evaluate_data.open_recordings(policy, args.data, mapping, split, args.episodes)
    out = args.out or workdir / "offline" / policy.name / split
    with locked(out, "--out"), replacing(out) as scratch:
        found, text = evaluate_data.evaluate(recordings, args.envs, scratch)
        write_summary(scratch, {
            "checkpoint": str(args.checkpoint.resolve()), "step": policy.meta["step"], "data": args.data,
            "split": split, "ensembling": args.ensembling, **found,
        })  # fmt: skip
    print(f"{text}\nWrote summary.json, tables and plots to {out}")


def simulate(args: argparse.Namespace) -> None:
    """Evaluates in a simulator."""
    args.env, args.split = args.env or "metaworld", args.split or "test"
    spec = envs.spec(args.env)
    horizon = spec.horizon if args.horizon is None else args.horizon
    if not 1 <= horizon <= spec.horizon:
        raise UserError(f"--horizon: expected 1 to {spec.horizon} for {args.env}, found {horizon}")
    check_timeout(args.timeout)
    out = args.out
    if args.checkpoint is not None:
        workdir, _ = checkpoint.find(args.checkpoint)
        out = args.out or workdir / "evaluation" / args.env / args.split
    with contextlib.ExitStack() as held:
        scratch = out
        if group.first:
            held.enter_context(locked(out, "--out"))
            scratch = held.enter_context(replacing(out))
        scratch = Path(group.from_first("scratch", lambda: str(scratch.resolve())))
        evaluate(args, horizon, scratch)
    written = "episodes.csv, tasks.csv, summary.json" + ("" if args.no_videos else " and videos/")
    print(f"Wrote {written} to {out}")


def open_policy(args: argparse.Namespace) -> tuple[Policy | RemotePolicy, dict[str, Any]]:
    """Returns the policy, and what the summary says of it; ``tasks`` are those of its training."""
    if args.policy is not None:
        remote = RemotePolicy(args.policy, args.env, args.sample)
        keys = ("step", "adapter", "chunk", "ensembling", "statistics", "tasks")
        return remote, {"checkpoint": args.policy, **{key: remote.metadata[key] for key in keys}}
    policy = Policy.load(args.checkpoint, embodiment=args.env, ensembling=args.ensembling)
    if args.sample and policy.embodiment.adapter == "regression":
        raise UserError(
            f"--sample: expected a policy that predicts a distribution of actions, found the regression adapter in "
            f"{args.checkpoint}, which predicts a single action; omit --sample"
        )
    return policy, {
        "checkpoint": str(args.checkpoint.resolve()), "step": policy.meta["step"],
        "adapter": policy.embodiment.adapter, "chunk": policy.embodiment.chunk, "ensembling": args.ensembling,
        "tasks": policy.meta["dataset"][args.env]["tasks"],
    }  # fmt: skip


def evaluate(args: argparse.Namespace, horizon: int, scratch: Path) -> None:
    """Plays the episodes, each in one of the processes, and writes the results to the folder ``scratch``."""
    policy, about = open_policy(args)
    episodes = play.episodes(
        args.env, args.tasks or ",".join(about.pop("tasks")), args.split, args.seed, videos=not args.no_videos
    )  # fmt: skip
    own = episodes[group.process :: group.count]
    if own:
        num_envs = min(args.envs, len(own))
        with EnvPool(args.env, num_envs, args.workers, timeout=args.timeout) as pool:
            for episode in rollout(policy, pool, own, horizon, args.sample):
                if episode.frames is not None:
                    write_video(scratch / "videos", episode, envs.spec(args.env).control_hz)
    results = group.gather("episodes", [(episode.success, episode.steps) for episode in own])
    for process, of_process in enumerate(results):  # none but in the first process
        for episode, result in zip(episodes[process :: group.count], of_process, strict=True):
            episode.success, episode.steps = result
    if not group.first:
        return
    rows = summarize(episodes, task_of=functools.partial(envs.task_of, args.env))
    summary = {
        **about, "env": args.env, "sample": args.sample, "split": args.split, "seed": args.seed, "horizon": horizon,
        "envs": args.envs, "tasks": rows,
    }  # fmt: skip
    write_results(scratch, episodes, rows, summary)
    print(table({"success": rows}))


if __name__ == "__main__":
    run(main)
