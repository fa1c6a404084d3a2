"""How often CALVIN's scripted experts succeed, task by task and scene by scene, with the noise of demonstrations.

    CALVIN_ENV=... python benchmarks/calvin_experts.py --episodes=10

Episodes have no images. Those in the scenes A, B and C are drawn as for training, those in D as for ``redrawn``. With
``--official=N`` it plays the first N official sequences instead, all five tasks of each, until one fails.
``--rates`` measures speed.
"""

import argparse
import resource
from collections.abc import Sequence

import numpy as np

from mllm_act import envs
from mllm_act.envs import Job
from mllm_act.envs.base import ExpertFailed
from mllm_act.envs.calvin import sequences
from mllm_act.envs.calvin.calvin import SPLITS, make
from mllm_act.errors import UserError, run

NOISE = 0.1


def play(env: envs.Env, job: Job) -> int:
    """Returns the steps that the expert needs, 0 if it fails."""
    random = np.random.default_rng(job.seed)
    env.reset(*job)
    for step in range(env.spec.horizon):
        try:
            action = env.expert_action()
        except ExpertFailed:
            return 0
        _, _, success = env.step(action + random.normal(0, NOISE, action.shape).astype(np.float32))
        if success:
            return step + 1
    return 0


def of_task(env: envs.Env, task: str, episodes: int) -> str:
    """Returns the row of a task: successes in each scene, and the mean number of steps."""
    cells, steps = [], []
    for scene in "ABCD":
        split, first = ("redrawn", 0) if scene == "D" else ("train", "ABC".index(scene))
        of_scene = [play(env, Job(task, SPLITS[split][first + 3 * i], i)) for i in range(episodes)]
        cells.append(f"{sum(n > 0 for n in of_scene):3d}")
        steps += [n for n in of_scene if n]
    return f"{task:26s} {' '.join(cells)}  {np.mean(steps) if steps else 0:5.0f}"


def official(env: envs.Env, count: int) -> None:
    """Prints how many of an official sequence's five tasks the expert solves one after another."""
    solved = []
    for configuration in SPLITS["test"][:count]:
        names: Sequence[str] = ("any", *["next"] * (sequences.LENGTH - 1))
        done = 0
        while done < len(names) and play(env, Job(names[done], configuration, 0)):
            done += 1
        solved.append(done)
    print(f"{count} sequences; tasks solved in a row: {np.mean(solved):.2f}")
    for length in range(1, sequences.LENGTH + 1):
        print(f"  at least {length}: {np.mean(np.array(solved) >= length):.1%}")


def rates() -> None:
    """Prints steps per second of processor time of a simulator's process, without its start."""
    for name, render in (("calvin", True), ("calvin_static", True), ("calvin", False)):
        used = []
        for steps in (1, 61):
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            env = envs.make(name, render=render)
            env.reset("any", SPLITS["test"][0], 0)
            for _ in range(steps):
                env.step(np.zeros(7, np.float32))
            env.close()
            used.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        images = ", ".join(env.spec.cameras) if render else "none"
        print(f"images: {images}: {60 / (used[1] - used[0]):.0f} steps per second")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=10, help="per task and scene (default: 10)")
    parser.add_argument("--tasks", default="tasks", help="task and group names (default: all 34)")
    parser.add_argument(
        "--official", type=int, default=0, help="official sequences to play instead"
    )
    parser.add_argument("--rates", action="store_true", help="measure the speed instead")
    args = parser.parse_args()
    if not 0 <= args.official <= sequences.SEQUENCES or args.episodes < 1:
        raise UserError("expected --episodes of 1 or more and --official of 0 to 1000")
    env = make(render=False)
    if args.rates:
        rates()
    elif args.official:
        official(env, args.official)
    else:
        print(f"{'task':26s}   A   B   C   D  steps")
        for task in envs.select_tasks("calvin", args.tasks):
            print(of_task(env, task, args.episodes), flush=True)
    env.close()


if __name__ == "__main__":
    run(main)
