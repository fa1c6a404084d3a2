"""From a config to a PPO run that is ready for its first rollout: environment, policy, optimizer, parameters."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections.config_dict import ConfigDict

from mllm_act import envs, parameters
from mllm_act.adapters import adapter_settings
from mllm_act.adapters.base import Adapter
from mllm_act.adapters.language import Language
from mllm_act.checkpoints.checkpoint import Checkpointer, canonical, parsing, provenance
from mllm_act.checkpoints.frozen import load_frozen, save_frozen
from mllm_act.config import to_json
from mllm_act.distributed.exchange import group
from mllm_act.envs.base import EnvSpec, metadata
from mllm_act.errors import UserError, nearest
from mllm_act.normalization import Statistics
from mllm_act.policy.load import check_format
from mllm_act.policy.network import (
    NetworkConfig,
    PolicyNetwork,
    build_adapter,
    build_network,
)
from mllm_act.policy.prompt import Prompt
from mllm_act.ranges import check_ranges
from mllm_act.rl import policies
from mllm_act.rl.episodes import Episodes
from mllm_act.rl.rollout import HALVES
from mllm_act.rl.update import LEARNED, PPOConfig, Recipe, State
from mllm_act.rl.value import ValueConfig, ValueHead
from mllm_act.training import sharding
from mllm_act.training.guards import check_float32, check_same_run
from mllm_act.training.initialize import initial_parameters
from mllm_act.training.optimizer import DECAYED
from mllm_act.weights.folder import (
    pretrained_meta,
    pretrained_text_files,
)

# What may differ when a run is resumed.
MAY_DIFFER = (
    "config.init", "config.pretrained", "config.steps", "config.log_every", "config.checkpoint_every", "config.mesh",
    "config.evaluate",
    "config.remat", "config.wandb", "config.stall_minutes", "config.rollout.workers", "config.rollout.timeout",
    "network.model.remat",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A PPO run before its first rollout.

    Attributes:
      mesh: the devices.
      spec: of the environment.
      episodes: which are played.
      network_config: what the network is made of.
      statistics: that normalise actions and proprioception.
      prompt: turns instructions into tokens.
      adapter: abstract.
      recipe: what the compiled functions need.
      state: the learned parameters and the optimizer's state, abstract with shardings.
      frozen: the other parameters, likewise.
      value: sizes of the value head.
      given: arrays to start from, by path; empty for fresh ones.
      pretrained: the folder of pretrained weights, or None.
      saved: the JSON document of the checkpoint to start from, if there is one.
    """

    mesh: Mesh
    spec: EnvSpec
    episodes: Episodes
    network_config: NetworkConfig
    statistics: Statistics
    prompt: Prompt
    adapter: Adapter
    recipe: Recipe
    state: State
    frozen: nnx.State
    value: ValueConfig
    given: Mapping[str, jax.Array]
    pretrained: Path | None
    saved: Mapping[str, Any] | None

    @property
    def context(self) -> int:
        """T, the steps that a memory holds."""
        return self.network_config.embodiments[self.spec.name].context

    def meta(self, config: ConfigDict) -> dict[str, Any]:
        """Returns the JSON document of the run's checkpoints, except for what changes from step to step."""
        name, source = self.spec.name, self.pretrained
        weights = {
            "pretrained": None if source is None else pretrained_meta(source)["sources"],
            "text_files": None if source is None else pretrained_text_files(source),  # for export
        }
        if self.saved is not None:
            weights = {key: self.saved.get(key) for key in weights}
        return canonical({
            "network": dataclasses.asdict(self.network_config),
            "statistics": {name: self.statistics.to_dict()},
            "prompt": {name: self.prompt.to_dict()},
            "dataset": {name: {**metadata(self.spec), "tasks": sorted(self.episodes.tasks)}},
            "config": to_json(config),
            **weights,
            "provenance": provenance(),
        })  # fmt: skip


