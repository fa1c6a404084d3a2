"""What goes over the wire: msgpack with NumPy arrays, byte for byte as openpi-client 0.1.2 writes and reads it.

An array is a map with binary keys: ``__ndarray__`` (true), ``data`` (its bytes in C order), ``dtype`` (such as ``<f4``)
and ``shape``; a NumPy scalar has ``__npgeneric__`` in place of the first. Python's numbers, texts, bytes, lists and
maps are msgpack's own. Nothing in it can run code.

What peers send is read with limits: an array's bytes must be as many as its shape and dtype say, before it is made.
"""

import math
from typing import Any

import msgpack
import numpy as np

KINDS = "biuf"  # of dtypes: bool, integers, floats
DIMENSIONS = 8


class WireError(ValueError):
    """Bytes that are no message; the text says what was found."""


def pack(message: Any) -> bytes:
    """Returns a message as bytes.

    Raises:
      TypeError: it contains something else than numbers, texts, bytes, lists, maps and arrays of numbers.
    """
    return msgpack.packb(message, default=_pack)


def _pack(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in KINDS:
        raise TypeError(f"{type(value).__name__} cannot be sent")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def unpack(data: bytes) -> Any:
    """Returns the message of a peer's bytes. Its arrays are views of them, and read-only.

    Raises:
      WireError: they are no such message.
    """
    try:
        return msgpack.unpackb(data, object_hook=_unpack)
    except WireError:
        raise
    except Exception as error:  # msgpack has no common class for them
        raise WireError(f"{type(error).__name__}: {str(error)[:120]}") from None


def _unpack(found: dict[Any, Any]) -> Any:
    array = b"__ndarray__" in found
    if not array and b"__npgeneric__" not in found:
        return found
    data, dtype = found.get(b"data"), _dtype(found.get(b"dtype"))
    if not array:
        if isinstance(data, bool | int | float):
            try:
                return dtype.type(data)
            except (OverflowError, ValueError):
                pass
        raise WireError(f"a scalar of {dtype} with data that is none")
    shape = found.get(b"shape")
    if (
        not isinstance(shape, list)
        or len(shape) > DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**31 for n in shape)
    ):
        raise WireError(f"an array whose shape is {str(shape)[:60]}")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        size = len(data) if isinstance(data, bytes) else 0
        raise WireError(f"an array {dtype}{shape} with {size} bytes of data")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(text: Any) -> np.dtype[Any]:
    if isinstance(text, str) and len(text) <= 4:
        try:
            dtype = np.dtype(text)
        except (TypeError, ValueError):
            pass
        else:
            if dtype.kind in KINDS and 1 <= dtype.itemsize <= 8:
                return dtype
    raise WireError(f"an array of dtype {str(text)[:20]!r}")
