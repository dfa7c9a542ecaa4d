"""Products with a block-quantized matrix as Pallas-Triton kernels, chosen by the rows of ``x``.

A few rows: one kernel without tensor cores (``triton_vector``), bound by the reading of codes. Some
more: a fused kernel (``triton_fused``) that feeds what it decodes to the tensor cores. Many: the
matrix is decoded once (``decode_first``). Where they change over: ``tuning``.

Weights are decoded exactly in all of them: fp32 code times fp32 scale, rounded once to ``x.dtype``.
"""

import functools

import jax

from jqlora_kernels import triton_tiles, tuning
from jqlora_kernels.dequantize_blockwise.pallas_triton import dequantize_blockwise
from jqlora_kernels.quantized_matmul import decode_first, triton_fused, triton_vector
from jqlora_kernels.scales import Nested
from jqlora_kernels.tuning import Tuning


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    features: int,
    tuned: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As ``reference.quantized_matmul``, up to the order of summation.

    ``tuned`` are the limits between the kernels, by default those of this device. Raises
    ``NotImplementedError`` for other dtypes than fp32, bf16 and fp16, and, with few enough rows to
    be fused, where blocks do not end with the rows (K no multiple of ``block``).
    """
    tuned = tuning.here() if tuned is None else tuned
    shape = (features, x.shape[1])
    if x.shape[0] > tuned.fused_rows:
        decode = functools.partial(dequantize_blockwise, block=block, interpret=interpret)
        return decode_first.multiply(decode, x, (codes, scales, codebook, nested, index), features)
    check(x, shape, block)
    operands = triton_tiles.flat_operands(codes, scales, codebook, nested, index)
    few = x.shape[0] <= tuned.vector_rows
    kernel = triton_vector.multiply if few else triton_fused.multiply
    return kernel(x, operands, block=block, features=features, interpret=interpret)


def transposed(
    g: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    features: int,
    tuned: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As ``reference.transposed``; refuses what ``quantized_matmul`` refuses."""
    tuned = tuning.here() if tuned is None else tuned
    shape = (g.shape[1], features)
    if g.shape[0] > tuned.fused_rows:
        operands = (codes, scales, codebook, nested, index)
        decode = functools.partial(dequantize_blockwise, block=block, interpret=interpret)
        return decode_first.multiply_transposed(decode, g, operands, features)
    check(g, shape, block)
    operands = triton_tiles.flat_operands(codes, scales, codebook, nested, index)
    return triton_fused.multiply_transposed(
        g, operands, block=block, features=features, interpret=interpret
    )


def check(x: jax.Array, shape: tuple[int, int], block: int) -> None:
    """Refuses what the fused kernels cannot multiply by a matrix of ``shape`` (N, K)."""
    triton_tiles.check_dtype(x.dtype)
    if shape[1] % block:
        raise NotImplementedError(
            f"K={shape[1]} is no multiple of {block=}: rows end inside blocks"
        )
    if shape[0] * shape[1] >= 2**31:
        raise NotImplementedError(f"{shape[0] * shape[1]} weights cannot be numbered in an int32")
