"""Reads the float tensors of a TensorFlow checkpoint (a "tensor bundle") without TensorFlow.

The bundle is NAME.index, a sorted table (the SSTable of LevelDB) from tensor names to protocol buffers with
shape, offset and size, and NAME.data-00000-of-00001, the raw little-endian numbers.
"""

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from duotok.tokenizer.common.errors import DataError

_FOOTER_BYTES = 48
_MAGIC = 0xDB4775248B80FB57
_FLOAT32 = 1  # DT_FLOAT of tensorflow/core/framework/types.proto
# Field numbers of BundleEntryProto.
_DTYPE, _SHAPE, _SHARD, _OFFSET, _SIZE = 1, 2, 3, 4, 5


def read_tensor_bundle(folder: Path, name: str = "") -> dict[str, np.ndarray]:
    """{tensor: float32 array} of the checkpoint NAME.index and NAME.data-00000-of-00001 of a folder.

    Tensors of other types are left out. Raises DataError where a file is missing or damaged, the index is
    compressed or the data lie in several shards.
    """
    index_path = folder / f"{name}.index"
    try:
        index = index_path.read_bytes()
        data = (folder / f"{name}.data-00000-of-00001").read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the checkpoint {index_path}: {error.strerror or error}") from error
    try:
        return dict(_read_tensors(index, data))
    except (IndexError, KeyError, UnicodeDecodeError, ValueError, struct.error) as error:
        raise DataError(f"{index_path} is no TensorFlow checkpoint that can be read: {error}") from error


def _read_tensors(index: bytes, data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    footer = index[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise ValueError("its last bytes are not those of a table")
    position = 0
    handles = []  # offset and size of the table's meta index, then of its index
    for _ in range(4):
        value, position = _read_varint(footer, position)
        handles.append(value)
    for _, handle in _read_block(index, handles[2], handles[3]):
        offset, position = _read_varint(handle, 0)
        size, _ = _read_varint(handle, position)
        for name, entry in _read_block(index, offset, size):
            fields = _read_message(entry)
            # The entry without a name is the bundle's header.
            if name and fields.get(_DTYPE, [0])[0] == _FLOAT32:
                yield name.decode(), _read_array(fields, data)


def _read_array(fields: dict[int, list], data: bytes) -> np.ndarray:
    if fields.get(_SHARD, [0])[0] != 0:
        raise ValueError("it has several shards")
    dimensions = _read_message(fields[_SHAPE][0]).get(2, []) if _SHAPE in fields else []
    shape = [_read_message(dimension).get(1, [0])[0] for dimension in dimensions]
    offset, size = fields.get(_OFFSET, [0])[0], fields[_SIZE][0]
    if size != 4 * prod(shape) or offset + size > len(data):
        raise ValueError("the data are shorter than the index says")
    return np.frombuffer(data, "<f4", count=prod(shape), offset=offset).reshape(shape)


def _read_block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; a key gives only what differs from the key before."""
    if offset + size >= len(table):
        raise ValueError("it is cut off")
    if table[offset + size] != 0:
        raise ValueError("it is compressed")
    block = table[offset : offset + size]
    restarts = struct.unpack("<I", block[-4:])[0]
    end = size - 4 - 4 * restarts
    position, key = 0, b""
    while position < end:
        shared, position = _read_varint(block, position)
        unshared, position = _read_varint(block, position)
        length, position = _read_varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def _read_message(message: bytes) -> dict[int, list]:
    """Values of a protocol buffer by field number: integers, or bytes where the field has a length."""
    fields: dict[int, list] = {}
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _read_varint(message, position)
        else:
            length = {1: 8, 5: 4}.get(kind)
            if length is None:
                length, position = _read_varint(message, position)
            value = message[position : position + length]
            position += length
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _read_varint(buffer: bytes, position: int) -> tuple[int, int]:
    """The integer at a position, seven bits a byte, and the position after it."""
    value = shift = 0
    while True:
        byte = buffer[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
