"""Bytes of files in host memory that a device on the CPU takes as its own.

XLA uses an array of the host without copying it if it starts at a multiple of 64 bytes. numpy's
own large arrays start 16 bytes after one.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

_ALIGNMENT = 64


def aligned_empty(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """As ``numpy.empty``, at an address that XLA need not copy from."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """uint8 [count]; fewer where the file ends before. Other threads run meanwhile.

    Raises OSError.
    """
    raw = aligned_empty((count,), np.uint8)
    done = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset, os.SEEK_SET)
        # a single read ends at 2 GiB
        while done < count and (got := file.readinto(raw[done:].data)):
            done += got
    return raw[:done]
