"""The command line of training programs: ``--config=FILE.py:variant``, ``--config.a.b=value``, ``--workdir=DIR``.

A config file defines ``get_config(variant: str) -> ConfigDict`` (ml_collections). A relative path is looked up from the
current directory first. ``configs/...`` then names the files that come with mllm_act, so the same command works in a
checkout and wherever the package is installed. Overrides are checked before anything else runs: a mistyped key ends
the program with the nearest key that exists.
"""

import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_dict import ConfigDict

from mllm_act.errors import UserError, nearest, run

PACKAGE = Path(__file__).parent
HELP = {"--help", "-help", "--helpfull", "-h"}


def shipped_configs() -> Path:
    """Returns the folder of the configs that come with mllm_act: in the package, or at the root of a checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def load_config(path_and_variant: str) -> ConfigDict:
    """Runs a config file's ``get_config``.

    Args:
      path_and_variant: ``file.py`` or ``file.py:variant``.

    Raises:
      UserError: if the file does not exist or defines no ``get_config``.
    """
    name, _, variant = path_and_variant.partition(":")
    path = _find(name)
    spec = importlib.util.spec_from_file_location(path.stem + "_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={name}: expected a Python file (.py), found {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={name}: expected a function get_config(variant), found none")
    return module.get_config(variant) if variant else module.get_config()


def _find(name: str) -> Path:
    """Returns the config file of that name: relative to the current directory, else one of the shipped ones."""
    path = expand_user("--config", name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.parts[:1] == ("configs",) and (shipped / Path(*path.parts[1:])).is_file():
        return shipped / Path(*path.parts[1:])
    known = [f"configs/{file.relative_to(shipped).as_posix()}" for file in shipped.glob("*/*.py")]
    raise UserError(
        f"--config={name}: expected a config file, found none in {Path.cwd()} and none of that name among those that "
        f"come with mllm_act; {nearest(name, known)}"
    )


def expand_user(flag: str, path: str) -> Path:
    """Returns a path with its leading ``~`` or ``~user`` expanded.

    Raises:
      UserError: naming the flag, if there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{flag}={path}: expected the home directory of a user after ~, found none ({error}); give the path in full"
        ) from error


def keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yields every key of a config as a dotted path, inner nodes included."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{name}.")


def check_overrides(argv: Sequence[str], config: ConfigDict) -> None:
    """Raises a UserError with the nearest key if an override names a key that the config lacks."""
    known = set(keys(config))
    for argument in argv:
        name, _, _ = argument.lstrip("-").partition("=")
        key = name.removeprefix("config.")
        if argument.startswith("-") and key != name and key not in known:
            raise UserError(f"--{name}: the config has no key {key!r}; {nearest(key, known)}")


def run_with_config(main: Callable[[ConfigDict, Path], None], default: str) -> None:
    """Runs ``main(config, workdir)`` of a training program under its command line.

    Args:
      main: the program.
      default: the config file and variant used when ``--config`` is not given.
    """

    def program() -> None:
        file, argv = _pop_flag(sys.argv, "config", default)
        config = load_config(file)
        if HELP.intersection(argv[1:]):
            print(_help(sys.modules["__main__"].__doc__ or "", default, file, config))
            return
        check_overrides(argv[1:], config)
        try:
            config_flags.DEFINE_config_dict("config", config, lock_config=True, sys_argv=argv)
        except flags.Error as error:
            raise UserError(f"--config={file}: {error}") from error
        workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)

        def parsed(argv: list[str]) -> None:
            if argv[1:]:
                raise UserError(
                    f"expected flags only (--config=..., --config.key=value, --workdir=...), found {argv[1]!r}"
                )
            _expand_home(config)
            main(config, expand_user("--workdir", workdir.value))

        app.run(parsed, argv)

    run(program)


def _pop_flag(argv: Sequence[str], name: str, default: str) -> tuple[str, list[str]]:
    """Returns the last value of ``--name=value`` or ``--name value``, and the arguments without it."""
    value, rest = default, []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if flag not in (f"--{name}", f"-{name}"):
            rest.append(argument)
        else:
            value = text if equals else next(arguments, "")
    if not value:
        raise UserError(f"--{name}: expected a value, found none; for example --{name}={default}")
    return value, rest


def _expand_home(config: ConfigDict) -> None:
    """Expands a leading ``~`` in values: shells do not do so after ``--config.data.directory=``."""
    for key in keys(config):
        value = _value(config, key)
        if isinstance(value, str) and value.startswith("~"):
            parent, _, name = key.rpartition(".")
            node = _value(config, parent) if parent else config
            node[name] = str(expand_user(f"--config.{key}", value))


def _help(description: str, default: str, file: str, config: ConfigDict) -> str:
    """Returns the text of ``--help``: what the program does, its flags, and every key with its value."""
    leaves = [key for key in keys(config) if not isinstance(_value(config, key), ConfigDict)]
    lines = [f"  --config.{key}={_value(config, key)}" for key in leaves]
    return "\n".join([
        description,
        "flags:",
        f"  --config=FILE.py:variant    (default: {default})",
        "  --workdir=DIR               folder for checkpoints, metrics and reports; required",
        f"keys of {file}, with their values:",
        *lines,
    ])  # fmt: skip


def _value(config: ConfigDict, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))
