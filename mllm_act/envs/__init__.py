"""Environments by name. Modules are imported when asked for; none imports JAX or TensorFlow."""

import importlib
from types import ModuleType

from mllm_act.envs.base import Env, EnvObservation, EnvSpec, Job
from mllm_act.errors import UserError, nearest

__all__ = [
    "ENVS",
    "Env",
    "EnvObservation",
    "EnvSpec",
    "Job",
    "instructions",
    "make",
    "module",
    "select_tasks",
    "spec",
    "splits",
]

ENVS: dict[str, str] = {
    "metaworld": "mllm_act.envs.metaworld.metaworld",
    "babyai": "mllm_act.envs.babyai.babyai",
}


def module(name: str) -> ModuleType:
    """Returns the environment's module; UserError names the nearest where there is none."""
    if name not in ENVS:
        raise UserError(f"unknown environment {name!r}: {nearest(name, ENVS)}")
    return importlib.import_module(ENVS[name])


def make(name: str, *, render: bool = True) -> Env:
    """Builds one simulator; with ``render=False`` its observations hold no images (and steps are
    fast).
    """
    env: Env = module(name).make(render=render)
    return env


def spec(name: str) -> EnvSpec:
    """Returns the `EnvSpec` without starting a simulator."""
    env_spec: EnvSpec = module(name).SPEC
    return env_spec


def instructions(name: str) -> dict[str, str]:
    """Returns all task names, in a fixed order, each with its instruction sentence, or the pattern
    of it where each episode has its own: `EnvObservation` has the episode's.
    """
    sentences: dict[str, str] = module(name).INSTRUCTIONS
    return sentences


def splits(name: str) -> dict[str, range]:
    """Returns the configurations of each split, the same for every task."""
    configurations: dict[str, range] = module(name).SPLITS
    return configurations


def select_tasks(name: str, tasks: str) -> tuple[str, ...]:
    """Turns ``'reach-v3,ml5'`` (task and group names, comma separated) into task names, each once,
    in that order.

    Raises:
      UserError: a name that is neither a task nor a group; the nearest is named.
    """
    env = module(name)
    chosen: dict[str, None] = {}
    for word in filter(None, (part.strip() for part in tasks.split(","))):
        if word not in env.GROUPS and word not in env.INSTRUCTIONS:
            known = [*env.INSTRUCTIONS, *env.GROUPS]
            raise UserError(f"no task {word!r} in {name}: {nearest(word, known)}")
        chosen.update(dict.fromkeys(env.GROUPS.get(word, (word,))))
    if not chosen:
        raise UserError(
            f"no task named, expected one or more of {name}'s, e.g. {next(iter(env.INSTRUCTIONS))}"
        )
    return tuple(chosen)
