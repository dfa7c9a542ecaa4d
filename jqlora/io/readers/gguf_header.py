"""The header of a ``.gguf`` file: its metadata, and where each tensor lies.

The format is that of ggml's ``docs/gguf.md``, versions 2 and 3, little-endian. It is read here, and
not by the ``gguf`` package, because that package's reader makes several numpy views of each word of
a vocabulary: seconds for what takes a tenth of one.
"""

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jqlora.errors import CheckpointError
from jqlora.io.readers.raw import read_bytes

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where the metadata do not say
_STRING, _ARRAY = 8, 9
_SCALARS = {
    kind: np.dtype(name)
    for kind, name in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
        7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor of ``shape``, outermost axis first, in ``size`` bytes from ``offset`` on."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """What a file says of itself."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]

    def read(self, tensor: GGUFTensor) -> np.ndarray:
        """The bytes of ``tensor``, uint8. Raises CheckpointError where the file ends before."""
        raw = read_bytes(self.path, tensor.offset, tensor.size)
        if raw.size != tensor.size:
            raise CheckpointError(f"{self.path} was truncated while reading tensor {tensor.name!r}")
        return raw


def open_gguf(path: Path) -> GGUFHeader:
    """The header of ``path``. Raises CheckpointError if it is damaged or truncated.

    Model and tokenizer both need it: the last one is kept, for as long as the file does not change.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return _open(path.resolve(), state.st_mtime_ns, state.st_size)


def field(header: GGUFHeader, key: str, default: Any = ...) -> Any:
    """The metadata value ``key``; CheckpointError if it is absent and no default is given."""
    if key not in header.metadata and default is ...:
        raise CheckpointError(f"the GGUF metadata lack {key!r}")
    return header.metadata.get(key, default)


@functools.lru_cache(maxsize=1)
def _open(path: Path, changed: int, size: int) -> GGUFHeader:
    del changed  # part of the key
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse(path, data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, struct.error, OverflowError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a GGUF file: {type(error).__name__}: {error}"
        ) from error
    for tensor in header.tensors:
        if tensor.offset + tensor.size > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {tensor.name!r} ends at byte "
                f"{tensor.offset + tensor.size}, the file has {size}"
            )
    if field(header, "split.count", 1) > 1:
        raise CheckpointError(f"{path} is one part of a split model: join it with gguf-split first")
    return header


def _parse(path: Path, data: mmap.mmap) -> GGUFHeader:
    cursor = _Cursor(data)
    if cursor.raw(4) != _MAGIC:
        raise ValueError("it does not begin with 'GGUF'")
    version = cursor.number("<I")
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{path} was written for machines of other byte order")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; known are {_VERSIONS}")
    tensors, entries = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the key {key!r} is there twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    infos = {}
    for _ in range(tensors):
        name = cursor.string()
        if name in infos:
            raise ValueError(f"the tensor {name!r} is there twice")
        shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]
        infos[name] = (shape, GGMLQuantizationType(cursor.number("<I")), cursor.number("<Q"))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment
    found = []
    for name, (shape, kind, offset) in infos.items():
        block, size = GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * size
        found.append(GGUFTensor(name, kind, shape, start + offset, size))
    return GGUFHeader(path, metadata, tuple(found))


class _Cursor:
    """Reads ``data`` from the front; ``at`` is how far it is. Raises ValueError or struct.error
    where the data end too early."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def raw(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) != count:
            raise ValueError(f"it ends within {count} bytes at {self.at}")
        self.at += count
        return found

    def string(self) -> str:
        return self.raw(self.number("<Q")).decode()

    def value(self, kind: int) -> Any:
        """Of a type in GGUF's numbering; arrays become lists."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self._scalars(kind, 1)[0]
        kind, count = self.number("<I"), self.number("<Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        dtype = _SCALARS[kind]
        return np.frombuffer(self.raw(count * dtype.itemsize), dtype).tolist()
