"""Checks that a TFRecord file is complete, and returns its checksums, without reading the payloads.

A record is ``uint64 length, uint32 crc(length), payload, uint32 crc(payload)``, little-endian, where ``crc`` is a
rotated CRC-32C (TensorFlow, ``lib/io/record_writer.h``). The lengths show whether a file is truncated, and the payload
checksums together identify its content. 16 bytes are read per record. TensorFlow verifies the payloads when it reads
them.
"""

import io
import os
import struct
from pathlib import Path

from mllm_act.errors import UserError

FIX = "copy the file again, or regenerate the dataset with python -m data_pipelines.generate"

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


def payload_checksums(path: Path, expected: int) -> bytes:
    """Returns the stored payload checksums of a TFRecord file, 4 bytes for each of its ``expected`` records.

    Raises:
      UserError: the file cannot be read, ends inside a record or has another number of records, or a length does not
        match its checksum.
    """
    try:
        with path.open("rb", buffering=0) as file:
            return _checksums(file, path, expected)
    except OSError as error:
        raise UserError(
            f"{path}: expected a TFRecord file, found one that cannot be read ({error.strerror}); {FIX}"
        ) from None


def _checksums(file: io.FileIO, path: Path, expected: int) -> bytes:
    size = os.fstat(file.fileno()).st_size
    checksums = bytearray()
    offset = number = 0
    while offset < size and number <= expected:
        file.seek(offset)
        header = file.read(_HEADER.size)
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
        checksums += file.read(4)
        offset, number = end, number + 1
    if number != expected:
        found = number if number < expected else "more"
        raise UserError(
            f"{path}: expected {expected} episodes (dataset_info.json), found {found}; {FIX}"
        )
    return bytes(checksums)
