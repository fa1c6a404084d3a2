"""Finds the records of a file, checks that it is complete, and reads any of them.

A record is ``uint64 length, uint32 crc(length), payload, uint32 crc(payload)``, little-endian, where ``crc`` is a
rotated CRC-32C (TensorFlow, ``lib/io/record_writer.h``). The lengths show whether a file is truncated, and the payload
checksums together identify its content. 16 bytes are read per record. TensorFlow verifies the payloads when it reads
them. Files of array_record are read by their own library.
"""

import contextlib
import dataclasses
import functools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int

from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError

FIX = "copy the file again, or generate the dataset again"

FORMATS = ("tfrecord", "array_record")
_READ_AHEAD = 2**18  # bytes

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
_HEADER = struct.Struct("<QI")


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def masked_crc32c(data: bytes) -> int:
    """Returns the rotated CRC-32C that TFRecord files store."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Records:
    """The E records of one file: where each begins, and what identifies their content.

    Attributes:
      position: int64[E], the byte at which a TFRecord begins, or the number of an array_record.
      size: int64[E], their bytes; of an array_record the mean.
      content: changes with any byte of any record; of array_record with their number and the size of the file.
    """

    position: Int[np.ndarray, " E"]
    size: Int[np.ndarray, " E"]
    content: bytes


def index_records(path: Path, expected: int, file_format: str) -> Records:
    """Finds the ``expected`` records of a file of one of ``FORMATS``.

    Raises:
      UserError: the file cannot be read, ends inside a record or has another number of records, or a length does not
        match its checksum.
    """
    try:
        if file_format == "array_record":
            return _index_array_records(path, expected)
        with path.open("rb") as file:
            return _index(file, path, expected)
    except OSError as error:
        raise UserError(
            f"{path}: expected a TFRecord file, found one that cannot be read ({error.strerror}); {FIX}"
        ) from None


def read_record(
    files: Sequence[str], file_format: str, file: tf.Tensor, position: tf.Tensor
) -> tf.data.Dataset:
    """Reads the record at a position of one of ``files``, int64[] both; returns a dataset with one string."""
    if file_format == "array_record":
        # Not at the top: the library exists for Linux only.
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        source = functools.cache(lambda number: ArrayRecordDataSource([files[number]]))

        def read(number: np.ndarray, position: np.ndarray) -> bytes:
            return source(int(number))[int(position)]

        record = tf.numpy_function(read, [file, position], tf.string)
        return tf.data.Dataset.from_tensors(tf.ensure_shape(record, []))
    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=tf.gather(tf.constant(files), file)[None],
        compression_type="",
        buffer_size=_READ_AHEAD,
        byte_offsets=position[None],
    )
    return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).take(1)


def _index_array_records(path: Path, expected: int) -> Records:
    from array_record.python.array_record_module import ArrayRecordReader

    with contextlib.closing(ArrayRecordReader(str(path))) as reader:
        found = reader.num_records()
    if found != expected:
        raise UserError(
            f"{path}: expected {expected} episodes (dataset_info.json), found {found}; {FIX}"
        )
    size = path.stat().st_size
    content = f"{found} records, {size} bytes".encode()
    return Records(np.arange(found), np.full(found, size // max(1, found)), content)


def _index(file: BinaryIO, path: Path, expected: int) -> Records:
    file.seek(0, os.SEEK_END)
    size = file.tell()
    checksums, positions, sizes = bytearray(), [], []
    offset = number = 0
    file.seek(0)
    header = file.read(_HEADER.size)
    while offset < size and number <= expected:
        where = f"{path}: record {number} at byte {offset}"
        if len(header) < _HEADER.size:
            raise UserError(f"{where} is truncated: the file ends inside its header; {FIX}")
        length, checksum = _HEADER.unpack(header)
        if masked_crc32c(header[:8]) != checksum:
            raise UserError(f"{where} is corrupt: its length fails its checksum; {FIX}")
        end = offset + _HEADER.size + length + 4
        if end > size:
            raise UserError(
                f"{where} is truncated: expected {end - offset} bytes, found {size - offset}; {FIX}"
            )
        file.seek(end - 4)
        together = file.read(4 + _HEADER.size)  # one request, where the file is far away
        checksums += together[:4]
        header = together[4:]
        positions.append(offset)
        sizes.append(end - offset)
        offset, number = end, number + 1
    if number != expected:
        found = number if number < expected else "more"
        raise UserError(
            f"{path}: expected {expected} episodes (dataset_info.json), found {found}; {FIX}"
        )
    return Records(np.array(positions, np.int64), np.array(sizes, np.int64), bytes(checksums))
