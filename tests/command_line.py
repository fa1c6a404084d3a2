"""Training programs under a command line, in the process of the test."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from absl import flags
from ml_collections.config_dict import ConfigDict

from mllm_act.config import run_with_config


def start(
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[ConfigDict, Path], None],
    default: str,
    *arguments: str,
) -> int:
    """Runs a program's ``main`` as ``run_with_config`` does; returns its exit status."""
    for name in list(flags.FLAGS):  # of an earlier run in this process
        if name == "workdir" or name.partition(".")[0] == "config":
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    try:
        run_with_config(main, default)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0
