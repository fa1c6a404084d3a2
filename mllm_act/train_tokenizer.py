"""Learns an action tokenizer from the actions of an RLDS dataset.

    python -m mllm_act.train_tokenizer --config=configs/tokenizer/metaworld.py:rvq --workdir=DIR \
        [--config.a.b=value ...]

Codebooks are trained: run again with the same command, it goes on from the newest checkpoint in ``--workdir``, bit for
bit. FAST is fitted in one go.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float
from ml_collections.config_dict import ConfigDict
from tqdm import tqdm

from data_pipelines.reading import rlds
from data_pipelines.reading.episodes import read_actions
from data_pipelines.reading.statistics import statistics as dataset_statistics
from mllm_act import config as configuration
from mllm_act import parameters, replay
from mllm_act.action_tokenizer import checkpoint, fast, report, training
from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.action_tokenizer.fast import FastConfig, FastTokenizer
from mllm_act.action_tokenizer.kinds import Tokenizer
from mllm_act.checkpoints.checkpoint import Checkpointer, canonical, provenance
from mllm_act.errors import UserError
from mllm_act.normalization import Statistics
from mllm_act.training import optimizer
from mllm_act.training.guards import check_finite, check_same_run
from mllm_act.training.metrics import MetricsWriter

# What must be as in the checkpoint there, and what of it need not; the data is compared by its statistics.
SAME = ("config", "statistics", "tokenizer")
FREE = tuple(
    f"config.{key}"
    for key in ("data.directory", "checkpoint_every", "validation_actions", "replay")
)


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the program."""
    # ---- data ---------------------------------------------------------------------------------
    dataset = rlds.open_dataset(config.data.directory)
    statistics = dataset_statistics(dataset)  # of single actions; chunked where they are used
    chunk = config.tokenizer.chunk
    if chunk < 1:
        raise UserError(f"config.tokenizer.chunk: expected at least 1, found {chunk}")
    actions = read_actions(dataset, "train").chunked(chunk)
    actions = np.asarray(statistics.chunked(chunk).normalize_action(actions))
    held_out = read_actions(dataset, "val").chunked(chunk)

    # ---- tokenizer ----------------------------------------------------------------------------
    model: Tokenizer
    if "vocabulary" in config.tokenizer:
        model = _fit(config, workdir, dataset, statistics, actions)
    else:
        model = _learn(config, workdir, dataset, statistics, actions, held_out)

    # ---- report -------------------------------------------------------------------------------
    if jax.process_index() == 0:
        precision = report.precision(model, statistics, dataset.metadata, held_out)
        report.write_precision(precision, workdir / "report")
        print(report.as_table(precision))
        if chunk > 1:
            print(
                "No replay: it needs chunk 1, as the expert's next actions are not known in closed loop"
            )
        elif config.replay:
            env, tasks = dataset.metadata["name"], statistics.tasks
            rows = replay.measure(model, statistics, env, tasks, workdir / "report")
            print(replay.table(rows))
        print(f"Tables and plots are in {workdir / 'report'}")
        print(f"Next: python -m mllm_act.train --config.tokenizer={workdir} ...")


def _fit(
    config: ConfigDict,
    workdir: Path,
    dataset: rlds.Dataset,
    statistics: Statistics,
    actions: Float[np.ndarray, "n HA"],
) -> FastTokenizer:
    """FAST: one look at the training chunks, no updates; its checkpoint is step 0."""
    model = fast.fit(actions, dataset.action_dim, **config.tokenizer)
    meta = _meta(config, dataset, statistics, model.config)
    with Checkpointer(workdir) as checkpoints:
        if checkpoints.latest_step is None:
            variables = jax.device_put(checkpoint.variables(model), _replicated(_mesh()))
            checkpoints.save(0, {"model": variables}, {**meta, "step": 0})
        else:
            check_same_run(checkpoints.meta(checkpoints.latest_step), meta, SAME, FREE, workdir)
    print(f"Learnt {model.config.merges} merges from {len(actions)} chunks")
    return model


