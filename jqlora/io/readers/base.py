"""What every weight file offers: names, shapes, and one tensor at a time."""

from typing import NamedTuple, Protocol

import numpy as np


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor, known before its bytes are read."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorReader(Protocol):
    """Weights by their Hugging Face names, in their stored orientation (out, in).

    Opening reads headers only. ``read`` returns a fresh array in host memory and keeps nothing;
    it raises CheckpointError naming the file and the tensor when the bytes are not there.
    """

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str) -> np.ndarray: ...

    def where(self, name: str) -> str:
        """The file that holds ``name``, for messages."""
        ...
