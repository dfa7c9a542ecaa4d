"""A weight file under other names: those of today for files that were written long ago."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jqlora.io.readers.base import TensorInfo, TensorReader


@dataclass(frozen=True)
class Renamed:
    """The tensors of ``reader`` under the names that are the keys of ``stored``."""

    reader: TensorReader
    stored: Mapping[str, str]

    def names(self) -> list[str]:
        return list(self.stored)

    def info(self, name: str) -> TensorInfo:
        return self.reader.info(self.stored[name])

    def read(self, name: str) -> np.ndarray:
        return self.reader.read(self.stored[name])

    def where(self, name: str) -> str:
        return self.reader.where(self.stored.get(name, name))
