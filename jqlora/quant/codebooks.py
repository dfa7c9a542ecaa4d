"""The tables behind the stored types, derived from their definitions.

Checkpoints store codes, so a table that is off by one bit reads every published 4-bit model
slightly wrong. Each table is therefore computed the way its definition was first evaluated (single
precision where that was single), and the tests hold it against bitsandbytes' bit for bit.
"""

from functools import cache
from statistics import NormalDist

import numpy as np

FLOAT = np.float32
# QLoRA's appendix E takes δ = (1/32 + 1/30) / 2 and starts the quantiles at 1 - δ, to 7 places.
NF4_LARGEST_QUANTILE = 0.9677083
# Magnitudes of FP4's eight positive codes, before division by the largest: the two bits after the
# sign choose the exponent, the last one the mantissa, in the order that bitsandbytes decodes them.
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
DYNAMIC_EXPONENTS = 7


def linspace(start: float, stop: float, count: int) -> np.ndarray:
    """``count`` fp32 points from both ends inwards, each rounded once (a fused multiply-add).

    NumPy's own ``linspace`` differs in the last bit, which the tables below would inherit.
    """
    first, last = FLOAT(start), FLOAT(stop)
    step = np.float64((last - first) / FLOAT(count - 1))
    i = np.arange(count)
    up = np.float64(first) + step * i
    down = np.float64(last) - step * (count - 1 - i)
    return np.where(i < count // 2, up, down).astype(FLOAT)


@cache
def nf4_codebook() -> np.ndarray:
    """NormalFloat4: fp32 [16], ascending, from -1 to 1, with an exact zero at code 7.

    Seven negative and eight positive quantiles of N(0, 1), evenly spaced in probability between 1/2
    and 1 - δ on either side, divided by the largest (Dettmers et al. 2023, arXiv 2305.14314,
    equation 4 and appendix E).
    """

    def quantiles(count: int) -> list[float]:
        probabilities = linspace(NF4_LARGEST_QUANTILE, 0.5, count + 1)[:-1]
        return [NormalDist().inv_cdf(float(p)) for p in probabilities]

    values = np.sort(np.array([*(-q for q in quantiles(7)), 0.0, *quantiles(8)], FLOAT))
    return frozen(values / np.abs(values).max())


@cache
def fp4_codebook() -> np.ndarray:
    """4-bit float (sign, two exponent bits, one mantissa bit), fp32 [16] by code, largest 1.

    Code 8 is minus zero in the bit pattern and plain zero here, as in bitsandbytes' table.
    """
    positive = np.array(FP4_MAGNITUDES, FLOAT)
    return frozen(np.concatenate([positive, FLOAT(0) - positive]) / positive.max())


@cache
def dynamic_map(*, signed: bool = True) -> np.ndarray:
    """The 8-bit dynamic data type: fp32 [256], ascending, 1 at code 255, 0 at code 127 (or 0).

    Decade ``10^(i-6)`` for i = 0 ... 6 holds ``2^i`` values of either sign, or ``2^(i+1)`` positive
    ones where ``signed`` is False: the midpoints of as many equal steps from 0.1 to 1. Zero and one
    complete the 256 (Dettmers 2015, arXiv 1511.04561). The signed map stores the scales of double
    quantization (QLoRA §3), and both the states of 8-bit optimizers.
    """
    values = [FLOAT(0), FLOAT(1)]
    for exponent in range(DYNAMIC_EXPONENTS):
        edges = linspace(0.1, 1.0, 2 ** (exponent if signed else exponent + 1) + 1)
        decade = FLOAT(10.0 ** (exponent - DYNAMIC_EXPONENTS + 1))
        midpoints = decade * ((edges[:-1] + edges[1:]) / FLOAT(2))
        values += [*midpoints, *(-midpoints if signed else ())]
    return frozen(np.sort(np.array(values, FLOAT)))


@cache
def linear_map() -> np.ndarray:
    """Linear 8-bit integers: fp32 [256], ascending from -1 to 1, with an exact zero at code 127.

    255 evenly spaced values i / 127 and one more zero below the middle of them, which itself misses
    zero by a rounding (3.7e-9): bitsandbytes' ``create_linear_map``, bit for bit.
    """
    values = linspace(-1.0, 1.0, 255)
    middle = values.size // 2
    return frozen(np.concatenate([values[:middle], np.zeros(1, FLOAT), values[middle:]]))


@cache
def signed_byte_map() -> np.ndarray:
    """Bytes read as two's complement, divided by 127: fp32 [256] by byte, as LLM.int8() uses them.

    Byte 128, which it never writes, is -128/127.
    """
    return frozen(np.arange(256, dtype=np.uint8).view(np.int8).astype(FLOAT) / FLOAT(127))


@cache
def integer_map(bits: int) -> np.ndarray:
    """Unsigned integers of 4 or 8 bits less the middle one, 8 or 128: fp32 [16] or [256]."""
    return frozen(np.arange(2**bits, dtype=FLOAT) - FLOAT(2 ** (bits - 1)))


def levels(codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of a codebook in ascending order, and the first code of each.

    Returns fp32 [n] and uint8 [n]. FP4 writes zero twice; only its positive zero is ever written.
    """
    values, codes = np.unique(codebook, return_index=True)
    return values, codes.astype(np.uint8)


def frozen(table: np.ndarray) -> np.ndarray:
    """The table, made read-only: it is cached and shared."""
    table.setflags(write=False)
    return table
