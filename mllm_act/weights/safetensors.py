"""The safetensors format, read and written one tensor at a time.

A file is 8 bytes with the header's length, a JSON header (name -> dtype, shape, offsets), then the tensors' bytes. The
``safetensors`` package reads the header and checks that offsets fit the shapes and cover the file without gaps or
overlaps. Values are mapped here, because the package copies them: a layer of a stacked array, or one device's part, is
read alone. The package needs all tensors in memory to write a file; here a model is written that does not fit.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mllm_act.errors import UserError
from mllm_act.weights.tensors import Tensor, not_installed, parsing

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 16_000_000  # bytes; LLaVA's has 60,000


def read(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name; reading one maps only its part of the file into memory.

    Raises:
      UserError: if the file is cut off or not in this format, or a tensor has a dtype that is not in ``DTYPES``.
    """
    with parsing(path, "a safetensors file"):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{size:,} bytes for a header of {length:,}")
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise not_installed("safetensors", str(path)) from error
        tensors, offset = {}, 8 + length
        with safe_open(path, "numpy") as opened:
            for name in (
                opened.offset_keys()
            ):  # one after the other, without gaps: the package has checked it
                entry = opened.get_slice(name)
                tensors[name] = _tensor(path, offset, name, entry.get_shape(), entry.get_dtype())
                offset += tensors[name].bytes
        return tensors


def _tensor(path: Path, offset: int, name: str, shape: list[int], dtype: str) -> Tensor:
    if dtype not in DTYPES:
        raise UserError(
            f"{path}: expected tensors of dtype {', '.join(DTYPES)}, found {name} of {dtype}; save the weights "
            "unquantized, in bfloat16 or float32"
        )

    def read() -> np.ndarray:
        if 0 in shape:  # an empty range cannot be mapped
            return np.zeros(shape, DTYPES[dtype])
        return np.memmap(path, DTYPES[dtype], "r", offset, tuple(shape))

    return Tensor(tuple(shape), DTYPES[dtype], read)


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
