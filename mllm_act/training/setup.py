"""From a config to a run that is ready for its first update: embodiments, network, optimizer, parameters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections.config_dict import ConfigDict

from data_pipelines.reading.mixture import MixedBatches, fractions
from mllm_act import flops, normalization, parameters
from mllm_act.adapters import adapter_class, adapter_settings
from mllm_act.checkpoints.checkpoint import Checkpointer, canonical, parsing, provenance
from mllm_act.checkpoints.frozen import load_frozen, save_frozen
from mllm_act.config import to_json
from mllm_act.distributed.exchange import group
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.normalization import Statistics
from mllm_act.policy.load import check_format
from mllm_act.policy.network import NetworkConfig, PolicyNetwork, build_network, override_model
from mllm_act.policy.prompt import train_text_tokenizer
from mllm_act.ranges import check_ranges
from mllm_act.training import embodiments, memory, optimizer, sharding
from mllm_act.training.augment import Augmentation
from mllm_act.training.embodiments import Embodiment
from mllm_act.training.guards import check_float32, check_same_run
from mllm_act.training.initialize import initial_parameters
from mllm_act.training.step import Recipe, State
from mllm_act.weights.folder import (
    pretrained_meta,
    pretrained_text_files,
    pretrained_text_tokenizer,
)

# What may differ when a run is resumed. The data iterator compares the bytes of the data; another tokenizer shows in
# the network and the statistics; another mesh or remat only rounds sums differently.
MAY_DIFFER = (
    "config.pretrained",
    "config.log_every",
    "config.validate_every",
    "config.validation_windows",
    "config.checkpoint_every",
    "config.stall_minutes",
    "config.mesh",
    "config.wandb",
    "config.remat",
    "network.model.remat",
)


FEW_UPDATES = 500


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run before its first update.

    Attributes:
      mesh: the devices.
      embodiments: by name.
      network_config: what the network is made of.
      recipe: what the compiled functions need besides arrays.
      state: the trained parameters, the optimizer's state and perhaps an average, abstract with shardings.
      frozen: the other parameters, likewise.
      learning_rate: by step.
      steps: how many updates the run makes.
      pretrained: the folder of pretrained weights, or None for random ones.
    """

    mesh: Mesh
    embodiments: dict[str, Embodiment]
    network_config: NetworkConfig
    recipe: Recipe
    state: State
    frozen: nnx.State
    learning_rate: optax.Schedule
    steps: int
    pretrained: Path | None

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Of each embodiment, of single actions."""
        return {name: robot.source.statistics for name, robot in self.embodiments.items()}

    @property
    def operations(self) -> float:
        """Of one update by formula, over all devices; see ``mllm_act.flops``."""
        return sum(
            flops.train(
                self.network_config.model, self.network_config.trained, robot.share, len(robot.config.cameras),
                robot.config.context, robot.prompt.length, robot.adapter.tokens_per_action, robot.adapter.codes,
            )
            for robot in self.embodiments.values()
        )  # fmt: skip

    def meta(self, config: ConfigDict) -> dict[str, Any]:
        """Returns the JSON document of the run's checkpoints, except for what changes from step to step."""
        return canonical({
            "network": dataclasses.asdict(self.network_config),
            "statistics": {name: s.to_dict() for name, s in self.statistics.items()},
            "prompt": {name: e.prompt.to_dict() for name, e in self.embodiments.items()},
            "dataset": {
                name: {
                    **e.source.dataset.metadata, "tasks": e.source.statistics.tasks,
                    "image_shapes": e.source.dataset.image_shapes,
                }
                for name, e in self.embodiments.items()
            },
            "config": to_json(config),
            "pretrained": None if self.pretrained is None else pretrained_meta(self.pretrained)["sources"],
            "text_files": None if self.pretrained is None else pretrained_text_files(self.pretrained),  # for export
            "provenance": provenance(),
        })  # fmt: skip


