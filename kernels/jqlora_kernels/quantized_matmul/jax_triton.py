"""Products with a block-quantized matrix as Triton kernels proper, called through ``jax_triton``.

Few rows of ``x`` go through one fused kernel, many by the matrix decoded first, as in the Pallas
kernels. The nibbles of a byte are neighbouring columns: ``x`` is read as its even and its odd
columns, and the product is the sum of two; with one code to a byte there is one.
"""

import functools

import jax
import jax.numpy as jnp
import jax_triton

from jqlora_kernels.dequantize_blockwise.jax_triton import (
    check,
    dequantize_blockwise,
    flat_operands,
    storage_options,
)
from jqlora_kernels.layouts import BITSANDBYTES
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.quantized_matmul import decode_first
from jqlora_kernels.scales import Nested
from jqlora_kernels.triton_language import forward_tile, transposed_tile

FUSED_ROWS = 256
"""Up to how many rows of ``x`` the fused kernel serves: an estimate from instruction counts."""
TILE = (64, 64)
"""Rows of ``x`` and of the matrix that a program multiplies."""
TILE_FP32 = (16, 32)
"""Exact products of fp32 do without tensor cores, and a larger tile would spill registers."""
BYTES = 32


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
    layout: str = BITSANDBYTES,
    fused_rows: int = FUSED_ROWS,
    compute_capability: int | None = None,
) -> jax.Array:
    """As ``reference.quantized_matmul``, up to the order of summation.

    Raises ``NotImplementedError`` for what the decoding kernel refuses and, with few enough rows to
    be fused, where blocks do not end with the rows (K no multiple of ``block``).
    """
    operands = (codes, scales, codebook, nested, index)
    shape = (features, x.shape[1])
    check(x.dtype, layout)
    if x.shape[0] > fused_rows:
        decode = functools.partial(
            dequantize_blockwise, block=block, compute_capability=compute_capability
        )
        return decode_first.multiply(decode, x, operands, features)
    return fused("forward", x, operands, shape, block, compute_capability)


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
    layout: str = BITSANDBYTES,
    fused_rows: int = FUSED_ROWS,
    compute_capability: int | None = None,
) -> jax.Array:
    """As ``reference.transposed``; refuses what ``quantized_matmul`` refuses."""
    operands = (codes, scales, codebook, nested, index)
    shape = (g.shape[1], features)
    check(g.dtype, layout)
    if g.shape[0] > fused_rows:
        decode = functools.partial(
            dequantize_blockwise, block=block, compute_capability=compute_capability
        )
        return decode_first.multiply_transposed(decode, g, operands, features)
    return fused("transposed", g, operands, shape, block, compute_capability)


def fused(name, x, operands, shape, block, capability) -> jax.Array:
    """The fused kernel for ``x`` [M, K] (forward) or [M, N] (transposed) and a matrix (N, K)."""
    features, columns = shape
    if columns % block:
        raise NotImplementedError(f"K={columns} is no multiple of {block=}: rows end inside blocks")
    flat = flat_operands(*operands)
    forward = name == "forward"
    rows, of_matrix = TILE_FP32 if x.dtype == jnp.float32 else TILE
    width = columns // codes_per_byte(operands[2])
    step = min(block * width // columns, BYTES)
    tiles = -(-features // of_matrix) if forward else width // step
    return jax_triton.triton_call(
        x,
        *flat,
        kernel=forward_tile if forward else transposed_tile,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], features if forward else columns), x.dtype),
        grid=(-(-x.shape[0] // rows), tiles),
        num_warps=4,
        num_stages=3,
        compute_capability=capability,
        COUNT=x.shape[0],
        N=features,
        WIDTH=width,
        BLOCKS=flat[2].shape[1],
        ROWS=rows,
        FEATURES=of_matrix,
        BYTES=step,
        **storage_options(operands[2], operands[3], block),
    )
