"""How precise a tokenizer is: errors in physical units, and what they cost in the simulator.

``mllm_act.train_tokenizer`` leaves both at its end. Replay of other tasks or configurations:

    python -m mllm_act.tokenizer.report --checkpoint=runs/metaworld/tokenizer_rvq --split=test

*Replay*: the scripted expert acts in closed loop on unseen start/goal configurations, with every
action passed through encode and decode before it is executed. Its success rate, beside the
expert's own, is the upper bound of any policy on that tokenizer.
"""

import csv
import dataclasses
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jaxtyping import Float, Int
from tqdm import tqdm

from mllm_act import envs
from mllm_act.envs.base import Job
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError, nearest, run
from mllm_act.intervals import wilson
from mllm_act.normalization import Statistics
from mllm_act.tokenizer import checkpoint, training
from mllm_act.tokenizer.autoencoder import ActionTokenizer
from mllm_act.tokenizer.quantizer import usage

Through = Callable[[Float[np.ndarray, "n A"]], Float[np.ndarray, "n A"]]


@dataclasses.dataclass(frozen=True)
class Precision:
    """Reconstruction of n actions. ``rows`` and ``codebooks`` are what the tables show."""

    mse: float  # of normalised actions, over all dimensions
    variance: float  # of the normalised actions: the error of always answering their mean
    rows: list[dict[str, Any]]  # a dimension: name, unit, rmse, mean_abs, p95, max (physical units)
    codebooks: list[dict[str, float]]  # a codebook: use (fraction of its codes), perplexity
    action: Float[np.ndarray, "n A"]  # physical units
    decoded: Float[np.ndarray, "n A"]  # physical units, clipped to the legal box as when acting
    codes: Int[np.ndarray, "n Q"]
    num_codes: int


def precision(
    model: ActionTokenizer,
    statistics: Statistics,
    metadata: Mapping[str, Any],
    actions: Float[np.ndarray, "n A"],
) -> Precision:
    """Passes actions (the environment's own numbers) through the tokenizer.

    ``metadata`` is the dataset's: action_names, action_units, action_scale, action_low and _high.
    """
    normalized = np.asarray(statistics.normalize_action(actions), np.float32)
    restored, codes = training.reconstruct(model, normalized)
    scale = np.array(metadata["action_scale"], np.float32)
    decoded = np.asarray(statistics.unnormalize_action(restored))
    decoded = np.clip(decoded, metadata["action_low"], metadata["action_high"]) * scale
    error = np.abs(decoded - actions * scale)
    rows = [
        {
            "name": name,
            "unit": unit,
            "rmse": float(np.sqrt(np.mean(e**2))),
            "mean_abs": float(e.mean()),
            "p95": float(np.quantile(e, 0.95)),
            "max": float(e.max()),
        }
        for name, unit, e in zip(
            metadata["action_names"], metadata["action_units"], error.T, strict=True
        )
    ]
    use, perplexity = jax.device_get(usage(jnp.asarray(codes), model.config.codes))
    return Precision(
        mse=float(np.mean((restored - normalized) ** 2)),
        variance=float(np.mean(normalized.var(axis=0))),
        rows=rows,
        codebooks=[
            {"use": float(u), "perplexity": float(p)} for u, p in zip(use, perplexity, strict=True)
        ],
        action=actions * scale,
        decoded=decoded,
        codes=codes,
        num_codes=model.config.codes,
    )


def score(
    model: ActionTokenizer,
    statistics: Statistics,
    metadata: Mapping[str, Any],
    actions: Float[np.ndarray, "n A"],
) -> dict[str, float]:
    """The scalars of ``precision``, named for a log: ``mse``, ``rmse_dx_m``, ``use_0``, ..."""
    found = precision(model, statistics, metadata, actions)
    scalars = {"mse": found.mse}
    scalars |= {f"rmse_{row['name']}_{row['unit']}": row["rmse"] for row in found.rows}
    for q, book in enumerate(found.codebooks):
        scalars |= {f"{name}_{q}": value for name, value in book.items()}
    return scalars


def as_table(found: Precision) -> str:
    """The table as text."""
    lines = [f"{'action':<12}{'unit':<8}{'rmse':>10}{'mean abs':>10}{'p95':>10}{'max':>10}"]
    for row in found.rows:
        numbers = "".join(f"{row[key]:>10.2g}" for key in ("rmse", "mean_abs", "p95", "max"))
        lines.append(f"{row['name']:<12}{row['unit']:<8}{numbers}")
    lines.append(f"MSE {found.mse:.2g} of normalised actions (variance {found.variance:.2g}); ")
    lines[-1] += "; ".join(
        f"codebook {q}: {book['use']:.0%} of the codes used, perplexity {book['perplexity']:.0f}"
        for q, book in enumerate(found.codebooks)
    )
    return "\n".join(lines)


