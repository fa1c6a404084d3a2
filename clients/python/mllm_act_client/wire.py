"""msgpack with NumPy arrays, as openpi's clients and servers write it."""

import msgpack
import numpy as np


def _pack(value):
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _unpack(found):
    if b"__ndarray__" in found:
        array = np.frombuffer(found[b"data"], np.dtype(found[b"dtype"]))
        return array.reshape(found[b"shape"])
    if b"__npgeneric__" in found:
        return np.dtype(found[b"dtype"]).type(found[b"data"])
    return found


def pack(message):
    """Returns a message (numbers, texts, bytes, lists, maps, arrays) as bytes."""
    return msgpack.packb(message, default=_pack)


def unpack(data):
    """Returns the message of the bytes; its arrays are read-only."""
    return msgpack.unpackb(data, object_hook=_unpack)
