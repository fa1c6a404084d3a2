"""The expert of `fetch_pick` on unseen rooms, with and without the noise of demonstrations, and rates.

    python benchmarks/fetch_pick.py                        # 200 episodes, then 500 frames
    python benchmarks/fetch_pick.py --episodes=40 --frames=200

Rates are per second of processor time, of one process with one thread: what a worker reaches on an idle core.
"""

import argparse
import time
from collections import Counter

import numpy as np

from mllm_act import envs
from mllm_act.envs.fetch_pick.fetch_pick import SPEC, FetchPickEnv
from mllm_act.envs.fetch_pick.objects import KINDS
from mllm_act.envs.results import wilson

SPLIT = "validation"


def attempt(env: FetchPickEnv, job: envs.Job, noise: float) -> tuple[bool, int, str]:
    """Lets the expert act in an episode; returns whether it succeeded, its steps, and what failed."""
    rng = np.random.default_rng(job.seed)
    env.reset(*job)
    for step in range(1, SPEC.horizon + 1):
        action = env.expert_action()
        executed = action + rng.normal(0.0, noise, action.shape) if noise else action
        if env.step(np.clip(executed, SPEC.action_low, SPEC.action_high))[2]:
            return True, step, ""
        if env.failure:
            return False, step, env.failure
    return False, step, "the horizon"


def expert(episodes: int, noise: float) -> None:
    """Prints the expert's success over all objects."""
    env = envs.make("fetch_pick", render=False)
    configurations = envs.splits("fetch_pick")[SPLIT]
    steps, failures = [], Counter[str]()
    for number in range(episodes):
        kind = KINDS[number % len(KINDS)]
        job = envs.Job(kind, configurations[number * 7 % len(configurations)], number)
        success, count, failure = attempt(env, job, noise)
        if success:
            steps.append(count)
        else:
            failures[failure] += 1
    low, high = wilson(len(steps), episodes)
    print(
        f"expert, noise {noise}: {len(steps)} of {episodes} episodes of {SPLIT} "
        f"(95 % interval {low:.0%} to {high:.0%}), {np.mean(steps):.0f} steps in the mean, {max(steps)} at most"
    )
    for failure, count in failures.items():
        print(f"  {count} x {failure}")


def rate(frames: int, render: bool, with_expert: bool) -> None:
    """Prints how many steps a worker takes in a second of processor time, resets included."""
    env = envs.make("fetch_pick", render=render)
    env.reset("mug", 0, 0)
    start, done, configuration = time.process_time(), 0, 0
    while done < frames:
        env.reset("mug", configuration, 0)
        configuration += 1
        for _ in range(30):
            env.step(env.expert_action() if with_expert else np.zeros(10, np.float32))
            done += 1
    seconds = time.process_time() - start
    what = (
        f"{'with' if render else 'without'} images, {'expert' if with_expert else 'standing still'}"
    )
    print(f"{what}: {done / seconds:.0f} steps per second of processor time")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--frames", type=int, default=500)
    args = parser.parse_args()
    for noise in (0.0, 0.1):
        expert(args.episodes, noise)
    rate(args.frames, render=False, with_expert=True)
    rate(args.frames, render=True, with_expert=False)
    rate(args.frames, render=True, with_expert=True)


if __name__ == "__main__":
    main()
