"""Imports TensorFlow for reading data: without log lines, and on the CPU only, because JAX owns the accelerators."""

import atexit
import os
import weakref
from typing import Any

os.environ.setdefault(
    "TF_USE_LEGACY_KERAS", "1"
)  # Keras is not needed: loaded at first use, not at import
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # JAX sets 1, if it was imported before
os.environ.setdefault(
    "TF_ENABLE_ONEDNN_OPTS", "0"
)  # not needed here, and it prints a line at import

import tensorflow as tf  # noqa: E402

for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)

# For the functions of tf.data's maps that have no Python conditions on tensors: rewriting their source, and that of all
# they call, would take seconds at every start.
as_written = tf.autograph.experimental.do_not_convert

# What reads through tf.data with functions in Python. At Python's end, tf.data's threads would wait for it for ever,
# and it for them.
_open: weakref.WeakSet[Any] = weakref.WeakSet()


def close_at_exit(reader: Any) -> None:
    """Calls ``reader.close()`` before Python ends, if the reader is still there."""
    _open.add(reader)


@atexit.register
def _close_all() -> None:
    for reader in list(_open):
        reader.close()


__all__ = ["as_written", "close_at_exit", "tf"]