def set_up(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Run:
    """Opens and checks everything that the config names. Nothing is compiled and no parameter is made.

    Args:
      config: of the run.
      devices: those of a machine that is not there, for ``training.dry_run``; JAX's by default.

    Raises:
      UserError: if something does not fit; it names the key.
    """
    check_ranges(config)
    _check_adapters(config)
    preset = presets.get(config.preset)
    model = override_model(preset.model, config)
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % (shards * config.accumulate):
        raise UserError(
            f"config.data.batch_size: expected a multiple of mesh data x fsdp x config.accumulate = "
            f"{shards * config.accumulate}, found {config.data.batch_size}"
        )
    sources = embodiments.open_sources(config)
    for name, source in sources.items():
        if not source.actions:
            names = source.dataset.metadata["action_names"]
            print(normalization.table(source.key, name, names, source.statistics))
    pretrained = Path(config.pretrained) if config.pretrained else None
    if preset.text_tokenizer == "pretrained" and pretrained is not None:
        text_tokenizer = pretrained_text_tokenizer(pretrained)
    else:
        texts = embodiments.texts(sources.values())
        text_tokenizer = train_text_tokenizer(texts, model.language.action_tokens)
    batch_size = config.data.batch_size
    part = sharding.part_of(mesh) if devices is None else (0, 1)
    robots = embodiments.make_embodiments(
        sources, model, text_tokenizer, batch_size, shards * config.accumulate, part
    )
    steps = config.steps
    if steps is None:
        windows = sum(source.windows for source in sources.values())
        steps = max(1, round(config.epochs * windows / batch_size))
        if steps < FEW_UPDATES:
            print(
                f"notice: {config.epochs:g} epochs of {windows:.0f} windows are {steps} updates, which teach a policy "
                f"little; --config.steps={FEW_UPDATES} or more sets them for a small dataset"
            )

    network_config = NetworkConfig(
        config.preset, model, preset.trained, {name: robot.config for name, robot in robots.items()}
    )
    statistics = {name: source.statistics for name, source in sources.items()}
    weights = {name: source.weight for name, source in sources.items()}
    network = nnx.eval_shape(_maker(network_config, statistics, config.seed))
    graph, trained, frozen = parameters.split(network, preset.trained)
    print("Parameters:\n" + parameters.table(trained, frozen))
    check_float32(parameters.flatten(trained))
    tx, learning_rate = optimizer.build(config.optimizer, steps)
    state = {"trained": trained, "optimizer": jax.eval_shape(tx.init, trained)}
    if config.ema:
        state["ema"] = trained
    recipe = Recipe(
        graph=graph,
        accumulate=config.accumulate,
        ema=config.ema,
        mesh=mesh,
        optimizer=tx,
        key=jax.random.key(config.seed),
        shares={name: float(part) for name, part in fractions(weights).items()},
        skip_padding={
            name: shards if source.mostly_padding else None for name, source in sources.items()
        },
        action_units={
            name: tuple(
                zip(*(source.dataset.metadata[f"action_{key}"] for key in ("names", "units", "scale")), strict=True)
            )
            for name, source in sources.items()
        },
        augmentation=Augmentation(config.augment.crop, config.augment.color),
    )  # fmt: skip
    run = Run(
        mesh, robots, network_config, recipe, sharding.abstract(state, mesh),
        sharding.abstract(frozen, mesh), learning_rate, steps, pretrained,
    )  # fmt: skip
    if devices is None:
        _check_memory(run, shards)
    return run


def start_or_resume(
    run: Run, config: ConfigDict, checkpoints: Checkpointer, batches: MixedBatches, workdir: Path
) -> tuple[int | None, State, nnx.State, dict[str, Any]]:
    """Restores the newest checkpoint, or makes and places the first parameters.

    Returns:
      The step of the checkpoint (None where there is none), the state, the frozen parameters, and the JSON document
      of the run's checkpoints.

    Raises:
      UserError: if the checkpoint belongs to another run or version.
    """
    meta = run.meta(config)
    fingerprints = {name: e.source.statistics.fingerprint for name, e in run.embodiments.items()}
    group.expect_same("data", {f"the data of {name}": x for name, x in fingerprints.items()})
    step = group.from_first("newest step", lambda: checkpoints.latest_step)
    if step is None:
        state, frozen = _start(run, config.seed)
        meta["frozen"] = save_frozen(workdir, parameters.flatten(frozen))
    else:
        saved = group.from_first("checkpoint", lambda: checkpoints.meta(step))
        with parsing(saved, f"{workdir}/checkpoints/{step}"):
            state, frozen = _resume(run, checkpoints, step, saved, meta, workdir)
            batches.restore(saved["iterator"])
        meta["frozen"] = saved["frozen"]
        print(f"Resuming from step {step} of {run.steps} in {workdir}")
    if jax.default_backend() == "gpu":  # elsewhere, compiling one layer for all is worth more
        frozen = sharding.unstack(frozen, run.mesh)[0](frozen)
    return step, state, frozen, meta


def _start(run: Run, seed: int) -> tuple[State, nnx.State]:
    """Makes the first parameters: from stage one, from pretrained weights, or at random."""
    given: dict[str, jax.Array] = {}
    for embodiment in run.embodiments.values():
        given |= embodiment.tokenizer_arrays()
    trained = run.state["trained"]
    arrays = initial_parameters(
        _maker(run.network_config, run.statistics, seed),
        parameters.flatten(trained) | parameters.flatten(run.frozen),
        given,
        run.network_config.model,
        run.pretrained,
    )
    trained = parameters.unflatten(arrays, like=trained)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state["optimizer"])
    start = jax.jit(run.recipe.optimizer.init, out_shardings=shardings)
    state = {"trained": trained, "optimizer": start(trained)}
    if "ema" in run.state:
        state["ema"] = jax.tree.map(jnp.copy, trained)  # its own arrays: an update donates them
    return state, parameters.unflatten(arrays, like=run.frozen)


