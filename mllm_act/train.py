"""Trains a policy on demonstrations by supervised learning.

    python -m mllm_act.train --config=configs/policy/metaworld.py:rvq --workdir=DIR [--config.a.b=value ...]

The same command continues an interrupted run from the newest checkpoint in ``--workdir``, bit for bit. At SIGINT
(Ctrl-C) and SIGTERM the program finishes its update, saves it, and exits with status 130 or 143.

    python -m mllm_act.train --config=... --workdir=DIR --dry_run --topology=v5p:8x8x8

trains nothing: it compiles the update for devices that are not there, and prints placements, memory, collectives and a
prediction of the time. Topologies: TPU slices (v5e, v5p, v6e; 2*v5e:16x16 for two), or cpu:64 for a cluster of GPUs.
``--profile=STEPS`` writes a trace of that many updates into the folder ``profile``.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from ml_collections.config_dict import ConfigDict
from tqdm import tqdm

from data_pipelines.reading.mixture import MixedBatches
from data_pipelines.reading.pipeline import EvalBatches
from mllm_act import parameters
from mllm_act.batch import Batch
from mllm_act.checkpoints.checkpoint import Checkpointer
from mllm_act.config import run_with_config
from mllm_act.distributed.exchange import group
from mllm_act.envs import ENVS
from mllm_act.training import sharding
from mllm_act.training.dry_run import dry_run
from mllm_act.training.events import Events
from mllm_act.training.guards import check_finite
from mllm_act.training.metrics import MetricsWriter, StepTimer
from mllm_act.training.profile import Profile
from mllm_act.training.setup import Run, set_up, start_or_resume
from mllm_act.training.step import State, average, jit_update, validate
from mllm_act.training.stop import Stop

ToDevice = Callable[[str, Mapping[str, Any]], Batch]


def main(config: ConfigDict, workdir: Path, profile: int = 0) -> None:
    """Runs the program; ``profile`` updates are traced."""
    # ---- setup --------------------------------------------------------------------------------------------------
    events = Events(workdir)
    run = set_up(config)
    (train_batches, held_out), checkpoints = _batches(run, config), Checkpointer(workdir)
    events.since_start("init")
    resumed, state, frozen, meta = start_or_resume(run, config, checkpoints, train_batches, workdir)
    events.since_start("restore", step=resumed or 0)

    # ---- step ---------------------------------------------------------------------------------------------------
    program = jit_update(run.recipe, run.state)
    compiled_validate = jax.jit(functools.partial(validate, run.recipe), static_argnums=2)

    def to_device(name: str, arrays: Mapping[str, Any]) -> Batch:
        return sharding.place_batch(run.embodiments[name].to_batch(arrays), run.mesh)

    def save(step: int) -> None:
        items = {item: parameters.flatten(tree) for item, tree in state.items()}
        with events.timed("save", step=step):
            checkpoints.save(step, items, {**meta, "step": step, "iterator": train_batches.state()})

    # ---- loop ---------------------------------------------------------------------------------------------------
    step = first = resumed or 0
    with (
        Stop(config.stall_minutes) as stop,
        checkpoints,
        MetricsWriter(workdir, first, config.wandb) as writer,
        _progress(run, first) as bar,
    ):

        def score(step: int) -> None:
            with events.timed("evaluate", step=step):
                scores = _validate(run, compiled_validate, state, frozen, held_out, to_device, stop)
            if scores is not None:
                writer.write(step, _named("val", scores))
                shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                bar.write(f"step {step}: {shown}")

        def due(every: int) -> bool:
            return step > 0 and (step % every == 0 or step == run.steps)

        if due(config.validate_every) and not writer.has(step, "val/"):
            score(step)  # the run was stopped while it validated
        if run.steps == 0 and resumed is None:  # the untrained policy, to compare with
            save(0)
        timer = StepTimer(first, run.operations / run.mesh.size)
        trace = Profile(workdir / "profile", first, run.steps, profile)
        previous: tuple[int, dict[str, jax.Array]] | None = None
        for step in range(first + 1, run.steps + 1):
            with timer.waiting():
                batches = {name: to_device(name, x) for name, x in next(train_batches).items()}
            if step == first + 1:
                with timer.compiling(), events.timed("compile", step=step):
                    program = program.lower(state, frozen, batches, jnp.int32(step)).compile()
            trace.before(step)
            state, metrics = program(state, frozen, batches, jnp.int32(step))
            trace.after(step, metrics)
            stop.defer()
            events.updated(step)
            bar.update()
            # The metrics of the step before, so that the device always has work queued.
            if previous is not None:
                check_finite(previous[0], jax.device_get(previous[1]), checkpoints)
            previous = (step, metrics)

            if due(config.log_every):
                scalars = jax.device_get(metrics)
                check_finite(step, scalars, checkpoints)
                actions = float(scalars.pop("supervised_steps"))
                times = timer.lap(step, config.data.batch_size, actions)
                events.steps(step, times)
                scalars["learning_rate"] = run.learning_rate(step - 1)
                writer.write(step, _named("train", scalars) | _named("time", times))
                wait = times["data_wait_ms"] / times["step_ms"]
                bar.set_postfix(loss=f"{scalars['loss']:.3f}", wait=f"{wait:.0%}")
            if due(config.validate_every):
                score(step)
            stopping = stop.requested()
            if due(config.checkpoint_every) or stopping:
                check_finite(step, jax.device_get(metrics), checkpoints)
                save(step)
            if stopping:
                break
            if due(config.validate_every) or due(config.checkpoint_every):
                timer.restart(step)
    events.write("preempt" if stop.stopped else "end", step=step)
    stop.end_if_requested(step, run.steps, workdir)
    _print_next(run, workdir)


def _named(group: str, scalars: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}/{name}": value for name, value in scalars.items()}


def _batches(run: Run, config: ConfigDict) -> tuple[MixedBatches, dict[str, EvalBatches]]:
    train = {
        name: robot.train_batches(config.seed, config.data.shuffle_megabytes)
        for name, robot in run.embodiments.items()
    }
    held_out = {
        name: robot.validation_batches(config.validation_windows)
        for name, robot in run.embodiments.items()
    }
    return MixedBatches(train), held_out


def _print_next(run: Run, workdir: Path) -> None:
    print(f"Trained {run.steps} steps. Checkpoint, metrics.jsonl and tensorboard/ are in {workdir}")
    for env, robot in run.embodiments.items():
        where = f"--env={env} --split=test"
        if env not in ENVS:
            where = f"--data={robot.source.config.data.directory} --split=val"
            where += f" --embodiment={env}" if len(run.embodiments) > 1 else ""
        print(f"Next: python -m mllm_act.evaluate --checkpoint={workdir} {where}")


def _progress(run: Run, first: int) -> tqdm:
    adapters = ", ".join(robot.config.adapter for robot in run.embodiments.values())
    return tqdm(
        initial=first,
        total=run.steps,
        desc=f"train {adapters}",
        unit="step",
        disable=not group.first,
    )


def _validate(
    run: Run,
    compiled_validate: Callable[..., Any],
    state: State,
    frozen: nnx.State,
    held_out: Mapping[str, EvalBatches],
    to_device: ToDevice,
    stop: Stop,
) -> dict[str, float] | None:
    """Returns the scores of every embodiment on its held-out windows, or None if the program is to stop."""
    scores: dict[str, float] = {}
    averaged = state.get("ema", state["trained"])
    for name, batches in held_out.items():
        results = []
        for arrays in batches:
            if stop.requested():
                return None
            batch = to_device(name, arrays)
            results.append(jax.device_get(compiled_validate(averaged, frozen, name, batch)))
        scores |= {run.recipe.scalar(name, key): x for key, x in average(results).items()}
    return scores


def program(config: ConfigDict, workdir: Path) -> None:
    """Trains, or compiles only, as the command line says."""
    if DRY_RUN.value:
        dry_run(config, TOPOLOGY.value)
    else:
        main(config, workdir, PROFILE.value)


if __name__ == "__main__":
    DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile only.")
    TOPOLOGY = flags.DEFINE_string("topology", "v5p:8x8x8", "What --dry_run compiles for.")
    PROFILE = flags.DEFINE_integer("profile", 0, "How many updates to trace.", lower_bound=0)
    run_with_config(program, default="configs/policy/metaworld.py:rvq")
