"""Trains an action tokenizer on the actions of an RLDS dataset.

    python -m mllm_act.train_tokenizer --config=configs/tokenizer/metaworld.py:rvq --workdir=DIR \
        [--config.a.b=value ...]

Codebooks (``rvq``, ``vq``) are trained; the same command continues an interrupted run from the newest checkpoint in
``--workdir``, bit for bit. ``fast`` is fitted in one pass.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float
from ml_collections.config_dict import ConfigDict
from tqdm import tqdm

from data_pipelines.reading import rlds
from data_pipelines.reading.episodes import read_actions
from data_pipelines.reading.statistics import dataset_statistics
from mllm_act import normalization, parameters, replay
from mllm_act.action_tokenizer import Tokenizer, fast, report, training
from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.action_tokenizer.checkpoint import tokenizer_arrays
from mllm_act.action_tokenizer.fast import FastConfig, FastTokenizer
from mllm_act.action_tokenizer.training import TrainingState
from mllm_act.checkpoints.checkpoint import Checkpointer, canonical, provenance
from mllm_act.config import run_with_config, to_json
from mllm_act.distributed.exchange import group
from mllm_act.envs import ENVS
from mllm_act.envs.results import table
from mllm_act.errors import UserError, signals
from mllm_act.normalization import NORMALIZATIONS, Statistics
from mllm_act.ranges import COUNT, RANGES, Choice, check_ranges
from mllm_act.training import optimizer
from mllm_act.training.guards import check_finite, check_same_run
from mllm_act.training.metrics import MetricsWriter
from mllm_act.training.processes import processes
from mllm_act.training.stop import Stop

# What a resumed run compares with its checkpoint, and the settings that may differ. Statistics stand for the data.
COMPARED = ("config", "statistics", "tokenizer")
MAY_DIFFER = tuple(
    f"config.{key}"
    for key in ("data.directory", "checkpoint_every", "validation_actions", "replay")
)


@dataclasses.dataclass(frozen=True)
class Data:
    """The dataset and its actions, in chunks of H.

    Attributes:
      dataset: the dataset.
      statistics: of single actions.
      train: chunks of the training split, float32, normalised.
      held_out: chunks of the validation split, float32, in the environment's own numbers.
    """

    dataset: rlds.Dataset
    statistics: Statistics
    train: Float[np.ndarray, "n HA"]
    held_out: Float[np.ndarray, "m HA"]


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the program."""
    _check(config)
    data = _read(config)
    tokenizer: Tokenizer
    if "vocabulary" in config.tokenizer:
        tokenizer = _fit_fast(config, workdir, data)
    else:
        tokenizer = _train_autoencoder(config, workdir, data)
    if group.first:
        signals.kept = ": the tokenizer is saved, but not its report; run the same command again"
        _report(config, workdir, data, tokenizer)


def _read(config: ConfigDict) -> Data:
    dataset = rlds.open_dataset(config.data.directory, config.data.mapping)
    statistics = dataclasses.replace(
        dataset_statistics(dataset, processes=processes()), normalization=config.normalization
    )
    metadata = dataset.metadata
    print(normalization.table("config", metadata["name"], metadata["action_names"], statistics))
    chunk = config.tokenizer.chunk
    actions = read_actions(dataset, "train").chunked(chunk)
    train = np.asarray(statistics.chunked(chunk).normalize_for_codes(actions))
    return Data(dataset, statistics, train, read_actions(dataset, "val").chunked(chunk))


def _fit_fast(config: ConfigDict, workdir: Path, data: Data) -> FastTokenizer:
    """Fits FAST to the training chunks. It makes no updates, so its checkpoint is step 0."""
    tokenizer = fast.fit(data.train, data.dataset.action_dim, **config.tokenizer)
    meta = _meta(config, data, tokenizer.config)
    with Checkpointer(workdir) as checkpoints:
        if checkpoints.latest_step is None:
            arrays = jax.device_put(tokenizer_arrays(tokenizer), _replicated(_mesh()))
            checkpoints.save(0, {"model": arrays}, {**meta, "step": 0})
        else:
            saved = checkpoints.meta(checkpoints.latest_step)
            check_same_run(saved, meta, COMPARED, MAY_DIFFER, workdir)
    print(f"Learnt {tokenizer.config.merges} merges from {len(data.train)} chunks")
    return tokenizer


