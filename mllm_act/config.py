"""The command line of training programs: ``--config=FILE.py:variant``, ``--config.a.b=value``, ``--workdir=DIR``.

A config file defines ``get_config(variant: str) -> ConfigDict`` (ml_collections). A relative path is looked up from the
current directory first. ``configs/...`` then names the files that come with mllm_act, so the same command works in a
checkout and wherever the package is installed. Overrides are checked before anything else runs: a mistyped key ends
the program with the nearest key that exists.
"""

import contextlib
import functools
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_dict import ConfigDict
from ml_collections.config_flags import config_path

from mllm_act.distributed.exchange import group
from mllm_act.distributed.resolve import FLAGS
from mllm_act.distributed.start import start
from mllm_act.errors import UserError, nearest, run
from mllm_act.files import locked, user_path

PACKAGE = Path(__file__).parent
# What the value of a key may be, by the key's type.
EXPECTED = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "names such as ('a', 'b')",
}  # fmt: skip
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
    name, variant = _split_variant(path_and_variant)
    path = _find(name)
    spec = importlib.util.spec_from_file_location(path.stem + "_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={name}: expected a Python file (.py), found {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={name}: expected a function get_config(variant), found none")
    return module.get_config(variant) if variant else module.get_config()


def _split_variant(text: str) -> tuple[str, str]:
    """Splits ``file.py:variant`` at the colon after ``.py``: folders may have colons in their names."""
    if text.endswith(".py"):
        return text, ""
    start, ending, variant = text.rpartition(".py:")
    name, _, rest = text.partition(":")
    return (start + ".py", variant) if ending else (name, rest)


def _find(name: str) -> Path:
    """Returns the config file of that name: relative to the current directory, else one of the shipped ones."""
    path = user_path(name, "--config")
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.parts[:1] == ("configs",) and (shipped / Path(*path.parts[1:])).is_file():
        return shipped / Path(*path.parts[1:])
    files = (
        file for folder in ("policy", "tokenizer", "rl") for file in (shipped / folder).glob("*.py")
    )
    known = [f"configs/{file.relative_to(shipped).as_posix()}" for file in files]
    raise UserError(
        f"--config={name}: expected a config file, found none in {Path.cwd()} and none of that name among those that "
        f"come with mllm_act; {nearest(name, known)}"
    )


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every key that has a value, as a dotted path, with the value; None where a placeholder is open."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_overrides(argv: Sequence[str], config: ConfigDict) -> None:
    """Raises a UserError with the nearest key if an override names a key that the config lacks, or a group of keys."""
    known = [key for key, _ in leaves(config)]
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match is None or match[1] in known:
            continue
        flag, key = argument.partition("=")[0], match[1]
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            raise UserError(
                f"{flag}: expected a key with a value, found a group of keys; set one of them, such as "
                f"--config.{inside[0]}=..."
            )
        raise UserError(f"{flag}: the config has no key {key!r}; {nearest(key, known)}")


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
        argv = start(argv)
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
            folder = user_path(workdir.value, "--workdir")
            held = locked(folder, "--workdir") if group.first else contextlib.nullcontext()
            with held:
                facts = {
                    "--workdir": str(folder),
                    **dict(leaves(config, "config.")),
                }
                group.expect_same("config", facts)
                main(config, folder)

        app.run(parsed, argv, flags_parser=lambda argv: _parse_flags(argv, config))

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


def _parse_flags(argv: Sequence[str], config: ConfigDict) -> list[str]:
    """Parses the flags, and returns the other arguments after the program's name.

    Raises:
      UserError: if there is no such flag, or a value is not of its key's type.
    """
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        match = re.match(r"flag --config\.([^=]*)=(.*?): ", str(error), re.DOTALL)
        if match is None:
            raise UserError(" ".join(str(error).split())) from error
        key, value = match.groups()
        expected = EXPECTED[config_path.get_type(key, config)]
        raise UserError(f"--config.{key}: expected {expected}, found {value!r}") from error


def _expand_home(config: ConfigDict) -> None:
    """Expands a leading ``~`` in values: shells do not do so after ``--config.data.directory=``.

    Raises:
      UserError: there is no such user, or a value is an address where only folders can be read.
    """
    for key, value in list(leaves(config)):
        address = (
            isinstance(value, str) and "://" in value and key.endswith(("tokenizer", "pretrained"))
        )
        if isinstance(value, str) and (value.startswith("~") or address):
            *parents, name = key.split(".")
            node = functools.reduce(getattr, parents, config)
            node[name] = str(user_path(value, f"--config.{key}"))


def _help(description: str, default: str, file: str, config: ConfigDict) -> str:
    """Returns the text of ``--help``: what the program does, its flags, and every key with its value."""
    lines = [
        f"  --config.{key}={value}"
        if value is not None
        else f"  --config.{key}    (open; {EXPECTED[config_path.get_type(key, config)]})"
        for key, value in leaves(config)
    ]
    return "\n".join([
        description,
        "flags:",
        f"  --config=FILE.py:variant    (default: {default})",
        "                              a config is Python code that is run: do not use a stranger's",
        "  --workdir=DIR               folder for checkpoints, metrics and reports; required",
        *(f"  --{f'{name}=...':<26}{meaning}" for name, meaning in FLAGS.items()),
        f"keys of {file}, with their values:",
        *lines,
    ])  # fmt: skip


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))
