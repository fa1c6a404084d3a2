"""How a dataset's features become cameras, actions, proprioception and instructions: one small file per dataset.

    # my_robot.py
    from data_pipelines.mapping import DataMapping, Part

    MAPPING = DataMapping(
        name="my_robot",
        cameras={"front": "observation/image", "wrist": "observation/wrist_image"},
        action=(
            Part("action", ("dx", "dy", "dz"), "m"),
            Part("action", ("droll", "dpitch", "dyaw"), "rad", start=3),
            Part("action", ("gripper",), start=6),
        ),
        proprio=(Part("observation/state", ("x", "y", "z", "gripper")),),
        instruction=("language_instruction",),
        rate=5.0,
    )

Keys are paths in ``features.json`` inside a step, or inside the episode where a step has none of that name.
``python -m data_pipelines.check DIR`` prints them and writes a draft. Mappings of public datasets are in
configs/robots/. A mapping is code that is executed: do not use a stranger's.
"""

import ast
import dataclasses
import hashlib
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm_act.config import shipped_configs
from mllm_act.errors import UserError, nearest
from mllm_act.files import user_path


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive numbers of one feature that become part of the action, or of the proprioception.

    Attributes:
      key: of the feature, a number or a vector of any numeric dtype in each step.
      names: what to call the numbers; as many are taken.
      unit: of all of them; "" for none.
      scale: units per stored number, to report errors in: 0.01 for centimetres where the unit is m.
      start: the index of the first number in the feature.
    """

    key: str
    names: tuple[str, ...]
    unit: str = ""
    scale: float = 1.0
    start: int = 0


@dataclasses.dataclass(frozen=True)
class DataMapping:
    """What training takes from each step of a dataset, and how it is called.

    Attributes:
      name: of the robot; tokenizers and checkpoints of another name are refused.
      cameras: our names to the keys of JPEG or PNG images, or of uint8[H, W, 3] tensors.
      action: the parts of the action in order; together A numbers.
      proprio: the parts of the proprioception; () for none.
      instruction: keys of texts. Of several, training draws one that is not empty for each episode and epoch, and
        evaluation takes the first; () for none.
      task: the key of a text that groups episodes in reports; "" for none.
      rate: of control, in steps per second; None where it is unknown.
      choices: the names of discrete actions; the action is then one number, the index of a name.
      held_out: the share of episodes that become ``val`` where the dataset has no such split; which ones depends on
        their number alone. At least one, unless there is only one: it is then trained on and validated on.
      step: optional function of an episode, ``{key: tensor [L, ...]}`` with all of its numeric features, that returns
        those to replace or add; for example ``{"action": next_state - state}``. It is compiled by TensorFlow.
    """

    name: str
    cameras: dict[str, str]
    action: tuple[Part, ...]
    proprio: tuple[Part, ...] = ()
    instruction: tuple[str, ...] = ()
    task: str = ""
    rate: float | None = None
    choices: tuple[str, ...] = ()
    held_out: float = 0.05
    step: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    digest: str = ""  # of the file

    def metadata(self) -> dict[str, Any]:
        """Returns the mapping as plain JSON types, as a checkpoint keeps it; acting needs no file."""
        values = dataclasses.asdict(dataclasses.replace(self, step=None))
        values["step"] = self.step is not None
        numbers = [(name, part) for part in self.action for name in part.names]
        return {
            "name": self.name,
            "action_names": [name for name, _ in numbers],
            "action_units": [part.unit for _, part in numbers],
            "action_scale": [part.scale for _, part in numbers],
            "choices": list(self.choices),
            "mapping": values,
        }


def load_mapping(name: str, key: str = "--mapping") -> DataMapping:
    """Loads ``MAPPING`` from a file, or one that is shipped by its name, such as ``bridge``.

    Args:
      name: a path that ends in .py, or the name of a file in configs/robots.
      key: that named it, for errors.

    Raises:
      UserError: there is no such file, it fails, or its mapping has errors; all of them are listed.
    """
    shipped = shipped_configs() / "robots"
    path = user_path(name, key) if name.endswith(".py") else shipped / f"{name}.py"
    if not path.is_file():
        known = sorted(file.stem for file in shipped.glob("*.py"))
        raise UserError(
            f"{key}={name}: expected a file, or one of {', '.join(known)}, found neither; {nearest(name, known)}"
        )
    problems = _twice(path)
    try:
        mapping = runpy.run_path(str(path)).get("MAPPING")
    except Exception as error:
        raise UserError(
            f"{path}: expected a mapping, found {type(error).__name__}: {error}"
        ) from error
    if not isinstance(mapping, DataMapping):
        raise UserError(
            f"{path}: MAPPING: expected a DataMapping, found {type(mapping).__name__}; see data_pipelines/mapping.py"
        )
    problems += _problems(mapping)
    if problems:
        raise UserError(f"{path}: expected a mapping without errors, found: {'; '.join(problems)}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return dataclasses.replace(mapping, digest=digest)


def _twice(path: Path) -> list[str]:
    """Returns the names that a dictionary of the file gives twice: Python would keep the last in silence."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: expected Python, found {error}; fix it") from None
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            names = [str(key.value) for key in node.keys if isinstance(key, ast.Constant)]
            twice = {name for name in names if names.count(name) > 1}
            problems += [f"line {node.lineno}: {name!r} is given twice" for name in sorted(twice)]
    return problems