def _learn(
    config: ConfigDict,
    workdir: Path,
    dataset: rlds.Dataset,
    statistics: Statistics,
    actions: Float[np.ndarray, "n HA"],
    held_out: Float[np.ndarray, "m HA"],
) -> ActionTokenizer:
    """The autoencoder with codebooks: updates, with a checkpoint now and then."""
    # ---- model and state ----------------------------------------------------------------------
    batch_size = config.data.batch_size
    steps = config.steps
    if steps is None:
        steps = max(1, round(config.epochs * len(actions) / batch_size))
    _check(config, steps)
    sizes = TokenizerConfig(action_dim=dataset.action_dim, **config.tokenizer)
    model = ActionTokenizer(sizes, rngs=nnx.Rngs(config.seed))
    settings = training.TrainingConfig(batch_size=batch_size, seed=config.seed, **config.quantizer)
    tx, learning_rate = optimizer.build(config.optimizer, steps)
    update = training.make_update(model, tx, settings)
    mesh = _mesh()
    replicated = _replicated(mesh)
    state = jax.device_put(training.initial_state(model, actions, tx, settings), replicated)

    # ---- restore ------------------------------------------------------------------------------
    meta = _meta(config, dataset, statistics, sizes)
    checkpoints = Checkpointer(workdir)
    first = checkpoints.latest_step or 0
    if checkpoints.latest_step is not None:
        check_same_run(checkpoints.meta(first), meta, SAME, FREE, workdir)
        like = {"model": _variables(state, model), "optimizer": parameters.flatten(state.optimizer)}
        saved = checkpoints.restore(first, like)
        nnx.update(model, nnx.State(parameters.unflatten(saved["model"], _tree(model))))
        moments = parameters.unflatten(saved["optimizer"], like=state.optimizer)
        state = jax.device_put(training.state_of(model, moments, first), replicated)
        print(f"Going on from step {first} of {steps} in {workdir}")

    # ---- loop ---------------------------------------------------------------------------------
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    spread = np.linspace(0, len(held_out) - 1, min(config.validation_actions, len(held_out)))
    validation = held_out[spread.astype(int)]
    with checkpoints, MetricsWriter(workdir, first) as writer:
        bar = tqdm(initial=first, total=steps, desc="train tokenizer", unit="update")
        for start in range(first, steps, config.log_every):
            count = min(config.log_every, steps - start)
            index = training.batch_indices(len(actions), batch_size, start, count, config.seed)
            batch = actions[index[:, jax.process_index() :: jax.process_count()]]
            state, metrics = update(state, jax.make_array_from_process_local_data(sharding, batch))
            scalars = jax.device_get(metrics)
            for i in range(count):
                check_finite(start + i + 1, {k: v[i] for k, v in scalars.items()}, checkpoints)
            step = start + count
            bar.update(count)
            bar.set_postfix(reconstruction=f"{scalars['reconstruction'][-1]:.5f}")
            training.store(state, model)
            scores = report.score(model, statistics, dataset.metadata, validation)
            writer.write(
                step,
                {f"train/{name}": float(values.mean()) for name, values in scalars.items()}
                | {"train/learning_rate": float(learning_rate(step - 1))}
                | {f"val/{name}": value for name, value in scores.items()},
            )
            if step % config.checkpoint_every == 0 or step == steps:
                items = {
                    "model": _variables(state, model),
                    "optimizer": parameters.flatten(state.optimizer),
                }
                checkpoints.save(step, items, {**meta, "step": step})
        bar.close()
    print(f"Trained {steps} updates")
    return model


def _meta(
    config: ConfigDict,
    dataset: rlds.Dataset,
    statistics: Statistics,
    sizes: TokenizerConfig | FastConfig,
) -> dict[str, Any]:
    """The JSON of a checkpoint, but for its step."""
    return canonical({
        "tokenizer": dataclasses.asdict(sizes),
        "statistics": statistics.to_dict(),
        "metadata": dict(dataset.metadata),
        "config": configuration.to_json(config),
        "provenance": provenance(),
    })  # fmt: skip


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _variables(state: training.TrainingState, model: ActionTokenizer) -> dict[str, jax.Array]:
    training.store(state, model)
    return checkpoint.variables(model)


def _tree(model: ActionTokenizer) -> Any:
    return nnx.to_pure_dict(nnx.state(model))


def _check(config: ConfigDict, steps: int) -> None:
    if config.checkpoint_every % config.log_every:
        raise UserError(
            f"config.checkpoint_every: expected a multiple of config.log_every "
            f"({config.log_every}), found {config.checkpoint_every}"
        )
    if config.data.batch_size % jax.device_count():
        raise UserError(
            f"config.data.batch_size: expected a multiple of the {jax.device_count()} devices, "
            f"found {config.data.batch_size}"
        )
    if steps < 1:
        raise UserError(f"config.steps: expected at least 1, found {steps}")


if __name__ == "__main__":
    configuration.run_with_config(main, default="configs/tokenizer/metaworld.py:rvq")
