"""What a matrix is stored as: the specs that users write, and those that files come with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jqlora.errors import ConfigError
from jqlora.quant.codebooks import (
    fp4_codebook,
    integer_map,
    linear_map,
    nf4_codebook,
    signed_byte_map,
)
from jqlora_kernels.packing import codes_per_byte

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FILE_TYPES = ("uint8", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """All that is static about how a matrix is stored; hashable. The rows of one table: a new kind
    of storage is a subclass, and ``QTensor`` reads everything that it needs of it here.

    ``scheme`` is its name and ``table()`` fp32 [16] or [256] the value of every code.
    """

    scheme: ClassVar[str]
    table: ClassVar[Callable[[], np.ndarray]]

    @property
    def codebook(self) -> np.ndarray:
        """fp32 [16] or [256]: the value of every code, before its block's scale."""
        return self.table()

    @property
    def codes_per_byte(self) -> int:
        """2 for 4-bit codes, 1 for codes of 8 bits."""
        return codes_per_byte(self.codebook)

    @property
    def double_quant(self) -> bool:
        """Whether scales are codes themselves."""
        return False

    @property
    def zeros(self) -> bool:
        """Whether blocks have a zero point beside their scale."""
        return False

    @property
    def ordered(self) -> bool:
        """Whether the columns of a block are not neighbours in the matrix."""
        return False

    def block_in(self, inputs: int) -> int:
        """How many elements share a scale in a matrix of so many columns."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BlockQuant(Storage):
    """Blocks of elements that share one scale; :class:`NF4`, :class:`FP4`, :class:`INT8`.

    ``block`` is the number of elements (bitsandbytes' sizes, 32 to 4096). ``double_quant`` stores
    the scales as 8-bit codes as well, which takes a weight in blocks of 64 from 4.5 to 4.127 bits,
    or from 8.5 to 8.127. Raises ``ConfigError`` for another block size.
    """

    block: int = 64
    double_quant: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ConfigError(
                f"{type(self).__name__}(block={self.block!r}): a block has one of the sizes "
                f"{', '.join(map(str, BLOCKS))}"
            )

    def block_in(self, inputs: int) -> int:
        return self.block


@dataclass(frozen=True, kw_only=True)
class FourBit(BlockQuant):
    """bitsandbytes' 4-bit types. ``storage`` is the type that files view the bytes of codes as
    (``bnb_4bit_quant_storage``); in memory they are bytes."""

    storage: str = "uint8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.storage not in FILE_TYPES:
            raise ConfigError(
                f"{type(self).__name__}(storage={self.storage!r}): accepted are "
                f"{', '.join(FILE_TYPES)}"
            )


@dataclass(frozen=True, kw_only=True)
class NF4(FourBit):
    """4-bit NormalFloat: levels at the quantiles of N(0, 1) (QLoRA, arXiv 2305.14314 §3)."""

    scheme: ClassVar[str] = "nf4"
    table = staticmethod(nf4_codebook)


@dataclass(frozen=True, kw_only=True)
class FP4(FourBit):
    """4-bit float with two exponent bits and one mantissa bit, as bitsandbytes stores it."""

    scheme: ClassVar[str] = "fp4"
    table = staticmethod(fp4_codebook)


@dataclass(frozen=True, kw_only=True)
class INT8(BlockQuant):
    """8-bit linear integers, scaled by the largest magnitude of each block.

    The codes are those of bitsandbytes' ``quantize_blockwise`` with its linear map. Its checkpoints
    have no place for them: this storage lives in memory alone.
    """

    scheme: ClassVar[str] = "int8"
    table = staticmethod(linear_map)


@dataclass(frozen=True, kw_only=True)
class RowInt8(Storage):
    """8-bit integers with one scale an output row, as bitsandbytes' 8-bit checkpoints have them.

    Such a checkpoint is made for LLM.int8() (arXiv 2208.07339), which also rounds the activations
    to 8 bits, all but columns that exceed ``threshold``. Here the weights alone are of 8 bits:
    products take the activations as they are, no column is set apart, and the threshold is only
    kept for the file.
    """

    threshold: float = 6.0
    scheme: ClassVar[str] = "llm.int8"
    table = staticmethod(signed_byte_map)

    def block_in(self, inputs: int) -> int:
        return inputs


@dataclass(frozen=True, kw_only=True)
class GroupInt(Storage):
    """Integers in groups of inputs with a scale and a zero point each: GPTQ's and AWQ's files.

    Such codes come out of a calibration: they are loaded, never made here. ``format`` is "gptq",
    "gptq_v2" (another convention of zero points) or "awq"; ``bits`` 4 or 8; ``group`` the inputs of
    a group, -1 for all. ``symmetric`` says that every zero point is the middle, so that none is
    kept; ``ordered`` that groups are made of inputs far apart (GPTQ's ``desc_act``).
    ``scale_dtype`` is that of the scales in the file.
    """

    format: str
    bits: int = 4
    group: int = 128
    symmetric: bool = False
    ordered: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]
    scale_dtype: str = "float16"
    scheme: ClassVar[str] = "int"

    @property
    def codebook(self) -> np.ndarray:
        return integer_map(self.bits)

    @property
    def zeros(self) -> bool:
        return not self.symmetric

    def block_in(self, inputs: int) -> int:
        return inputs if self.group == -1 else self.group
