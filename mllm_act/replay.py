"""Measures what a tokenizer's reconstruction errors cost in the simulator.

    python -m mllm_act.replay --checkpoint=runs/metaworld/tokenizer_rvq --split=test

The scripted expert acts in closed loop on held-out start/goal configurations, and every action is encoded and
decoded before it is executed. The success rate, reported beside the expert's own, is an upper bound for any policy
that uses this tokenizer. ``mllm_act.train_tokenizer`` ends with this measurement.

Only tokenizers of single actions can be measured: the expert's next action depends on the next state, so in closed
loop it has no chunk of future actions to encode.
"""

import argparse
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from mllm_act import envs
from mllm_act.action_tokenizer import Tokenizer
from mllm_act.action_tokenizer.checkpoint import load_tokenizer
from mllm_act.envs import play
from mllm_act.envs.base import EnvObservation
from mllm_act.envs.play import Episode
from mllm_act.envs.processes import TIMEOUT, check_timeout
from mllm_act.envs.results import summarize, table
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, expect_values, run
from mllm_act.files import user_path, write_csv
from mllm_act.normalization import Statistics

Through = Callable[[Float[np.ndarray, "n A"]], Float[np.ndarray, "n A"]]
Results = dict[str, list[dict[str, Any]]]  # "replay" and "expert" -> rows of `summarize`


def through_tokenizer(model: Tokenizer, statistics: Statistics, batch: int) -> Through:
    """Returns a function that encodes and decodes actions as the policy does.

    It takes up to ``batch`` actions at a time, in the environment's units.
    """
    graph, variables = nnx.split(model)

    @jax.jit
    def reconstruct(variables: nnx.State, action: jax.Array) -> jax.Array:
        network = nnx.merge(graph, variables)
        normalized = statistics.normalize_for_codes(action)
        return statistics.unnormalize_codes(network.decode(network.encode(normalized)))

    def through(action: np.ndarray) -> np.ndarray:
        padded = np.zeros((batch, action.shape[-1]), np.float32)
        padded[: len(action)] = action
        return np.asarray(reconstruct(variables, padded))[: len(action)]

    return through


def replay(
    pool: EnvPool, episodes: Sequence[Episode], horizon: int, through: Through | None
) -> None:
    """Plays the expert, its actions passed through ``through`` (if any), and fills in the results."""

    def decide(
        playing: Mapping[int, Episode], started: Sequence[int], observation: EnvObservation
    ) -> np.ndarray:
        actions = pool.expert_actions(sorted(playing))
        return actions if through is None else through(actions)

    name = "expert" if through is None else "replay"
    for _ in play.play(pool, episodes, horizon, decide, name):
        pass  # the results are in the episodes


def csv_rows(results: Results) -> list[dict[str, Any]]:
    """Returns one row per task with the success rate and interval of both, e.g. ``replay`` and ``replay_low``."""
    merged = []
    for rows in zip(*results.values(), strict=True):
        row = {key: rows[0][key] for key in ("task", "episodes")}
        for name, summary in zip(results, rows, strict=True):
            row[name] = summary["success"]
            row |= {f"{name}_{bound}": summary[bound] for bound in ("low", "high")}
        merged.append(row)
    return merged


def measure(
    model: Tokenizer,
    statistics: Statistics,
    env: str,
    tasks: Sequence[str],
    out: Path,
    *,
    split: str = "test",
    seed: int = 0,
    num_envs: int = 16,
    workers: int = os.cpu_count() or 1,
    timeout: float = TIMEOUT,
) -> Results:
    """Plays the expert with and without the tokenizer on a split, and writes ``out/replay.csv``.

    Returns:
      The summaries by task of ``replay`` (with the tokenizer) and ``expert`` (without).

    Raises:
      UserError: a task or split that does not exist; a tokenizer of chunks, or of other action dimensions; a simulator
        that takes longer than ``timeout`` seconds for a step.
    """
    if model.config.chunk > 1:
        raise UserError(
            f"expected a tokenizer of single actions, found one of chunks of {model.config.chunk}: the "
            "expert's next actions are not known in closed loop; train one with chunk=1, or evaluate a policy "
            "with python -m mllm_act.evaluate"
        )
    names = ",".join(tasks)
    replayed, expert = (play.episodes(env, names, split, seed) for _ in range(2))
    num_envs = min(num_envs, len(expert))
    with EnvPool(env, num_envs, workers, render=False, timeout=timeout) as pool:
        if len(pool.spec.action_names) != model.config.action_dim:
            raise UserError(
                f"expected a tokenizer of the {len(pool.spec.action_names)} action dimensions of {env}, "
                f"found one of {model.config.action_dim}; choose the environment that it was trained for"
            )
        replay(pool, replayed, pool.spec.horizon, through_tokenizer(model, statistics, num_envs))
        replay(pool, expert, pool.spec.horizon, None)
    counted = functools.partial(
        summarize, total="all", task_of=functools.partial(envs.task_of, env)
    )
    results = {"replay": counted(replayed), "expert": counted(expert)}
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "replay.csv", csv_rows(results))
    return results


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=user_path, required=True, help="workdir of mllm_act.train_tokenizer")
    add("--tasks", help="task names or groups, comma-separated (default: the training tasks)")
    add("--split", default="test", help="start/goal configurations: train or test (default: test)")
    add("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    add("--envs", type=int, default=16, help="simulators stepped together (default: 16)")
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
    add("--out", type=user_path, help="output folder (default: CHECKPOINT/report)")
    args = parser.parse_args()
    expect_values(vars(args))
    check_timeout(args.timeout)
    tokenizer = load_tokenizer(args.checkpoint)
    tasks = args.tasks.split(",") if args.tasks else tokenizer.statistics.tasks
    out = args.out or tokenizer.workdir / "report"
    results = measure(
        tokenizer.model,
        tokenizer.statistics,
        tokenizer.metadata["name"],
        tasks,
        out,
        split=args.split,
        seed=args.seed,
        num_envs=args.envs,
        workers=args.workers,
        timeout=args.timeout,
    )
    print(table(results))
    print(f"Wrote the success rates on the {args.split} configurations to {out / 'replay.csv'}")


if __name__ == "__main__":
    run(main)
