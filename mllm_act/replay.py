"""Replay: what a tokenizer's errors cost in the simulator.

    python -m mllm_act.replay --checkpoint=runs/metaworld/tokenizer_rvq --split=test

The scripted expert acts in closed loop on unseen start/goal configurations, with every action passed
through encode and decode before it is executed. Its success rate, beside the expert's own, is the
upper bound of any policy on that tokenizer. ``mllm_act.train_tokenizer`` ends with it.

Only for tokenizers of single actions: what the expert will do next depends on what it sees next, so that
in closed loop it has no chunk of future actions to encode.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from mllm_act.action_tokenizer import checkpoint
from mllm_act.action_tokenizer.kinds import Tokenizer
from mllm_act.action_tokenizer.report import write_csv
from mllm_act.envs import play
from mllm_act.envs.base import EnvObservation
from mllm_act.envs.play import Episode
from mllm_act.envs.results import wilson
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, run
from mllm_act.normalization import Statistics

Through = Callable[[Float[np.ndarray, "n A"]], Float[np.ndarray, "n A"]]


def through_tokenizer(model: Tokenizer, statistics: Statistics, batch: int) -> Through:
    """Encode, then decode as the policy does (within the demonstrations' range).

    For up to ``batch`` actions (the environment's own numbers) at a time.
    """
    graph, variables = nnx.split(model)

    @jax.jit
    def once(variables: nnx.State, action: jax.Array) -> jax.Array:
        network = nnx.merge(graph, variables)
        normalized = statistics.normalize_action(action)
        return statistics.unnormalize_action(
            jnp.clip(network.decode(network.encode(normalized)), -1, 1)
        )

    def through(action: np.ndarray) -> np.ndarray:
        padded = np.zeros((batch, action.shape[-1]), np.float32)
        padded[: len(action)] = action
        return np.asarray(once(variables, padded))[: len(action)]

    return through


def replay(
    pool: EnvPool, episodes: Sequence[Episode], horizon: int, through: Through | None
) -> None:
    """Plays the expert, its actions passed through ``through`` (if any), filling in the results."""

    def decide(
        playing: Mapping[int, Episode], fresh: Sequence[int], seen: EnvObservation
    ) -> np.ndarray:
        actions = pool.expert_actions(sorted(playing))
        return actions if through is None else through(actions)

    name = "expert" if through is None else "replay"
    for _ in play.play(pool, episodes, horizon, decide, name):
        pass  # the results are in the episodes


def rows(replayed: Sequence[Episode], expert: Sequence[Episode]) -> list[dict[str, Any]]:
    """One row a task, then all together: success with Wilson's 95 % interval, with and without."""
    found = []
    for task in [*dict.fromkeys(episode.job.task for episode in expert), "all"]:
        row: dict[str, Any] = {"task": task}
        for name, episodes in (("replay", replayed), ("expert", expert)):
            chosen = [episode for episode in episodes if task in (episode.job.task, "all")]
            won = sum(episode.success for episode in chosen)
            low, high = wilson(won, len(chosen))
            row |= {"episodes": len(chosen), name: won / len(chosen)}
            row |= {f"{name}_low": low, f"{name}_high": high}
        found.append(row)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text."""
    width = max(len(row["task"]) for row in rows) + 2
    lines = [f"{'task':<{width}}{'replay':>22}{'expert alone':>22}{'episodes':>10}"]
    for row in rows:
        cells = "".join(
            f"{row[n]:>10.0%} ({row[n + '_low']:.0%}-{row[n + '_high']:.0%})".rjust(22)
            for n in ("replay", "expert")
        )
        lines.append(f"{row['task']:<{width}}{cells}{row['episodes']:>10}")
    return "\n".join(lines)


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
) -> list[dict[str, Any]]:
    """Replays a split with and without the tokenizer, writes ``out/replay.csv``, returns its rows.

    Raises:
      UserError: a task or split that does not exist; a tokenizer of chunks, or of other action dimensions.
    """
    if model.config.chunk > 1:
        raise UserError(
            f"expected a tokenizer of single actions, found one of chunks of {model.config.chunk}: the "
            "expert's next actions are not known in closed loop; train one with chunk=1, or play a policy "
            "with python -m mllm_act.evaluate"
        )
    names = ",".join(tasks)
    replayed, expert = (play.episodes(env, names, split, seed) for _ in range(2))
    num_envs = min(num_envs, len(expert))
    with EnvPool(env, num_envs, workers, render=False) as pool:
        if len(pool.spec.action_names) != model.config.action_dim:
            raise UserError(
                f"expected a tokenizer of the {len(pool.spec.action_names)} action dimensions of "
                f"{env}, found one of {model.config.action_dim}; choose its own environment"
            )
        replay(pool, replayed, pool.spec.horizon, through_tokenizer(model, statistics, num_envs))
        replay(pool, expert, pool.spec.horizon, None)
    results = rows(replayed, expert)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        write_csv(Path(scratch) / "replay.csv", results)
        os.replace(Path(scratch) / "replay.csv", out / "replay.csv")
    return results


def main() -> None:
    """Runs the program: the replay success rate of a trained tokenizer."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="workdir of mllm_act.train_tokenizer")
    add("--tasks", help="names or groups, comma-separated (default: those trained on)")
    add("--split", default="test", help="start/goal configurations: train or test (default: test)")
    add("--seed", type=int, default=0, help="of the episodes (default: 0)")
    add("--envs", type=int, default=16, help="simulators stepped together (default: 16)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="default: one a core")
    add("--out", type=Path, help="output folder (default: CHECKPOINT/report)")
    args = parser.parse_args()
    tokenizer = checkpoint.load(args.checkpoint)
    tasks = args.tasks.split(",") if args.tasks else tokenizer.statistics.tasks
    out = args.out or tokenizer.workdir / "report"
    found = measure(
        tokenizer.model,
        tokenizer.statistics,
        tokenizer.metadata["name"],
        tasks,
        out,
        split=args.split,
        seed=args.seed,
        num_envs=args.envs,
        workers=args.workers,
    )
    print(table(found))
    print(f"Replay success on the {args.split} configurations: {out / 'replay.csv'}")


if __name__ == "__main__":
    run(main)
