"""What a quantized weight in a file is to the rest of the library, whatever its format.

A format is a row with these functions (``jqlora.io.formats`` has the table): it finds its weights
by the names of their parts, says what a file holds of one, reads and writes it without
requantizing, and words the ``quantization_config`` that transformers reads.
"""

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jqlora.io.readers import TensorInfo, TensorReader
from jqlora.quant import QTensor, Storage


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says once for all its weights: its ``quantization_config`` (empty if it
    has none), and the dtype that weights decode to where their own parts do not say."""

    config: Mapping[str, Any]
    dtype: str


@dataclass(frozen=True)
class Stored:
    """One quantized weight of a file, its parts checked and nothing large read yet.

    ``spec`` is what it is held as in memory, ``matrix_shape`` (K, N), ``parts`` the names of its
    tensors in the file. ``read`` gives the ``QTensor``, of host arrays. ``remark`` is for the log.
    """

    spec: Storage
    matrix_shape: tuple[int, int]
    dtype: str
    parts: tuple[str, ...]
    read: Callable[[], QTensor] = field(compare=False)
    remark: str = ""


@dataclass(frozen=True)
class Format:
    """``find(reader, name, present, settings)``: the weight ``name``, or None if it is not stored
    so; ``CheckpointError`` naming file and tensor if its parts are incomplete or disagree.

    ``infos(name, spec, (K, N))`` are shapes and dtypes of all parts in a file, but for ``texts``,
    uint8 tensors whose length is known when they are made; ``encode(name, q)`` has all of them.
    ``config(specs, weights, kept, dtype)`` words the config of a model with these specs, of its
    quantized ``weights`` and of the modules ``kept`` whole.
    """

    find: Callable[[TensorReader, str, Set[str], Settings], Stored | None]
    infos: Callable[[str, Storage, tuple[int, int]], dict[str, TensorInfo]]
    encode: Callable[[str, QTensor], dict[str, np.ndarray]]
    config: Callable[[Collection[Storage], Collection[str], Sequence[str], str], dict[str, Any]]
    texts: Callable[[str, Storage], tuple[str, ...]] = lambda name, spec: ()


def module_of(name: str) -> str:
    """The module whose weight is called ``name``."""
    return name.removesuffix(".weight")
