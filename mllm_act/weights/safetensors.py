"""The safetensors format, read and written one tensor at a time.

A file is 8 bytes with the header's length, a JSON header (name -> dtype, shape, offsets), then the tensors' bytes. The
``safetensors`` package needs all tensors in memory to write a file; here a model is written that does not fit.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mllm_act.errors import UserError
from mllm_act.weights.tensors import Tensor

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name; reading one maps only its part of the file into memory.

    Raises:
      UserError: if the file is cut off or not in this format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= size - 8:
            raise UserError(
                f"{path}: expected a safetensors file, found {size:,} bytes that are not one or are cut off; "
                "download it again"
            )
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            entries = {name: _entry(header[name]) for name in header if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: expected a safetensors header, found one that cannot be read ({error}); download it again"
            ) from error
    end = 8 + length + max((stop for _, _, _, stop in entries.values()), default=0)
    if size != end:
        raise UserError(
            f"{path}: expected {end:,} bytes by its header, found {size:,}; download it again"
        )
    return {
        name: _tensor(path, 8 + length + start, shape, dtype)
        for name, (dtype, shape, start, _) in entries.items()
    }


def _entry(entry: dict[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry}: offsets do not fit the shape")
    return dtype, shape, start, stop


def _tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    def read() -> np.ndarray:
        if math.prod(shape) == 0:  # an empty range cannot be mapped
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", offset, shape)

    return Tensor(shape, dtype, read)


def write(
    path: Path, tensors: Mapping[str, Tensor], parts: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a file.

    Args:
      path: the file.
      tensors: name, shape and dtype of every tensor in the order of ``parts``; ``read`` is not called.
      parts: (name, values) in that order. A tensor may come in several consecutive parts along its first axis.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.bytes]
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span
        }  # fmt: skip
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * ((-8 - len(text)) % 64)  # aligned, so that arrays can be mapped
    order = iter(tensors)
    current, left = "", 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, values in parts:
            if not left:
                current = next(order)
                left = tensors[current].bytes
            assert name == current and values.dtype == tensors[name].dtype, (name, current)
            left -= file.write(np.ascontiguousarray(values).view(np.uint8).data)
            del values  # before the next part is read
    assert not left and next(order, None) is None, "a tensor was not written"