def write_precision(found: Precision, out: Path) -> None:
    """Writes precision.csv, precision.json and precision.png; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        partial = Path(scratch)
        _write_csv(partial / "precision.csv", found.rows)
        summary = {
            "mse": found.mse,
            "variance": found.variance,
            "actions": len(found.action),
            "dimensions": found.rows,
            "codebooks": found.codebooks,
        }
        (partial / "precision.json").write_text(json.dumps(summary, indent=1))
        _plot(found, partial / "precision.png")
        for file in partial.iterdir():
            os.replace(file, out / file.name)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _plot(found: Precision, path: Path) -> None:
    """Per dimension: decoded against original, and the errors; below, how often each code is used."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dims, books = len(found.rows), found.codes.shape[-1]
    columns = max(dims, books)
    figure, axes = plt.subplots(3, columns, figsize=(3.2 * columns, 8.4), squeeze=False)
    shown = np.random.default_rng(0).permutation(len(found.action))[:4000]
    for d, row in enumerate(found.rows):
        x, y = found.action[:, d], found.decoded[:, d]
        label = f"{row['name']} ({row['unit']})"
        axes[0, d].plot([x.min(), x.max()], [x.min(), x.max()], color="0.7", lw=1)
        axes[0, d].scatter(x[shown], y[shown], s=3, alpha=0.3, lw=0, color="tab:blue")
        axes[0, d].set(title=label, xlabel="expert's action", ylabel="decoded" if d == 0 else "")
        axes[1, d].hist(y - x, bins=101, color="tab:blue")
        axes[1, d].axvline(row["p95"], color="tab:orange", lw=1, label="95 % within")
        axes[1, d].axvline(-row["p95"], color="tab:orange", lw=1)
        axes[1, d].set(yscale="log", xlabel="error", ylabel="actions" if d == 0 else "")
        axes[1, d].set_title(f"RMSE {row['rmse']:.2g} {row['unit']}", fontsize=10)
        axes[1, d].ticklabel_format(axis="x", scilimits=(-3, 3))
    axes[1, 0].legend(fontsize=8)
    for q, book in enumerate(found.codebooks):
        counts = np.sort(np.bincount(found.codes[:, q], minlength=found.num_codes))[::-1]
        axes[2, q].bar(
            np.arange(found.num_codes), counts / counts.sum(), width=1, color="tab:green"
        )
        title = f"codebook {q + 1}: {book['use']:.0%} used, perplexity {book['perplexity']:.0f}"
        axes[2, q].set_title(title, fontsize=10)
        axes[2, q].set(xlabel="codes, by use", ylabel="share of actions" if q == 0 else "")
        axes[2, q].set_yscale("log")
    for row_axes, used in zip(axes, (dims, dims, books), strict=True):
        for axis in row_axes[used:]:
            axis.axis("off")
    figure.suptitle(
        f"Action tokenizer, {books} x {found.num_codes} codes: MSE {found.mse:.2g} of normalised "
        f"actions (variance {found.variance:.2g}) over {len(found.action)} unseen actions",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def through_tokenizer(model: ActionTokenizer, statistics: Statistics, batch: int) -> Through:
    """Encode then decode for up to ``batch`` actions (the environment's own numbers) at a time."""
    graph, variables = nnx.split(model)

    @jax.jit
    def once(variables: nnx.State, action: jax.Array) -> jax.Array:
        network = nnx.merge(graph, variables)
        normalized = statistics.normalize_action(action)
        return statistics.unnormalize_action(network.decode(network.encode(normalized)))

    def through(action: np.ndarray) -> np.ndarray:
        padded = np.zeros((batch, action.shape[-1]), np.float32)
        padded[: len(action)] = action
        return np.asarray(once(variables, padded))[: len(action)]

    return through


def replay(pool: EnvPool, jobs: Sequence[Job], horizon: int, through: Through | None) -> list[bool]:
    """Whether the expert succeeds in each job, its actions passed through ``through`` (if any).

    An episode ends at its first success or at the horizon; a free simulator takes the next job.
    """
    success = [False] * len(jobs)
    waiting = deque(enumerate(jobs))
    playing: dict[int, tuple[int, int]] = {}  # slot -> (which job, steps made)
    name = "expert" if through is None else "replay"
    with tqdm(total=len(jobs), desc=name, unit="episode") as bar:
        while waiting or playing:
            free = [slot for slot in range(pool.num_envs) if slot not in playing][: len(waiting)]
            if free:
                started = [waiting.popleft() for _ in free]
                pool.reset(free, [job for _, job in started])
                playing |= {s: (number, 0) for s, (number, _) in zip(free, started, strict=True)}
            slots = sorted(playing)
            actions = pool.expert_actions(slots)
            _, _, done = pool.step(actions if through is None else through(actions), slots)
            for slot, succeeded in zip(slots, done, strict=True):
                number, steps = playing[slot]
                playing[slot] = (number, steps + 1)
                if succeeded or steps + 1 == horizon:
                    success[number] = bool(succeeded)
                    del playing[slot]
                    bar.update()
    return success


def replay_rows(
    jobs: Sequence[Job], replayed: Sequence[bool], expert: Sequence[bool]
) -> list[dict[str, Any]]:
    """One row a task, then all together: success with Wilson's 95 % interval, with and without."""
    rows = []
    for task in [*dict.fromkeys(job.task for job in jobs), "all"]:
        chosen = [i for i, job in enumerate(jobs) if task in (job.task, "all")]
        row: dict[str, Any] = {"task": task, "episodes": len(chosen)}
        for name, results in (("replay", replayed), ("expert", expert)):
            won = sum(results[i] for i in chosen)
            low, high = wilson(won, len(chosen))
            row |= {name: won / len(chosen), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def replay_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of ``replay_rows`` as text."""
    width = max(len(row["task"]) for row in rows) + 2
    lines = [f"{'task':<{width}}{'replay':>22}{'expert alone':>22}{'episodes':>10}"]
    for row in rows:
        cells = "".join(
            f"{row[n]:>10.0%} ({row[n + '_low']:.0%}-{row[n + '_high']:.0%})".rjust(22)
            for n in ("replay", "expert")
        )
        lines.append(f"{row['task']:<{width}}{cells}{row['episodes']:>10}")
    return "\n".join(lines)


def jobs(env: str, tasks: Sequence[str], split: str, seed: int) -> list[Job]:
    """One episode for each start/goal configuration of a split, task by task.

    Raises:
      UserError: a task or split that does not exist.
    """
    if split not in envs.SPLITS:
        raise UserError(f"--split={split}: no such split; {nearest(split, envs.SPLITS)}")
    names = envs.select_tasks(env, ",".join(tasks))
    return [Job(task, c, seed) for task in names for c in envs.SPLITS[split]]


def measure_replay(
    model: ActionTokenizer,
    statistics: Statistics,
    env: str,
    jobs: Sequence[Job],
    out: Path,
    num_envs: int = 16,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """Replays the jobs with and without the tokenizer, writes ``out/replay.csv``, returns its rows."""
    workers = workers or os.cpu_count() or 1
    with EnvPool(env, min(num_envs, len(jobs)), workers, render=False) as pool:
        if len(pool.spec.action_names) != model.config.action_dim:
            raise UserError(
                f"expected a tokenizer of the {len(pool.spec.action_names)} action dimensions of "
                f"{env}, found one of {model.config.action_dim}; choose its own environment"
            )
        through = through_tokenizer(model, statistics, pool.num_envs)
        replayed = replay(pool, jobs, pool.spec.horizon, through)
        rows = replay_rows(jobs, replayed, replay(pool, jobs, pool.spec.horizon, None))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        _write_csv(Path(scratch) / "replay.csv", rows)
        os.replace(Path(scratch) / "replay.csv", out / "replay.csv")
    return rows


def main(_: list[str]) -> None:
    """Runs the program: the replay success rate of a trained tokenizer."""
    args = flags.FLAGS
    tokenizer = checkpoint.load(Path(args.checkpoint))
    tasks = args.tasks.split(",") if args.tasks else tokenizer.statistics.tasks
    chosen = jobs(args.env, tasks, args.split, args.seed)
    out = Path(args.out) if args.out else tokenizer.workdir / "report"
    rows = measure_replay(
        tokenizer.model, tokenizer.statistics, args.env, chosen, out, args.envs, args.workers
    )
    print(replay_table(rows))
    print(f"Replay success on the {args.split} configurations: {out / 'replay.csv'}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Workdir of mllm_act.train_tokenizer.", required=True)
    flags.DEFINE_string("env", "metaworld", "The environment.")
    flags.DEFINE_string("tasks", None, "Names or groups; by default those trained on.")
    flags.DEFINE_string("split", "test", "Which start/goal configurations: train or test.")
    flags.DEFINE_integer("seed", 0, "Seed of the episodes.")
    flags.DEFINE_integer("envs", 16, "Simulators stepped together.")
    flags.DEFINE_integer("workers", os.cpu_count() or 1, "Worker processes they are spread over.")
    flags.DEFINE_string("out", None, "Output folder; by default CHECKPOINT/report.")
    run(lambda: app.run(main))
