"""A weight file whose every tensor is held against a checksum as it is read."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jqlora.errors import CheckpointError
from jqlora.io.readers.base import TensorInfo, TensorReader


def checksum(array: np.ndarray) -> int:
    """CRC-32 of the bytes in memory order; reads at the speed of a good disk, off the GIL."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


@dataclass(frozen=True)
class Checked:
    """The tensors of ``reader``; ``read`` raises CheckpointError for one that is not in ``sums``
    with the checksum of its bytes."""

    reader: TensorReader
    sums: Mapping[str, int]

    def names(self) -> list[str]:
        return self.reader.names()

    def info(self, name: str) -> TensorInfo:
        return self.reader.info(name)

    def read(self, name: str) -> np.ndarray:
        array = self.reader.read(name)
        if checksum(array) != self.sums.get(name):
            raise CheckpointError(f"{self.where(name)}: the bytes of tensor {name!r} have changed")
        return array

    def where(self, name: str) -> str:
        return self.reader.where(name)