def _wrong_types(mapping: DataMapping) -> list[str]:
    """Returns the values that are of another type than they must be: often a comma is missing after the only one."""

    def texts(value: Any) -> bool:
        return isinstance(value, tuple) and all(isinstance(text, str) for text in value)

    def parts(value: Any) -> bool:
        return isinstance(value, tuple) and all(isinstance(part, Part) for part in value)

    def number(value: Any) -> bool:
        return type(value) in (int, float)

    cameras: Any = mapping.cameras
    checks: list[tuple[str, str, Any, bool]] = [
        ("name", "a text", mapping.name, isinstance(mapping.name, str)),
        (
            "cameras", "a dictionary of texts", cameras,
            isinstance(cameras, dict) and texts((*cameras, *cameras.values())),
        ),
        *((f, "a tuple of Parts", getattr(mapping, f), parts(getattr(mapping, f))) for f in ("action", "proprio")),
        *((f, "a tuple of texts", getattr(mapping, f), texts(getattr(mapping, f))) for f in ("instruction", "choices")),
        ("task", "a text", mapping.task, isinstance(mapping.task, str)),
        ("rate", "a number or None", mapping.rate, mapping.rate is None or number(mapping.rate)),
        ("held_out", "a number", mapping.held_out, number(mapping.held_out)),
        ("step", "a function or None", mapping.step, mapping.step is None or callable(mapping.step)),
    ]  # fmt: skip
    for field in ("action", "proprio"):
        for part in getattr(mapping, field) if parts(getattr(mapping, field)) else ():
            where = f"{field} {part.key}"
            checks += [
                (f"{where}: key", "a text", part.key, isinstance(part.key, str)),
                (f"{where}: names", "a tuple of texts", part.names, texts(part.names)),
                (f"{where}: unit", "a text", part.unit, isinstance(part.unit, str)),
                (f"{where}: scale", "a number", part.scale, number(part.scale)),
                (f"{where}: start", "an integer", part.start, type(part.start) is int),
            ]
    return [
        f"{where}: expected {kind}, found {value!r:.100}"
        for where, kind, value, ok in checks
        if not ok
    ]


def _problems(mapping: DataMapping) -> list[str]:
    """Returns what is wrong with a mapping whatever the dataset, one line each."""
    problems = _wrong_types(mapping)
    if problems:
        return problems
    if not mapping.name:
        problems.append("name: expected a name, found none")
    if not mapping.cameras:
        problems.append("cameras: expected at least one, found none")
    if not mapping.action:
        problems.append("action: expected at least one Part, found none")
    for field in ("action", "proprio"):
        names = [name for part in getattr(mapping, field) for name in part.names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            problems.append(f"{field}: expected different names, found {', '.join(twice)} twice")
        for part in getattr(mapping, field):
            if not part.names:
                problems.append(f"{field} {part.key}: names: expected at least one, found none")
            if not 0 < part.scale < math.inf:
                problems.append(
                    f"{field} {part.key}: scale: expected a number above 0, found {part.scale!r}"
                )
            if part.start < 0:
                problems.append(
                    f"{field} {part.key}: start: expected 0 or more, found {part.start}"
                )
    if not 0 <= mapping.held_out < 1:
        problems.append(f"held_out: expected a share from 0 to below 1, found {mapping.held_out!r}")
    if mapping.rate is not None and not 0 < mapping.rate < math.inf:
        problems.append(f"rate: expected steps per second, found {mapping.rate!r}")
    if mapping.choices and sum(len(part.names) for part in mapping.action) != 1:
        problems.append("choices: expected an action of one number, the index of a choice")
    return problems
