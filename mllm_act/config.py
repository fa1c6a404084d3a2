"""The command line every program shares: ``--config=FILE.py:variant``, ``--config.a.b=value``, ``--workdir=DIR``.

A config file defines ``get_config(variant: str) -> ConfigDict`` (ml_collections). Its keys are checked
before anything else runs, so a mistyped override ends with the nearest key that exists.
"""

import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_dict import ConfigDict

from mllm_act.errors import UserError, nearest, run


def load(path_and_variant: str) -> ConfigDict:
    """Runs a config file's ``get_config``.

    Args:
      path_and_variant: ``file.py`` or ``file.py:variant``.

    Raises:
      UserError: if the file does not exist or defines no ``get_config``.
    """
    path, _, variant = path_and_variant.partition(":")
    if not Path(path).is_file():
        raise UserError(
            f"--config={path_and_variant}: no such file: {path}; see configs/ for the files there are"
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(
            f"--config={path}: expected a function get_config(variant) in it, found none"
        )
    return module.get_config(variant) if variant else module.get_config()


def keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yields every key of a config as a dotted path, inner nodes too."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{name}.")


def check_overrides(argv: list[str], config: ConfigDict) -> None:
    """Raises a UserError with the nearest key if an override names a key that the config lacks."""
    known = set(keys(config))
    for argument in argv:
        name, _, _ = argument.lstrip("-").partition("=")
        if (
            argument.startswith("-")
            and name.startswith("config.")
            and name.removeprefix("config.") not in known
        ):
            key = name.removeprefix("config.")
            raise UserError(f"--{name}: the config has no key {key!r}; {nearest(key, known)}")


def _argument(argv: list[str], name: str, default: str) -> str:
    """Returns the value of ``--name=value`` or ``--name value``."""
    for i, argument in enumerate(argv):
        if argument.startswith((f"--{name}=", f"-{name}=")):
            return argument.partition("=")[2]
        if argument in (f"--{name}", f"-{name}") and i + 1 < len(argv):
            return argv[i + 1]
    return default


def run_with_config(main: Callable[[ConfigDict, Path], None], default: str) -> None:
    """Runs ``main(config, workdir)`` of a training program under its command line.

    Args:
      main: the program.
      default: the config file and variant used when ``--config`` is not given.
    """

    def program() -> None:
        file = _argument(sys.argv, "config", default)
        config = load(file)
        if any(argument.lstrip("-").startswith("help") for argument in sys.argv[1:]):
            print(_help(sys.modules["__main__"].__doc__ or "", file, config))
            return
        check_overrides(sys.argv[1:], config)
        flag = config_flags.DEFINE_config_file(  # reads the overrides of the default at once
            "config",
            default,
            "Config file and variant; --config.a.b=value overrides one key.",
            lock_config=True,
        )
        workdir = flags.DEFINE_string(
            "workdir", None, "Folder for checkpoints, metrics and reports.", required=True
        )
        app.run(lambda _: main(flag.value, Path(workdir.value)))

    run(program)


def _help(description: str, file: str, config: ConfigDict) -> str:
    """Returns what ``--help`` prints: what the program does, its flags, every key and its value."""
    leaves = [key for key in keys(config) if not isinstance(_value(config, key), ConfigDict)]
    lines = [f"  --config.{key}={_value(config, key)}" for key in leaves]
    return "\n".join([
        description,
        "flags:",
        f"  --config=FILE.py:variant    (default: {file})",
        "  --workdir=DIR               folder for checkpoints, metrics and reports; required",
        f"keys of {file}, with their values:",
        *lines,
    ])  # fmt: skip


def _value(config: ConfigDict, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))
