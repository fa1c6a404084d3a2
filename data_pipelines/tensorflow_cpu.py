"""Imports TensorFlow for reading data: without log lines, and on the CPU only, because JAX owns the accelerators."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # JAX sets 1, if it was imported before
os.environ.setdefault(
    "TF_ENABLE_ONEDNN_OPTS", "0"
)  # not needed here, and it prints a line at import

import tensorflow as tf  # noqa: E402

for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)

__all__ = ["tf"]
