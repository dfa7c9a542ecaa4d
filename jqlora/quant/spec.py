"""What to store a matrix as: the specs that users write."""

from dataclasses import dataclass

from jqlora.errors import ConfigError

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class BlockQuant:
    """Blocks of elements that share one scale; :class:`NF4`, :class:`FP4`, :class:`INT8`.

    ``block`` is the number of elements (bitsandbytes' sizes, 32 to 4096). ``double_quant`` stores
    the scales as 8-bit codes as well, which takes a weight in blocks of 64 from 4.5 to 4.127 bits,
    or from 8.5 to 8.127. Raises ``ConfigError`` for another block size.
    """

    block: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ConfigError(
                f"{type(self).__name__}(block={self.block!r}): a block has one of the sizes "
                f"{', '.join(map(str, BLOCKS))}"
            )


@dataclass(frozen=True, kw_only=True)
class NF4(BlockQuant):
    """4-bit NormalFloat: levels at the quantiles of N(0, 1) (QLoRA, arXiv 2305.14314 §3)."""


@dataclass(frozen=True, kw_only=True)
class FP4(BlockQuant):
    """4-bit float with two exponent bits and one mantissa bit, as bitsandbytes stores it."""


@dataclass(frozen=True, kw_only=True)
class INT8(BlockQuant):
    """8-bit linear integers, scaled by the largest magnitude of each block.

    The codes are those of bitsandbytes' ``quantize_blockwise`` with its linear map. Its checkpoints
    have no place for them: this storage lives in memory alone.
    """