def _train_autoencoder(config: ConfigDict, workdir: Path, data: Data) -> ActionTokenizer:
    """Trains the autoencoder with codebooks."""
    # ---- setup --------------------------------------------------------------------------------------------------
    batch_size = config.data.batch_size
    steps = config.steps
    if steps is None:
        steps = max(1, round(config.epochs * len(data.train) / batch_size))
    sizes = TokenizerConfig(action_dim=data.dataset.action_dim, **config.tokenizer)
    model = ActionTokenizer(sizes, rngs=nnx.Rngs(config.seed))
    settings = training.TrainingConfig(batch_size=batch_size, seed=config.seed, **config.quantizer)
    tx, learning_rate = optimizer.build(config.optimizer, steps)
    meta = _meta(config, data, sizes)
    checkpoints = Checkpointer(workdir)
    state = _start_or_resume(model, tx, settings, data, checkpoints, meta, workdir)
    first = int(state.step)
    if first:
        print(f"Resuming at step {first} of {steps} from {workdir}")

    # ---- step ---------------------------------------------------------------------------------------------------
    update = training.make_update(model, tx, settings)
    sharding = NamedSharding(_mesh(), PartitionSpec(None, "data"))
    spread = np.linspace(
        0, len(data.held_out) - 1, min(config.validation_actions, len(data.held_out))
    )
    validation = data.held_out[spread.astype(int)]

    def batches(start: int, count: int) -> jax.Array:
        index = training.batch_indices(len(data.train), batch_size, start, count, config.seed)
        local = data.train[index[:, jax.process_index() :: jax.process_count()]]
        return jax.make_array_from_process_local_data(sharding, local)

    # ---- loop ---------------------------------------------------------------------------------------------------
    step = first
    with Stop() as stop, checkpoints, MetricsWriter(workdir, first) as writer:
        bar = tqdm(initial=first, total=steps, desc="train tokenizer", unit="update")
        for start in range(first, steps, config.log_every):
            count = min(config.log_every, steps - start)
            state, metrics = update(state, batches(start, count))
            stop.defer()
            scalars = jax.device_get(metrics)
            for i in range(count):
                check_finite(start + i + 1, {k: v[i] for k, v in scalars.items()}, checkpoints)
            step = start + count
            bar.update(count)
            bar.set_postfix(reconstruction=f"{scalars['reconstruction'][-1]:.5f}")
            training.store(state, model)
            scores = report.score(model, data.statistics, data.dataset.metadata, validation)
            writer.write(step, {
                **{f"train/{name}": float(values.mean()) for name, values in scalars.items()},
                "train/learning_rate": float(learning_rate(step - 1)),
                **{f"val/{name}": value for name, value in scores.items()},
            })  # fmt: skip
            stopping = stop.requested()
            if step % config.checkpoint_every == 0 or step == steps or stopping:
                checkpoints.save(step, _items(state, model), {**meta, "step": step})
            if stopping:
                break
        bar.close()
    stop.end_if_requested(step, steps, workdir)
    print(f"Trained {steps} updates")
    return model


def _start_or_resume(
    model: ActionTokenizer,
    tx: optax.GradientTransformation,
    settings: training.TrainingConfig,
    data: Data,
    checkpoints: Checkpointer,
    meta: dict[str, Any],
    workdir: Path,
) -> TrainingState:
    """Returns the initial state, or that of the newest checkpoint.

    Raises:
      UserError: if the checkpoint was made with other settings.
    """
    replicated = _replicated(_mesh())
    state = jax.device_put(training.initial_state(model, data.train, tx, settings), replicated)
    step = checkpoints.latest_step
    if step is None:
        return state
    check_same_run(checkpoints.meta(step), meta, COMPARED, MAY_DIFFER, workdir)
    saved = checkpoints.restore(step, _items(state, model))
    like = nnx.to_pure_dict(nnx.state(model))
    nnx.update(model, nnx.State(parameters.unflatten(saved["model"], like)))
    moments = parameters.unflatten(saved["optimizer"], like=state.optimizer)
    return jax.device_put(training.training_state(model, moments, step), replicated)


def _items(state: TrainingState, model: ActionTokenizer) -> dict[str, dict[str, jax.Array]]:
    """Returns the items of a checkpoint; the module takes over the state's arrays."""
    training.store(state, model)
    return {"model": tokenizer_arrays(model), "optimizer": parameters.flatten(state.optimizer)}


def _report(config: ConfigDict, workdir: Path, data: Data, tokenizer: Tokenizer) -> None:
    """Writes and prints the precision on the validation split, and the success rate of replay."""
    metadata, out = data.dataset.metadata, workdir / "report"
    precision = report.measure_precision(tokenizer, data.statistics, metadata, data.held_out)
    report.write_precision(precision, out)
    print(report.as_table(precision))
    if config.tokenizer.chunk > 1:
        print("No replay: it needs chunk=1, because future actions are unknown in closed loop")
    elif config.replay and metadata["name"] not in ENVS:
        print(f"No replay: there is no simulator of {metadata['name']}")
    elif config.replay:
        results = replay.measure(
            tokenizer, data.statistics, metadata["name"], data.statistics.tasks, out
        )
        print(table(results))
    print(f"Tables and plots are in {out}")
    data_flags = "".join(
        f" --config.data.{key}={config.data[key]}"
        for key in ("directory", "mapping")
        if config.data[key]
    )
    file = metadata["name"] if metadata["name"] in ENVS else "robot"
    kind = tokenizer.config.kind
    print(
        f"Next: python -m mllm_act.train --config=configs/policy/{file}.py:{kind} --workdir=RUN "
        f"--config.tokenizer={workdir}{data_flags}"
    )


def _meta(config: ConfigDict, data: Data, sizes: TokenizerConfig | FastConfig) -> dict[str, Any]:
    """Returns the JSON document of the checkpoints, except for the step."""
    return canonical({
        "tokenizer": dataclasses.asdict(sizes),
        "statistics": data.statistics.to_dict(),
        "metadata": dict(data.dataset.metadata),
        "config": to_json(config),
        "provenance": provenance(),
    })  # fmt: skip


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _check(config: ConfigDict) -> None:
    """Raises UserError for numbers that are out of range or do not fit each other."""
    check_ranges(config, {**RANGES, "steps": COUNT, "normalization": Choice(NORMALIZATIONS)})
    if "vocabulary" in config.tokenizer:
        return
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


if __name__ == "__main__":
    run_with_config(main, default="configs/tokenizer/metaworld.py:rvq")