def _resume(
    run: Run,
    checkpoints: Checkpointer,
    step: int,
    saved: Mapping[str, Any],
    meta: Mapping[str, Any],
    workdir: Path,
) -> tuple[State, nnx.State]:
    """Restores a step, after checking that the checkpoint is of the same run."""
    if "network" in saved:
        check_format(saved, f"{workdir}/checkpoints/{step}")
    paths = [
        f"{embodiment.source.key}.{key}"
        for embodiment in run.embodiments.values()
        for key in ("data.directory", "data.mapping", "tokenizer")
    ]
    same = ("config", "network", "statistics", "prompt")
    check_same_run(saved, meta, same, (*MAY_DIFFER, *paths), workdir)
    like = {item: parameters.flatten(tree) for item, tree in run.state.items()}
    restored = checkpoints.restore(step, like)
    state = {
        item: parameters.unflatten(restored[item], like=tree) for item, tree in run.state.items()
    }
    arrays = load_frozen(workdir, parameters.flatten(run.frozen), saved["frozen"])
    return state, parameters.unflatten(arrays, like=run.frozen)


def _maker(
    config: NetworkConfig, statistics: Mapping[str, Statistics], seed: int
) -> Callable[[], PolicyNetwork]:
    return lambda: build_network(config, statistics, nnx.Rngs(seed))


def _check_memory(run: Run, shards: int) -> None:
    """Prints what a device needs; raises UserError where it cannot fit."""
    model = run.network_config.model
    estimates = [
        memory.estimate(
            model,
            run.state["trained"],
            run.frozen,
            embodiment.rows // shards // run.recipe.accumulate,
            len(embodiment.config.cameras),
            embodiment.config.context,
            embodiment.prompt.length,
            embodiment.adapter.tokens_per_action,
        )
        for embodiment in run.embodiments.values()
    ]
    needed = max(estimates, key=lambda parts: sum(parts.values()))  # their passes follow each other
    print("Memory per device, estimated:\n" + memory.table(needed, jax.local_devices()))
    memory.check(needed, jax.local_devices())


def _check_adapters(config: ConfigDict) -> None:
    """Raises UserError for an adapter that does not exist, and for settings that it does not have."""
    single = {"config": config}
    mixture = {f"config.mixture.{name}": part for name, part in config.get("mixture", {}).items()}
    for key, part in (mixture if "mixture" in config else single).items():
        name = part.adapter.name
        adapter_class(name, f"{key}.adapter.name")  # reports a name that does not exist
        known = {"name", *adapter_settings(name)}
        for setting in part.adapter:
            if setting not in known:
                raise UserError(
                    f"{key}.adapter.{setting}: expected settings of the adapter {name!r}, found one of another; choose "
                    f"the adapter by the variant, such as --config=configs/policy/metaworld.py:{name}"
                )
        if not all(isinstance(action, str) for action in part.actions):
            raise UserError(f"{key}.actions: expected names, found {tuple(part.actions)}")