def set_up(config: ConfigDict) -> Run:
    """Opens and checks everything that the config names. Nothing is compiled and no parameter is made.

    Raises:
      UserError: if something does not fit; it names the key.
    """
    check_ranges(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    _check_sizes(config, mesh)
    episodes = _episodes(config)
    spec = envs.spec(config.env.name)
    saved = policies.from_run(config, spec)
    if saved is None:
        network_config, statistics, prompt, pretrained = policies.from_scratch(
            config, spec, episodes
        )
        given: Mapping[str, jax.Array] = {}
    else:
        network_config, statistics, prompt, given = saved[:4]
        pretrained = None
    policies.check(network_config, spec, prompt)
    part = network_config.embodiments[spec.name]
    adapter = nnx.eval_shape(
        lambda: build_adapter(part, network_config.model, statistics, nnx.Rngs(0))
    )
    ppo = PPOConfig(**config.ppo)
    value = ValueConfig(**config.value)
    network = nnx.eval_shape(_maker(network_config, spec.name, statistics, config.seed))
    graph, trained, frozen = parameters.split(network, network_config.trained)
    head = nnx.eval_shape(_head(value, network_config, config.seed))
    value_graph, value_state = nnx.split(head)
    print("Parameters:\n" + parameters.table({"network": trained, "value": value_state}, frozen))
    check_float32(parameters.flatten(trained))
    optimizer = build_optimizer(config.optimizer)
    state = {"trained": trained, "value": value_state}
    state["optimizer"] = jax.eval_shape(optimizer.init, state)
    recipe = Recipe(spec.name, graph, value_graph, optimizer, mesh, ppo, log_actions(adapter, spec))
    return Run(
        mesh, spec, episodes, network_config, statistics, prompt, adapter, recipe,
        sharding.abstract(state, mesh), sharding.abstract(frozen, mesh), value, given, pretrained,
        None if saved is None else saved[4],
    )  # fmt: skip


def start_or_resume(
    run: Run, config: ConfigDict, checkpoints: Checkpointer, workdir: Path
) -> tuple[int, Mapping[str, Any], State, nnx.State, dict[str, Any]]:
    """Restores the newest checkpoint, or makes and places the first parameters.

    Returns:
      The number of updates made, the JSON document of the checkpoint (empty at the start), the learned state, the
      frozen parameters, and the JSON document of further checkpoints.

    Raises:
      UserError: if the checkpoint belongs to another run or version.
    """
    meta, step = run.meta(config), checkpoints.latest_step
    saved: Mapping[str, Any] = {}
    if step is None:
        state, frozen = _start(run, config.seed)
        meta["frozen"] = save_frozen(workdir, parameters.flatten(frozen))
    else:
        where = f"{workdir}/checkpoints/{step}"
        saved = checkpoints.meta(step)
        with parsing(saved, where):
            if "network" in saved:
                check_format(saved, where)
            if "simulators" not in saved:
                raise UserError(
                    f"{where}: expected the checkpoint of a PPO run, found another; name it with --config.init and "
                    "choose another --workdir"
                )
            check_same_run(
                saved, meta, ("config", "network", "statistics", "prompt"), MAY_DIFFER, workdir
            )
            like = {item: parameters.flatten(tree) for item, tree in run.state.items()}
            restored = checkpoints.restore(step, like)
            state = {i: parameters.unflatten(restored[i], like=t) for i, t in run.state.items()}
            arrays = load_frozen(workdir, parameters.flatten(run.frozen), saved["frozen"])
            frozen = parameters.unflatten(arrays, like=run.frozen)
        meta["frozen"] = saved["frozen"]
        print(f"Resuming from update {step} of {config.steps} in {workdir}")
    return step or 0, saved, state, frozen, meta


def _start(run: Run, seed: int) -> tuple[State, nnx.State]:
    name, trained = run.spec.name, run.state["trained"]
    wanted = parameters.flatten(trained) | parameters.flatten(run.frozen)
    arrays = initial_parameters(
        _maker(run.network_config, name, run.statistics, seed),
        wanted,
        run.given,
        run.network_config.model,
        run.pretrained,
    )
    make = _head(run.value, run.network_config, seed)
    where = jax.tree.map(lambda leaf: leaf.sharding, run.state["value"])
    value = jax.jit(lambda: nnx.state(make()), out_shardings=where)()
    learned = {"trained": parameters.unflatten(arrays, like=trained), "value": value}
    where = jax.tree.map(lambda leaf: leaf.sharding, run.state["optimizer"])
    optimizer = jax.jit(run.recipe.optimizer.init, out_shardings=where)(learned)
    return {**learned, "optimizer": optimizer}, parameters.unflatten(arrays, like=run.frozen)


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns AdamW with a constant learning rate and gradient clipping; keys as in the config."""

    def decayed(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: parameters.find(DECAYED, parameters.name(path)), params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            config.learning_rate, b1=config.b1, b2=config.b2, eps=config.epsilon,
            weight_decay=config.weight_decay, mask=decayed,
        ),
    )  # fmt: skip


def log_actions(adapter: Adapter, spec: EnvSpec) -> float:
    """Returns the logarithm of the number of actions that an adapter can write."""
    if isinstance(adapter, Language) and not adapter.filter:
        return adapter.tokens_per_action * math.log(adapter.vocabulary)
    if adapter.discrete:
        return math.log(max(len(spec.choices), 2))
    return adapter.tokens_per_action * math.log(adapter.codes)


def _episodes(config: ConfigDict) -> Episodes:
    env = config.env
    spec, splits = envs.spec(env.name), envs.splits(env.name)
    if env.split not in splits:
        raise UserError(
            f"config.env.split: expected one of {', '.join(splits)}, found {env.split!r}; "
            f"{nearest(env.split, splits)}"
        )
    if env.horizon is not None and not 1 <= env.horizon <= spec.horizon:
        raise UserError(
            f"config.env.horizon: expected 1 to {spec.horizon} for {env.name}, found {env.horizon}"
        )
    tasks = envs.select_tasks(env.name, env.tasks or ",".join(envs.instructions(env.name)))
    return Episodes(tasks, splits[env.split][:: env.stride], config.seed)


def _check_sizes(config: ConfigDict, mesh: Mesh) -> None:
    simulators, shards = config.rollout.simulators, mesh.shape["data"] * mesh.shape["fsdp"]
    if simulators % (HALVES * shards):
        raise UserError(
            f"config.rollout.simulators: expected a multiple of {HALVES * shards}, two halves on mesh data x fsdp = "
            f"{shards} devices, found {simulators}"
        )
    if config.ppo.minibatches > simulators:
        raise UserError(
            f"config.ppo.minibatches: expected at most {simulators}, one whole episode of each simulator, found "
            f"{config.ppo.minibatches}; lower it or raise config.rollout.simulators"
        )
    if group.count > 1:
        raise UserError(
            f"expected one process for PPO, found {group.count}; use one host, with all its devices"
        )
    name = config.adapter.name
    known = {"name", *adapter_settings(name)}
    for setting in config.adapter:
        if setting not in known:
            raise UserError(
                f"config.adapter.{setting}: expected settings of the adapter {name!r}, found one of another; choose "
                f"the adapter by the variant, such as --config=configs/rl/language_rearrangement.py:{name}"
            )


def _maker(config: NetworkConfig, name: str, statistics: Statistics, seed: int) -> Any:
    def make() -> PolicyNetwork:
        return build_network(config, {name: statistics}, nnx.Rngs(seed))

    return make


def _head(config: ValueConfig, network: NetworkConfig, seed: int) -> Any:
    def make() -> ValueHead:
        return ValueHead(config, network.model.language.width, nnx.Rngs(seed))

    return make


def empty_action(run: Run) -> np.ndarray:
    """Returns the tokens of an action, any one, for steps that have none."""
    low = np.array(run.spec.action_low, np.float32)

    def encode() -> jax.Array:
        make = _maker(run.network_config, run.spec.name, run.statistics, 0)
        return make().adapters[run.spec.name].encode(jnp.asarray(low))

    return np.asarray(jax.jit(encode)())


__all__ = ["LEARNED", "Run", "empty_action", "set_up", "start_or_resume"]
