"""Trains a policy on demonstrations by supervised learning.

    python -m mllm_act.train --config=configs/policy/metaworld.py:rvq --workdir=DIR [--config.a.b=value ...]

Run again with the same command, it goes on from the newest checkpoint in ``--workdir``, bit for bit.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections.config_dict import ConfigDict
from tqdm import tqdm

from data_pipelines import pipeline, rlds
from data_pipelines.statistics import statistics as dataset_statistics
from mllm_act import batch as batch_format
from mllm_act import config as configuration
from mllm_act import network as networks
from mllm_act import prompt as prompts
from mllm_act.batch import Batch, Observation
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.models.layers import unstack
from mllm_act.tokenizer import checkpoint as tokenizer_checkpoint
from mllm_act.training import frozen as frozen_arrays
from mllm_act.training import initialize, memory, optimizer, rules, sharding
from mllm_act.training.checkpoint import Checkpointer, canonical, provenance
from mllm_act.training.guards import check_finite, check_float32, check_same_run
from mllm_act.training.metrics import MetricsWriter
from mllm_act.weights import folder as pretrained_folder

# What a resumed run may be given otherwise. The data's bytes are compared by the iterator, the tokenizer by what it
# makes of the network and of the statistics; on another mesh, and with another remat, sums are rounded otherwise.
FREE = (
    "config.data.directory",
    "config.tokenizer",
    "config.pretrained",
    "config.log_every",
    "config.validate_every",
    "config.validation_windows",
    "config.checkpoint_every",
    "config.mesh",
    "config.remat",
    "network.model.remat",
)

Scores = tuple[dict[str, jax.Array], jax.Array]  # means by name, and of how many they are


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the program."""
    # ---- data ---------------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    _check(config, mesh)
    dataset = rlds.open_dataset(config.data.directory)
    statistics = dataset_statistics(dataset)
    batch_size = config.data.batch_size // jax.process_count()
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    train_batches = pipeline.TrainBatches(
        dataset,
        "train",
        batch_size=batch_size,
        context=config.data.context,
        seed=config.seed,
        shuffle_mb=config.data.shuffle_megabytes,
        **processes,
    )
    held_out = pipeline.EvalBatches(
        dataset,
        "val",
        batch_size=batch_size,
        context=config.data.context,
        windows=config.validation_windows,
        **processes,
    )
    windows = statistics.num_steps / config.data.context
    steps = config.steps
    if steps is None:
        steps = max(1, round(config.epochs * windows / config.data.batch_size))

    # ---- network, as shapes and the places they go to -----------------------------------------------------------
    preset = presets.get(config.preset)
    tokenizer = None
    if config.adapter in ("vq", "rvq"):
        if not config.tokenizer:
            raise UserError(
                f"config.tokenizer: adapter {config.adapter!r} needs a trained tokenizer, found none; run "
                "python -m mllm_act.train_tokenizer, then pass --config.tokenizer=ITS_WORKDIR"
            )
        tokenizer = tokenizer_checkpoint.load(Path(config.tokenizer))
        dataset.expect_actions(tokenizer.config.action_dim)
        _check_tokenizer(config, tokenizer, dataset)
        # Codes mean what they meant in stage one: its normalisation of actions is kept.
        statistics = dataclasses.replace(statistics, action=tokenizer.statistics.action)
    description = networks.Description(
        preset=config.preset,
        model=networks.configure(preset.model, config, dataset.cameras),
        trained=preset.trained,
        adapter=config.adapter,
        context=config.data.context,
        hidden=config.hidden,
        bins=config.bins,
        tokenizer=None if tokenizer is None else dataclasses.asdict(tokenizer.config),
    )

    def make() -> networks.PolicyNetwork:
        return networks.build(description, statistics, nnx.Rngs(config.seed))

    network = nnx.eval_shape(make)
    graph, trained, fixed = rules.split(network, description.trained)
    print("What is trained:\n" + rules.table(trained, fixed))
    check_float32(rules.flatten(trained))
    tx, learning_rate = optimizer.build(config.optimizer, steps)
    moving = {"trained": trained, "optimizer": jax.eval_shape(tx.init, trained)}
    moving, fixed = sharding.abstract(moving, mesh), sharding.abstract(fixed, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, moving)

    # ---- prompt, and whether all of it fits ---------------------------------------------------------------------
    language, adapter = description.model.language, network.adapter
    pretrained = Path(config.pretrained) if config.pretrained else None  # none: random weights
    text_tokenizer = None
    if preset.text_tokenizer == "pretrained" and pretrained is not None:
        text_tokenizer = pretrained_folder.text_tokenizer(pretrained)
    prompt = prompts.build(
        config.prompt_template,
        text_tokenizer,
        statistics.instructions,
        language.action_tokens,
        config.prompt_tokens,
    )
    prompt.tokens(statistics.instructions)  # one that is too long is told of now
    rows = range(language.action_tokens, language.action_tokens + adapter.codes)
    prompts.check_ids(prompt, statistics.instructions, language.vocabulary, rows)
    longest = networks.longest_prompt(network, config.data.context)
    if config.prompt_tokens > longest:
        raise UserError(
            f"config.prompt_tokens: expected at most {longest}, what {config.data.context} steps leave of the "
            f"{language.context} positions of {config.preset!r}, found {config.prompt_tokens}; lower it or "
            "config.data.context"
        )
    needed = memory.estimate(
        description.model,
        moving["trained"],
        fixed,
        config.data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]),
        config.data.context,
        config.prompt_tokens,
        adapter.tokens_per_action,
    )
    print("Memory a device, about:\n" + memory.table(needed, jax.local_devices()))
    memory.check(needed, jax.local_devices())

    # ---- restore or initialise ----------------------------------------------------------------------------------
    meta = canonical({
        "network": dataclasses.asdict(description),
        "statistics": statistics.to_dict(),
        "prompt": prompt.to_dict(),
        "dataset": {**dataset.metadata, "tasks": statistics.tasks},
        "config": configuration.to_json(config),
        "pretrained": None if pretrained is None else pretrained_folder.meta(pretrained)["sources"],
        "provenance": provenance(),
    })  # fmt: skip
    checkpoints = Checkpointer(workdir)
    first = checkpoints.latest_step
    like = {item: rules.flatten(tree) for item, tree in {**moving, "frozen": fixed}.items()}
    if first is not None:
        saved = checkpoints.meta(first)
        check_same_run(saved, meta, ("config", "network", "statistics", "prompt"), FREE, workdir)
        train_batches.restore(saved["iterator"])
        meta["frozen"] = saved["frozen"]
        restored = checkpoints.restore(first, {item: like[item] for item in moving})
        state = {item: rules.unflatten(restored[item], like=tree) for item, tree in moving.items()}
        frozen = rules.unflatten(
            frozen_arrays.load(workdir, like["frozen"], saved["frozen"]), like=fixed
        )
        print(f"Going on from step {first} of {steps} in {workdir}")
    else:
        given = {} if tokenizer is None else tokenizer_checkpoint.variables(tokenizer.model)
        arrays = initialize.parameters(
            make,
            like["trained"] | like["frozen"],
            {f"adapter/tokenizer/{path}": array for path, array in given.items()},
            description.model,
            pretrained,
        )
        trained = rules.unflatten(arrays, like=moving["trained"])
        start = jax.jit(tx.init, out_shardings=shardings["optimizer"])
        state = {"trained": trained, "optimizer": start(trained)}
        frozen = rules.unflatten(arrays, like=fixed)
        del arrays  # or stacked layers would stay beside the unstacked ones below
        meta["frozen"] = frozen_arrays.save(workdir, rules.flatten(frozen))
    if jax.default_backend() == "gpu":  # elsewhere, compiling one layer for all is worth more
        frozen = unstack(frozen, backward=True)

    # ---- update and validation functions ------------------------------------------------------------------------
    key = jax.random.key(config.seed)

    def update(
        state: dict[str, Any], frozen: nnx.State, batch: Batch, step: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        def loss_of(trained: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
            network = nnx.merge(graph, trained, frozen)
            return network.loss(batch, jax.random.fold_in(key, step))

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["trained"])
        updates, optimizer_state = tx.update(gradients, state["optimizer"], state["trained"])
        trained = optax.apply_updates(state["trained"], updates)
        norms = {"grad_norm": optax.tree.norm(gradients), "weight_norm": optax.tree.norm(trained)}
        metrics = {"loss": loss, **norms, **metrics}
        return {"trained": trained, "optimizer": optimizer_state}, metrics

    def validate(trained: nnx.State, frozen: nnx.State, batch: Batch) -> tuple[Scores, Scores]:
        network = nnx.merge(graph, trained, frozen)
        loss, metrics = network.loss(batch)
        steps = batch.observation.mask.sum()
        error, windows = _action_error(network, batch, dataset.metadata)
        return ({"loss": loss, **metrics}, steps), (error, windows)

    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    validate = jax.jit(validate)

    known = {text: prompt.encode(text) for text in statistics.instructions}

    def to_device(read: dict[str, Any]) -> Batch:
        texts = [text.decode() for text in read["instruction"]]
        encoded = [known[text] if text in known else prompt.encode(text) for text in texts]
        ids, exists = prompts.pad(encoded, prompt.length)
        seen = {"images": read["images"], "proprio": read["proprio"], "mask": read["mask"]}
        batch = Batch(Observation(**seen, prompt=ids, prompt_mask=exists), read["action"])  # type: ignore[arg-type]
        batch_format.check(batch)
        return sharding.place_batch(batch, mesh)

    # ---- loop ---------------------------------------------------------------------------------------------------
    def save(step: int) -> None:
        items = {item: rules.flatten(tree) for item, tree in state.items()}
        checkpoints.save(step, items, {**meta, "step": step, "iterator": train_batches.state()})

    if steps == 0 and first is None:  # the untrained policy, to compare with
        save(0)
    first = first or 0
    with checkpoints, MetricsWriter(workdir, first) as writer:
        bar = tqdm(
            range(first + 1, steps + 1),
            initial=first,
            total=steps,
            desc=f"train {config.adapter}",
            unit="step",
        )
        pending: tuple[int, dict[str, jax.Array]] | None = None
        clock, waited, since = time.perf_counter(), 0.0, first
        for step in bar:
            before = time.perf_counter()
            batch = to_device(next(train_batches))
            waited += time.perf_counter() - before
            state, metrics = update(state, frozen, batch, jnp.int32(step))
            # Metrics of the step before this one: the device is never left without work.
            if pending is not None:
                check_finite(pending[0], jax.device_get(pending[1]), checkpoints)
            pending = (step, metrics)

            if step % config.log_every == 0 or step == steps:
                scalars = jax.device_get(metrics)
                check_finite(step, scalars, checkpoints)
                seconds = (time.perf_counter() - clock) / (step - since)
                speed = {
                    "step_ms": 1e3 * seconds,
                    "data_wait_ms": 1e3 * waited / (step - since),
                    "samples_per_second": config.data.batch_size / seconds,
                }
                writer.write(step, {f"train/{k}": v for k, v in scalars.items()} | {
                    "train/learning_rate": learning_rate(step - 1), **{f"time/{k}": v for k, v in speed.items()},
                })  # fmt: skip
                bar.set_postfix(
                    loss=f"{scalars['loss']:.3f}", wait=f"{waited / (step - since) / seconds:.0%}"
                )
                clock, waited, since = time.perf_counter(), 0.0, step
            if step % config.validate_every == 0 or step == steps:
                found = [
                    jax.device_get(validate(state["trained"], frozen, to_device(read)))
                    for read in held_out
                ]
                scores = _average([one for one, _ in found]) | _average([one for _, one in found])
                writer.write(step, {f"val/{name}": value for name, value in scores.items()})
                shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                bar.write(f"step {step}: {shown}")
            if step % config.checkpoint_every == 0 or step == steps:
                check_finite(step, jax.device_get(metrics), checkpoints)
                save(step)
            if step % config.validate_every == 0 or step % config.checkpoint_every == 0:
                clock, waited, since = time.perf_counter(), 0.0, step
    print(f"Trained {steps} steps. Checkpoint, metrics.jsonl and tensorboard/ are in {workdir}")
    env = dataset.metadata["name"]
    print(f"Next: python -m mllm_act.evaluate --checkpoint={workdir} --env={env} --split=test")


def _action_error(network: networks.PolicyNetwork, batch: Batch, metadata: Any) -> Scores:
    """Decodes the newest step of every window greedily.

    Returns:
      The mean absolute error in physical units, and the number of windows it is of.
    """
    seen, rows = batch.observation, jnp.arange(len(batch.action))
    newest = jnp.maximum(seen.mask.sum(1) - 1, 0)
    tokens = network.act(
        seen.prompt,
        seen.prompt_mask,
        network.mllm.latents(seen.images),
        seen.mask,
        seen.proprio[rows, newest],
        network.adapter.encode(batch.action),
    )
    error = jnp.abs(network.adapter.decode(tokens) - batch.action[rows, newest])
    exists = seen.mask.any(1)[:, None]
    error = jnp.where(exists, error, 0).sum(0) / jnp.maximum(exists.sum(), 1)
    error = error * jnp.array(metadata["action_scale"])
    names = zip(metadata["action_names"], metadata["action_units"], strict=True)
    errors = {f"error_{name}_{unit}": error[i] for i, (name, unit) in enumerate(names)}
    return errors, exists.sum()


def _average(scores: list[Scores]) -> dict[str, float]:
    """Averages scores with their weights."""
    total = sum(float(weight) for _, weight in scores)
    return {
        name: sum(float(values[name]) * float(weight) for values, weight in scores) / total
        for name in scores[0][0]
    }


def _check(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for numbers that cannot be."""
    if config.steps is not None and config.steps < 0:
        raise UserError(f"config.steps: expected at least 0, found {config.steps}")
    data = ("data.context", "data.batch_size")
    every = ("log_every", "validate_every", "checkpoint_every", "validation_windows")
    for key in data + every:
        value = functools.reduce(getattr, key.split("."), config)
        if value < 1:
            raise UserError(f"config.{key}: expected at least 1, found {value}")
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % parts:
        raise UserError(
            f"config.data.batch_size: expected a multiple of mesh data x fsdp = {parts}, found {config.data.batch_size}"
        )


def _check_tokenizer(
    config: ConfigDict, tokenizer: tokenizer_checkpoint.LoadedTokenizer, dataset: rlds.Dataset
) -> None:
    """Raises UserError if the tokenizer is of the other kind, or of another environment's actions."""
    kind = "vq" if tokenizer.config.quantizers == 1 else "rvq"
    if kind != config.adapter:
        raise UserError(
            f"config.tokenizer={config.tokenizer}: expected one for the adapter {config.adapter!r}, found one of "
            f"{tokenizer.config.quantizers} codebook(s); train it with --config=configs/tokenizer/...:{config.adapter}"
        )
    for key in ("name", "action_names", "action_scale"):
        expected, found = dataset.metadata[key], tokenizer.metadata[key]
        if list(expected) != list(found):
            raise UserError(
                f"config.tokenizer={config.tokenizer}: {key}: expected {expected!r} as in {dataset.directory}, found "
                f"{found!r}; train a tokenizer on this data set"
            )


if __name__ == "__main__":
    configuration.run_with_config(main, default="configs/policy/metaworld.py:rvq")
