"""Evaluates a policy on CALVIN's chains: the five tasks of a sequence one after another, until one fails.

    CALVIN_ENV=... python benchmarks/calvin_chains.py --checkpoint=runs/calvin/rvq --env=calvin_static

This is the protocol of CALVIN's leaderboard: 1,000 sequences, 360 steps for each task, the policy's memory empty at the
start of each. It prints how many chains have at least 1, 2, ... 5 tasks solved, and their average length.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm_act import envs
from mllm_act.envs import Job
from mllm_act.envs.calvin import sequences
from mllm_act.envs.calvin.calvin import ANY, NEXT, SPLITS
from mllm_act.envs.play import Episode
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, run
from mllm_act.evaluate import rollout
from mllm_act.policy import Policy


def chains(policy: Policy, pool: EnvPool, configurations: Sequence[int]) -> np.ndarray:
    """Returns how many tasks of each sequence were solved, int64[n]."""
    solved: Counter[int] = Counter()

    def follow(episode: Episode) -> Episode | None:
        _, configuration, seed = episode.job
        solved[configuration] += episode.success
        goes_on = episode.success and solved[configuration] < sequences.LENGTH
        return Episode(Job(NEXT, configuration, seed)) if goes_on else None

    todo = [Episode(Job(ANY, configuration, 0)) for configuration in configurations]
    for _ in rollout(policy, pool, todo, pool.spec.horizon, follow=follow):
        pass
    return np.array([solved[configuration] for configuration in configurations])


def main() -> None:
    """Prints the lengths of the chains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's folder")
    parser.add_argument("--env", default="calvin_static", help="calvin or calvin_static (default)")
    parser.add_argument("--split", default="test", help="test (default) or redrawn")
    parser.add_argument(
        "--sequences", type=int, default=1000, help="the first of them (default: 1000)"
    )
    parser.add_argument("--envs", type=int, default=16, help="simulators (default: 16)")
    args = parser.parse_args()
    if args.split not in ("test", "redrawn") or not 1 <= args.sequences <= 1000 or args.envs < 1:
        raise UserError(
            "expected --split=test or redrawn, --sequences of 1 to 1000, --envs of 1 or more"
        )
    policy = Policy.load(args.checkpoint, embodiment=args.env)
    with EnvPool(args.env, min(args.envs, args.sequences), os.cpu_count() or 1) as pool:
        found = chains(policy, pool, SPLITS[args.split][: args.sequences])
    for length in range(1, sequences.LENGTH + 1):
        print(f"at least {length}: {np.mean(found >= length):.1%}")
    print(f"average length of {envs.spec(args.env).name}, {args.split}: {found.mean():.3f}")


if __name__ == "__main__":
    run(main)
