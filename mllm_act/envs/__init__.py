"""Environments by name. A new one is a module as `envs.base` describes, and a line in `ENVS`.

Its module is imported when the environment is first used, so that a simulator that is not installed does no harm.
Environments import neither JAX nor TensorFlow.
"""

import importlib
from collections.abc import Callable
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
    "task_of",
]

ENVS: dict[str, str] = {  # name -> import path of the module
    "metaworld": "mllm_act.envs.metaworld.metaworld",
    "babyai": "mllm_act.envs.babyai.babyai",
    "language_rearrangement": "mllm_act.envs.language_rearrangement.language_rearrangement",
    "language_rearrangement_112": "mllm_act.envs.language_rearrangement.small",
    "fetch_pick": "mllm_act.envs.fetch_pick.fetch_pick",
    "calvin": "mllm_act.envs.calvin.calvin",
    "calvin_static": "mllm_act.envs.calvin.static",
}


def module(name: str) -> ModuleType:
    """Returns the environment's module.

    Raises:
      UserError: an unknown name; the error suggests the nearest.
    """
    if name not in ENVS:
        raise UserError(f"unknown environment {name!r}: {nearest(name, ENVS)}")
    return importlib.import_module(ENVS[name])


def make(name: str, *, render: bool = True) -> Env:
    """Returns one simulator. With ``render=False`` its observations have no images, and steps are fast."""
    env: Env = module(name).make(render=render)
    return env


def spec(name: str) -> EnvSpec:
    """Returns the `EnvSpec` without starting a simulator."""
    env_spec: EnvSpec = module(name).SPEC
    return env_spec


def instructions(name: str) -> dict[str, str]:
    """Returns task name -> instruction, in a fixed order.

    Where every episode has its own instruction (see `EnvObservation`), this is its pattern.
    """
    sentences: dict[str, str] = module(name).INSTRUCTIONS
    return sentences


def splits(name: str) -> dict[str, range]:
    """Returns the configurations of each split, the same for every task."""
    configurations: dict[str, range] = module(name).SPLITS
    return configurations


def task_of(name: str, job: Job) -> str:
    """Returns the task under which the success of an episode is counted."""
    of: Callable[[Job], str] = getattr(module(name), "task_of", lambda job: job.task)
    return of(job)


def select_tasks(name: str, tasks: str) -> tuple[str, ...]:
    """Expands comma-separated task and group names, such as ``'reach-v3,ml5'``, into task names without duplicates.

    Raises:
      UserError: a name that is neither a task nor a group; the error suggests the nearest.
    """
    env = module(name)
    selected: dict[str, None] = {}
    for word in filter(None, (part.strip() for part in tasks.split(","))):
        if word not in env.GROUPS and word not in env.INSTRUCTIONS:
            known = [*env.INSTRUCTIONS, *env.GROUPS]
            raise UserError(f"no task {word!r} in {name}: {nearest(word, known)}")
        selected.update(dict.fromkeys(env.GROUPS.get(word, (word,))))
    if not selected:
        raise UserError(
            f"no task named, expected one or more of {name}, e.g. {next(iter(env.INSTRUCTIONS))}"
        )
    return tuple(selected)
