"""Trains a policy by reinforcement learning: PPO in an environment's simulators.

    python -m mllm_act.train_ppo --config=configs/rl/language_rearrangement.py:semlang --workdir=DIR \
        [--config.init=RUN] [--config.a.b=value ...]

``config.steps`` counts updates; each is one rollout and what is learned from it. The same command continues an
interrupted run from its newest checkpoint, bit for bit. ``--config.init`` starts from another run's policy instead of
from scratch. At SIGINT (Ctrl-C) and SIGTERM the program finishes its update, saves it, and exits with status 130 or
143. ``--config.evaluate.every`` evaluates it while it trains; ``mllm_act.evaluate`` evaluates the result.
"""

import os
import time
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict
from tqdm import tqdm

from mllm_act import parameters
from mllm_act.checkpoints.checkpoint import Checkpointer
from mllm_act.config import run_with_config
from mllm_act.envs.episodes import Simulators
from mllm_act.rl.evaluation import PREFIX, Evaluation, compare
from mllm_act.rl.returns import ReturnScale
from mllm_act.rl.rollout import Rollout
from mllm_act.rl.setup import Run, empty_action, set_up, start_or_resume
from mllm_act.rl.update import Learner, State
from mllm_act.training.guards import check_finite
from mllm_act.training.metrics import MetricsWriter
from mllm_act.training.stop import Stop


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the program."""
    # ---- setup --------------------------------------------------------------------------------------------------
    run = set_up(config)
    checkpoints = Checkpointer(workdir)
    workers = config.rollout.workers or os.cpu_count() or 1
    horizon = config.env.horizon or run.spec.horizon
    evaluation = Evaluation(config, run.episodes, workdir, workers, horizon)
    first, saved, state, frozen, meta = start_or_resume(run, config, checkpoints, workdir)
    count, steps = config.rollout.simulators, config.rollout.steps
    returns = None
    if config.ppo.running_scale:
        returns = ReturnScale(count, config.ppo.discount, saved.get("returns"))
    learner = Learner(
        run.recipe, run.state, config.seed, run.context, count * steps, run.prompt.length,
        empty_action(run), returns,
    )  # fmt: skip
    simulators = Simulators(run.spec.name, count, workers, horizon, config.rollout.timeout)
    rollout = Rollout(
        run.recipe, simulators, run.episodes, run.prompt, sorted(run.spec.cameras),
        run.spec.time_limit == "bootstrap", run.adapter.discrete, run.context, steps, count,
    )  # fmt: skip

    def save(step: int, state: State) -> None:
        items = {item: parameters.flatten(tree) for item, tree in state.items()}
        progress = {"simulators": rollout.state(), "returns": returns and returns.state()}
        checkpoints.save(step, items, {**meta, "step": step, **progress})

    # ---- loop ---------------------------------------------------------------------------------------------------
    step = first
    with (
        simulators,
        Stop(config.stall_minutes) as stop,
        checkpoints,
        MetricsWriter(workdir, first, config.wandb) as writer,
        _progress(run, config, first) as bar,
    ):

        def evaluate(step: int) -> None:
            checkpoints.wait()
            if (found := evaluation.run(step, stop)) is not None:
                writer.write(step, found)

        rollout.start(saved.get("simulators"))
        every = config.evaluate.every

        def due(step: int) -> bool:
            return every > 0 and (step % every == 0 or step == config.steps)

        if not saved and (config.steps == 0 or every):  # the untrained policy, to compare with
            save(0, state)
        if due(first) and not writer.has(first, PREFIX):
            evaluate(first)
        for step in range(first + 1, config.steps + 1):
            begun = time.perf_counter()
            segments, grid, report = rollout.collect(state["trained"], frozen, step)
            played = time.perf_counter()
            state, metrics = learner.update(state, frozen, segments, grid, step)
            seconds = played - begun, time.perf_counter() - played
            stop.defer()
            if metrics["steps"]:
                check_finite(step, metrics, checkpoints)
            found = report.metrics(count * steps)
            if step % config.log_every == 0 or step == config.steps:
                writer.write(step, {
                    **{f"rollout/{name}": value for name, value in found.items()},
                    **{f"train/{name}": value for name, value in metrics.items()},
                    "time/rollout_s": seconds[0], "time/update_s": seconds[1],
                    "time/steps_per_second": count * steps / sum(seconds), "steps": step * count * steps,
                })  # fmt: skip
            bar.update()
            bar.set_postfix(success=f"{found['success']:.0%}", length=f"{found['length']:.1f}")
            stopping = stop.requested()
            end = step == config.steps
            if step % config.checkpoint_every == 0 or end or stopping or due(step):
                save(step, state)
            if stopping:
                break
            if due(step):
                evaluate(step)
    stop.end_if_requested(step, config.steps, workdir)
    print(
        f"Made {config.steps} updates. Checkpoint, metrics.jsonl and tensorboard/ are in {workdir}"
    )
    if success := compare(workdir / "metrics.jsonl"):
        print(f"\n{success}\n")
    print(
        f"Next: python -m mllm_act.evaluate --checkpoint={workdir} --env={run.spec.name} --split=test"
    )


def _progress(run: Run, config: ConfigDict, first: int) -> Any:
    adapter = run.network_config.embodiments[run.spec.name].adapter
    return tqdm(initial=first, total=config.steps, desc=f"ppo {adapter}", unit="update")


if __name__ == "__main__":
    run_with_config(main, default="configs/rl/language_rearrangement.py:semlang")
