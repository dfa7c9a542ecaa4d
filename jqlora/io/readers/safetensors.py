"""One ``.safetensors`` file: 8 bytes of header length, a JSON header, then the tensors' bytes.

Read by hand because the header says where each tensor lies: one seek and one read per tensor keep
nothing else in memory, and a damaged file can be blamed tensor by tensor before anything is loaded.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jqlora.errors import CheckpointError
from jqlora.io.readers.base import TensorInfo
from jqlora.io.readers.raw import read_bytes

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_LONGEST_HEADER = 100_000_000  # the limit of the format's own library


class SafetensorsFile:
    """Reader of one file; the whole header is checked when it is opened."""

    def __init__(self, path: Path):
        self.path = path
        self._entries: dict[str, tuple[TensorInfo, int]] = {}
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(_LONGEST_HEADER, size - 8):
                    raise CheckpointError(
                        f"{path} is truncated or not a safetensors file: its header claims "
                        f"{length} bytes, the file has {size}"
                    )
                header = json.loads(file.read(length))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} has a damaged header: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{path} has a damaged header: not a JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        end = 0
        for name, entry in header.items():
            info, first, last = self._parse(name, entry)
            if 8 + length + last > size:
                raise CheckpointError(
                    f"{path} is truncated: tensor {name!r} ends at byte {8 + length + last}, "
                    f"the file has {size}"
                )
            self._entries[name] = info, 8 + length + first
            end = max(end, last)
        if 8 + length + end != size:
            raise CheckpointError(
                f"{path} is damaged: {size - 8 - length - end} bytes after its last tensor"
            )

    def _parse(self, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            first, last = map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has a damaged entry: {entry}"
            ) from error
        if min((first, *shape)) < 0 or last - first != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(shape)} and type {entry['dtype']} "
                f"cannot lie in bytes {first} to {last}"
            )
        return TensorInfo(shape, dtype), first, last

    def names(self) -> list[str]:
        return list(self._entries)

    def info(self, name: str) -> TensorInfo:
        return self._entries[name][0]

    def where(self, name: str) -> str:
        return str(self.path)

    def read(self, name: str) -> np.ndarray:
        (shape, dtype), offset = self._entries[name]
        count = math.prod(shape) * dtype.itemsize
        try:
            raw = read_bytes(self.path, offset, count)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read tensor {name!r}: {error}") from error
        if raw.size != count:
            raise CheckpointError(f"{self.path} was truncated while reading tensor {name!r}")
        return raw.view(dtype).reshape(shape)
