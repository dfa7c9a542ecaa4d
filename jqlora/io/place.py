"""Stored tensors converted on the device and put into their leaves in place."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jqlora.io.readers import TensorReader
from jqlora.io.readers.raw import aligned_empty
from jqlora.quant import Storage, quantize, quantize_rows


@dataclass(frozen=True)
class Converter:
    """From a stored tensor to what its leaf holds; hashable, so it is static under ``jit``."""

    dtype: str
    transpose: bool = False
    spec: Storage | None = None

    def __call__(self, raw: jax.Array) -> Any:
        array = raw.astype(self.dtype)
        if self.spec is not None:
            return (quantize_rows if self.transpose else quantize)(array, self.spec)
        return array.T if self.transpose else array


def read_float(reader: TensorReader, name: str, dtype: str = "float32") -> np.ndarray:
    """The tensor on the host, narrowed to ``dtype`` if it is stored in a wider one.

    Narrowing here, with the rounding that the device would do, frees the wider copy before the
    device makes its own.
    """
    array = reader.read(name)
    wanted = np.dtype(dtype)
    if array.dtype.itemsize <= wanted.itemsize:
        return array
    narrow = aligned_empty(array.shape, wanted)
    narrow[...] = array
    return narrow


def host_bytes(reader: TensorReader, name: str, dtype: str | None = None) -> int:
    """What reading a tensor needs of host memory, with its copy in a narrower ``dtype``, if any."""
    shape, stored = reader.info(name)
    wanted = stored.itemsize if dtype is None else np.dtype(dtype).itemsize
    return math.prod(shape) * (stored.itemsize + (wanted if stored.itemsize > wanted else 0))


@functools.partial(jax.jit, static_argnums=1)
def convert(value: Any, how: Converter | None) -> Any:
    """One stored tensor, converted on the device; as it is if ``how`` is None."""
    return value if how is None else how(value)


def fill(stack: Any, item: Any, index: ArrayLike) -> Any:
    """``stack`` [L, ...], in the same memory, with its layer ``index`` replaced by ``item``.

    Apart from ``convert``, because XLA on a CPU takes seven times as long to transpose a matrix
    into its place as to transpose it and then to copy it.
    """
    leaves, structure = jax.tree.flatten(stack)
    return structure.unflatten(_fill(leaves, structure.flatten_up_to(item), index))


@functools.partial(jax.jit, donate_argnums=0)
def _fill(leaves: list[Any], items: list[Any], index: ArrayLike) -> list[Any]:
    """Of arrays alone: codes of one shape share a program, whatever they stand for."""
    return [
        jax.lax.dynamic_update_index_in_dim(leaf, item, index, 0)
        for leaf, item in zip(leaves, items, strict=True)
    ]
