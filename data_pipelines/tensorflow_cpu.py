"""Imports TensorFlow for reading data: without log lines, and on the CPU only, because JAX owns the accelerators."""

import os

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

__all__ = ["as_written", "tf"]
