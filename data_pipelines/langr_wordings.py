"""LLaRP's own training wordings, from its ``instructions.yaml``, as wordings of our templates."""

from pathlib import Path
from typing import Any

import yaml

from mllm_act.envs.language_rearrangement.instructions import TEMPLATES
from mllm_act.errors import UserError

_ONE = {
    "target_object_name": "object",
    "source_receptacle_name": "from",
    "target_receptacle_name": "to",
}
_TWO = {"object1": "object", "object2": "object2", "targ_recep": "to"}
# Our template -> the id of LLaRP's, of its variant, and its names of what we call object, from and to.
SOURCES: dict[str, tuple[str, str, dict[str, str]]] = {
    "move-from-to": ("42f1b012", "", _ONE),
    "move-to": ("f0917e29", "", _ONE),
    "take-away": ("9a1dd6ee", "", _ONE | {"target_receptacle_name": "from"}),
    "move-two": ("fd8dd56c", "", _TWO),
    "swap": (
        "6e7f4383",
        "",
        {"object1": "object", "object2": "object2", "receptacle1": "from", "receptacle2": "from2"},
    ),
    "close-fridge": ("6e3da8a1", "", {}),
    "open-fridge": ("68216d8c", "", {}),
    "go-to": ("311525c5", "", _ONE),
    "find": ("2f2d797d", "", _ONE),
    "lay-a-place": ("f0917e29", "688ee521", _ONE),
    "set-the-table": ("fd8dd56c", "b369767a", _TWO),
}
FIX = "get the file again from github.com/apple/ml-llarp, llarp/dataset/configs/instructions.yaml"


def read_wordings(path: Path) -> dict[str, list[str]]:
    """Returns template -> its wordings, with names in braces as in ``TEMPLATES`` and a full stop where one is missing.

    Raises:
      UserError: the file cannot be read, or lacks a template.
    """
    try:
        # BaseLoader: ids such as 68216d8c and 8e100 stay text.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)[
            "instructions"
        ]
        return {name: _wordings(name, content) for name in TEMPLATES}
    except OSError as error:
        raise UserError(
            f"--instructions={path}: expected LLaRP's instructions.yaml, found {error.strerror}; {FIX}"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"--instructions={path}: expected LLaRP's instructions.yaml, found something else ({text}); {FIX}"
        ) from None


def _wordings(name: str, content: dict[str, Any]) -> list[str]:
    key, variant, names = SOURCES[name]
    found = content[key]["semantics"][variant] if variant else content[key]
    result = []
    for text in found["lang"]["train"]:
        if "{" in text:
            raise ValueError(f"a brace in {text!r}")
        for theirs, ours in names.items():
            text = text.replace(f"`{theirs}`", f"{{{ours}}}")
        if "`" in text:
            raise ValueError(f"another name in {text!r}")
        result.append(text if text.endswith((".", "?")) else f"{text}.")
    return result
