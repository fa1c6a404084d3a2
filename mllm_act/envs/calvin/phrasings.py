"""CALVIN's 389 training sentences, from the user's checkout of github.com/mees/calvin."""

import functools
from pathlib import Path

import yaml

from mllm_act.envs.calvin.client import FIX, checkout
from mllm_act.envs.calvin.tasks import TASKS
from mllm_act.errors import UserError

FILE = Path("calvin_models/conf/annotations/new_playtable.yaml")  # beside the submodule calvin_env


@functools.cache
def phrasings() -> dict[str, list[str]]:
    """Returns the sentences of each task.

    Raises:
      UserError: no checkout, or the file is missing or is another.
    """
    path = checkout().parent / FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        sentences = {task: [str(sentence) for sentence in found[task]] for task in TASKS}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected CALVIN's training sentences, found {type(error).__name__} ({error}); {FIX}"
        ) from None
    if empty := [task for task, listed in sentences.items() if not listed]:
        raise UserError(f"{path}: expected sentences of each task, found none of {empty[0]}; {FIX}")
    return sentences
