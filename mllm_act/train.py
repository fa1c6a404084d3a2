"""Trains a policy on demonstrations by supervised learning.

    python -m mllm_act.train --config=configs/policy/metaworld.py:rvq --workdir=DIR [--config.a.b=value ...]

Run again with the same command, it goes on from the newest checkpoint in ``--workdir``, bit for bit.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections.config_dict import ConfigDict
from tqdm import tqdm

from data_pipelines.reading import mixture, pipeline
from mllm_act import batch as batch_format
from mllm_act import config as configuration
from mllm_act import parameters
from mllm_act.action_tokenizer import checkpoint as tokenizer_checkpoint
from mllm_act.batch import Batch, Observation
from mllm_act.checkpoints import frozen as frozen_arrays
from mllm_act.checkpoints.checkpoint import Checkpointer, canonical, provenance
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.models.layers import unstack
from mllm_act.policy import network as networks
from mllm_act.policy import prompt as prompts
from mllm_act.training import embodiments, initialize, memory, optimizer, sharding
from mllm_act.training.guards import check_finite, check_float32, check_same_run
from mllm_act.training.metrics import MetricsWriter
from mllm_act.weights import folder as pretrained_folder

# What a resumed run may be given otherwise. The data's bytes are compared by the iterator, the tokenizer by what it
# makes of the network and of the statistics; on another mesh, and with another remat, sums are rounded otherwise.
FREE = (
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
    opened = embodiments.open_all(config)
    batch_size, parts = config.data.batch_size, mesh.shape["data"] * mesh.shape["fsdp"]
    weights = {name: one.weight for name, one in opened.items()}
    shares = mixture.shares(weights, batch_size, math.lcm(parts, jax.process_count()))
    train_parts, held_out = {}, {}
    for name, one in opened.items():
        of_one = {
            "batch_size": shares[name] // jax.process_count(),
            "context": one.config.data.context,
            "chunk": one.config.chunk,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        train_parts[name] = pipeline.TrainBatches(
            one.dataset,
            "train",
            seed=config.seed,
            shuffle_mb=config.data.shuffle_megabytes,
            **of_one,
        )
        held_out[name] = pipeline.EvalBatches(
            one.dataset, "val", windows=config.validation_windows, **of_one
        )
    train_batches = mixture.MixedBatches(train_parts)
    padded_parts = {name: parts if one.mostly_padding else None for name, one in opened.items()}
    windows = sum(one.windows for one in opened.values())
    steps = config.steps
    if steps is None:
        steps = max(1, round(config.epochs * windows / batch_size))

    # ---- network, as shapes and the places they go to -----------------------------------------------------------
    preset = presets.get(config.preset)
    model = networks.configure(preset.model, config)
    pretrained = Path(config.pretrained) if config.pretrained else None  # none: random weights
    if preset.text_tokenizer == "pretrained" and pretrained is not None:
        text_tokenizer = pretrained_folder.text_tokenizer(pretrained)
    else:
        texts = embodiments.texts(opened.values())
        text_tokenizer = prompts.train_tokenizer(texts, model.language.action_tokens)
    bodies = {name: embodiments.describe(one, text_tokenizer) for name, one in opened.items()}
    description = networks.Description(config.preset, model, preset.trained, bodies)
    statistics = {name: one.statistics for name, one in opened.items()}

    def make() -> networks.PolicyNetwork:
        return networks.build(description, statistics, nnx.Rngs(config.seed))

    network = nnx.eval_shape(make)
    graph, trained, fixed = parameters.split(network, description.trained)
    print("What is trained:\n" + parameters.table(trained, fixed))
    check_float32(parameters.flatten(trained))
    tx, learning_rate = optimizer.build(config.optimizer, steps)
    moving = {"trained": trained, "optimizer": jax.eval_shape(tx.init, trained)}
    moving, fixed = sharding.abstract(moving, mesh), sharding.abstract(fixed, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, moving)

    # ---- prompts, and whether all of it fits --------------------------------------------------------------------
    prompt = {
        name: embodiments.prompt(one, bodies[name], model, network.adapters[name], text_tokenizer)
        for name, one in opened.items()
    }
    estimates = [
        memory.estimate(
            model,
            moving["trained"],
            fixed,
            shares[name] // parts,
            len(one.dataset.cameras),
            one.config.data.context,
            one.config.prompt_tokens,
            network.adapters[name].tokens_per_action,
        )
        for name, one in opened.items()
    ]
    needed = max(estimates, key=lambda one: sum(one.values()))  # their passes are one after another
    print("Memory a device, about:\n" + memory.table(needed, jax.local_devices()))
    memory.check(needed, jax.local_devices())

    # ---- restore or initialise ----------------------------------------------------------------------------------
    meta = canonical({
        "network": dataclasses.asdict(description),
        "statistics": {name: one.to_dict() for name, one in statistics.items()},
        "prompt": {name: one.to_dict() for name, one in prompt.items()},
        "dataset": {
            name: {**one.dataset.metadata, "tasks": one.statistics.tasks}
            for name, one in opened.items()
        },
        "config": configuration.to_json(config),
        "pretrained": None if pretrained is None else pretrained_folder.meta(pretrained)["sources"],
        "provenance": provenance(),
    })  # fmt: skip
    checkpoints = Checkpointer(workdir)
    first = checkpoints.latest_step
    like = {item: parameters.flatten(tree) for item, tree in {**moving, "frozen": fixed}.items()}
    if first is not None:
        saved = checkpoints.meta(first)
        places = [
            f"{one.key}.{name}"
            for one in opened.values()
            for name in ("data.directory", "tokenizer")
        ]
        same = ("config", "network", "statistics", "prompt")
        check_same_run(saved, meta, same, (*FREE, *places), workdir)
        train_batches.restore(saved["iterator"])
        meta["frozen"] = saved["frozen"]
        restored = checkpoints.restore(first, {item: like[item] for item in moving})
        state = {
            item: parameters.unflatten(restored[item], like=tree) for item, tree in moving.items()
        }
        frozen = parameters.unflatten(
            frozen_arrays.load(workdir, like["frozen"], saved["frozen"]), like=fixed
        )
        print(f"Going on from step {first} of {steps} in {workdir}")
    else:
        given = {
            f"adapters/{name}/tokenizer/{path}": array
            for name, one in opened.items()
            if one.tokenizer is not None
            for path, array in tokenizer_checkpoint.variables(one.tokenizer.model).items()
        }
        wanted = like["trained"] | like["frozen"]
        arrays = initialize.initial_parameters(make, wanted, given, model, pretrained)
        trained = parameters.unflatten(arrays, like=moving["trained"])
        start = jax.jit(tx.init, out_shardings=shardings["optimizer"])
        state = {"trained": trained, "optimizer": start(trained)}
        frozen = parameters.unflatten(arrays, like=fixed)
        del arrays  # or stacked layers would stay beside the unstacked ones below
        meta["frozen"] = frozen_arrays.save(workdir, parameters.flatten(frozen))
    if jax.default_backend() == "gpu":  # elsewhere, compiling one layer for all is worth more
        frozen = unstack(frozen, backward=True)

    # ---- update and validation functions ------------------------------------------------------------------------
    key = jax.random.key(config.seed)

    def named(name: str, scalar: str) -> str:
        """Says whose a scalar is, where there are several embodiments."""
        return scalar if len(opened) == 1 else f"{name}/{scalar}"

    def update(
        state: dict[str, Any], frozen: nnx.State, batches: Mapping[str, Batch], step: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        def loss_of(trained: nnx.State, name: str) -> tuple[jax.Array, dict[str, jax.Array]]:
            network = nnx.merge(graph, trained, frozen).embodied(name)
            loss, metrics = network.loss(
                batches[name], jax.random.fold_in(key, step), padded_parts[name]
            )
            share = shares[name] / batch_size
            return share * loss, {
                named(name, key): x for key, x in {"loss": loss, **metrics}.items()
            }

        # One embodiment after another, so that the activations of one alone are kept.
        loss, gradients = jnp.zeros(()), None
        metrics: dict[str, jax.Array] = {}
        for name in batches:
            (part, scalars), found = jax.value_and_grad(loss_of, has_aux=True)(
                state["trained"], name
            )
            loss, metrics = loss + part, metrics | scalars
            gradients = found if gradients is None else optax.tree.add(gradients, found)
        updates, optimizer_state = tx.update(gradients, state["optimizer"], state["trained"])
        trained = optax.apply_updates(state["trained"], updates)
        norms = {"grad_norm": optax.tree.norm(gradients), "weight_norm": optax.tree.norm(trained)}
        return {"trained": trained, "optimizer": optimizer_state}, {
            **metrics,
            "loss": loss,
            **norms,
        }

    def validate(
        trained: nnx.State, frozen: nnx.State, name: str, batch: Batch
    ) -> tuple[Scores, Scores]:
        network = nnx.merge(graph, trained, frozen).embodied(name)
        loss, metrics = network.loss(batch, padded_parts=padded_parts[name])
        steps = batch.observation.mask.sum()
        latents = network.latents(batch.observation, padded_parts[name])
        error, windows = _action_error(
            network, bodies[name], batch, latents, opened[name].dataset.metadata
        )
        return ({"loss": loss, **metrics}, steps), (error, windows)

    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    validate = jax.jit(validate, static_argnums=2)

    known = {
        (name, text): prompt[name].encode(text)
        for name in opened
        for text in statistics[name].instructions
    }

    def to_device(name: str, read: dict[str, Any]) -> Batch:
        found = [(name, text.decode()) for text in read["instruction"]]
        encoded = [known[one] if one in known else prompt[name].encode(one[1]) for one in found]
        ids, exists = prompts.pad(encoded, prompt[name].length)
        seen = {"images": read["images"], "proprio": read["proprio"], "mask": read["mask"]}
        batch = Batch(Observation(**seen, prompt=ids, prompt_mask=exists), read["action"])  # type: ignore[arg-type]
        batch_format.check(batch)
        return sharding.place_batch(batch, mesh)

    # ---- loop ---------------------------------------------------------------------------------------------------
    def save(step: int) -> None:
        items = {item: parameters.flatten(tree) for item, tree in state.items()}
        checkpoints.save(step, items, {**meta, "step": step, "iterator": train_batches.state()})

    if steps == 0 and first is None:  # the untrained policy, to compare with
        save(0)
    first = first or 0
    with checkpoints, MetricsWriter(workdir, first) as writer:
        bar = tqdm(
            range(first + 1, steps + 1),
            initial=first,
            total=steps,
            desc=f"train {', '.join(one.config.adapter for one in opened.values())}",
            unit="step",
        )
        pending: tuple[int, dict[str, jax.Array]] | None = None
        clock, waited, since = time.perf_counter(), 0.0, first
        for step in bar:
            before = time.perf_counter()
            batches = {name: to_device(name, read) for name, read in next(train_batches).items()}
            waited += time.perf_counter() - before
            state, metrics = update(state, frozen, batches, jnp.int32(step))
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
                scores: dict[str, float] = {}
                for name, reads in held_out.items():
                    found = [
                        jax.device_get(
                            validate(state["trained"], frozen, name, to_device(name, read))
                        )
                        for read in reads
                    ]
                    for kind in zip(*found, strict=True):
                        scores |= {named(name, key): x for key, x in _average(kind).items()}
                writer.write(step, {f"val/{name}": value for name, value in scores.items()})
                shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                bar.write(f"step {step}: {shown}")
            if step % config.checkpoint_every == 0 or step == steps:
                check_finite(step, jax.device_get(metrics), checkpoints)
                save(step)
            if step % config.validate_every == 0 or step % config.checkpoint_every == 0:
                clock, waited, since = time.perf_counter(), 0.0, step
    print(f"Trained {steps} steps. Checkpoint, metrics.jsonl and tensorboard/ are in {workdir}")
    for env in opened:
        print(f"Next: python -m mllm_act.evaluate --checkpoint={workdir} --env={env} --split=test")


def _action_error(
    network: networks.Embodied,
    embodiment: networks.Embodiment,
    batch: Batch,
    latents: jax.Array,
    metadata: Any,
) -> Scores:
    """Decodes the newest step of every window greedily.

    Returns:
      The mean absolute error in physical units, over all actions of a chunk, or the share of discrete actions that are
      not the expert's; and the number of windows it is of.
    """
    seen, rows = batch.observation, jnp.arange(len(batch.action))
    newest = jnp.maximum(seen.mask.sum(1) - 1, 0)
    tokens = network.act(
        network.mllm.read(seen.prompt, seen.prompt_mask),
        latents,
        seen.mask,
        seen.proprio[rows, newest],
        network.adapter.encode(batch.action),
    )
    decoded, expert = network.adapter.decode(tokens), batch.action[rows, newest]
    exists = seen.mask.any(1)
    if embodiment.actions:
        wrong = jnp.where(exists, (decoded != expert).any(-1), False)
        return {"wrong_actions": wrong.sum() / jnp.maximum(exists.sum(), 1)}, exists.sum()
    error = jnp.abs(decoded - expert).reshape(len(rows), embodiment.chunk, -1).mean(1)
    error = jnp.where(exists[:, None], error, 0).sum(0) / jnp.maximum(exists.sum(), 1)
    error = error * jnp.array(metadata["action_scale"])
    names = zip(metadata["action_names"], metadata["action_units"], strict=True)
    errors = {f"error_{name}_{unit}": error[i] for i, (name, unit) in enumerate(names)}
    return errors, exists.sum()


def _average(scores: Sequence[Scores]) -> dict[str, float]:
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
    every = ("log_every", "validate_every", "checkpoint_every", "validation_windows")
    for key in ("data.batch_size", *every):
        value = functools.reduce(getattr, key.split("."), config)
        if value < 1:
            raise UserError(f"config.{key}: expected at least 1, found {value}")
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % parts:
        raise UserError(
            f"config.data.batch_size: expected a multiple of mesh data x fsdp = {parts}, found {config.data.batch_size}"
        )


if __name__ == "__main__":
    configuration.run_with_config(main, default="configs/policy/metaworld.py:rvq")
