"""Products with a block-quantized matrix: the definition.

The matrix is stored by output rows, (N, K), and both products contract it where it lies:
``y = x @ W.T`` over K and ``dx = g @ W`` over N, so that no transposed copy is ever made.

Decoding need not put the two nibbles of a byte side by side: high nibbles are the even columns, low
nibbles the odd ones, and the product is the sum of two halves. On a CPU that takes a half to a
quarter of the time that interleaving costs (the decode vectorizes, and no copy joins the halves).
Codes of 8 bits are one part, every column of it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jqlora_kernels.dequantize_blockwise import reference as decode
from jqlora_kernels.layouts import BITSANDBYTES, repack
from jqlora_kernels.operands import select
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.scales import Nested, Scales, decode_scales, look_up


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: Scales,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    features: int,
    layout: str = BITSANDBYTES,
) -> jax.Array:
    """``x`` [M, K] times the decoded matrix (N = ``features`` rows of K): [M, N] in ``x.dtype``.

    ``codes`` uint8 [N, K/2] and ``scales`` [N, K/block] if K is a multiple of ``block``; otherwise
    [1, ceil(N*K/2)] and [1, ceil(N*K/block)], blocks running on from row to row; codes for a
    ``codebook`` of 256 are one to a byte, [N, K] or [1, N*K]. Weights are
    rounded to ``x.dtype``, products accumulate in fp32. ``layout`` as in ``dequantize_blockwise``.
    """
    codes, scales, nested = select(codes, scales, nested, index)
    codes = repack(codes, layout, BITSANDBYTES, codes_per_byte(codebook))
    if x.shape[1] % block:
        shape = (features, x.shape[1])
        return contract(x, flat_rows(codes, scales, codebook, nested, block, shape, x.dtype), 1)
    parts = column_parts(codes, scales, codebook, nested, block, x.dtype)
    products = [product(x[:, i :: len(parts)], part, 1) for i, part in enumerate(parts)]
    return sum(products[1:], products[0]).astype(x.dtype)


def transposed(
    g: jax.Array,
    codes: jax.Array,
    scales: Scales,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    features: int,
    layout: str = BITSANDBYTES,
) -> jax.Array:
    """``g`` [M, N] times the decoded matrix the other way round: [M, K = ``features``].

    The barrier ties the decode to ``g``: otherwise XLA would find the same decode in the forward
    pass and keep its result, the very array that storing codes is meant to avoid.
    """
    codes, scales, nested = select(codes, scales, nested, index)
    codes, g = lax.optimization_barrier((codes, g))
    codes = repack(codes, layout, BITSANDBYTES, codes_per_byte(codebook))
    if features % block:
        shape = (g.shape[1], features)
        return contract(g, flat_rows(codes, scales, codebook, nested, block, shape, g.dtype), 0)
    parts = column_parts(codes, scales, codebook, nested, block, g.dtype)
    products = [contract(g, part, 0) for part in parts]
    return jnp.stack(products, axis=-1).reshape(g.shape[0], features)


def contract(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """:func:`product`, rounded to ``x.dtype``."""
    return product(x, weight, axis).astype(x.dtype)


def product(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """``x``'s last axis contracted with ``axis`` of the matrix, accumulated and left in fp32."""
    axes = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, weight, axes, preferred_element_type=jnp.float32)


def column_parts(
    codes: jax.Array,
    scales: Scales,
    codebook: jax.Array,
    nested: Nested | None,
    block: int,
    dtype: DTypeLike,
) -> list[jax.Array]:
    """The even columns of the decoded matrix and its odd columns, [N, K/2] each, or it whole."""
    per_block = decode_scales(scales, nested)
    parts = (codes >> 4, codes & 15) if codes_per_byte(codebook) == 2 else (codes,)
    return [
        decode.scale_blocks(look_up(codebook, part), per_block, block // len(parts)).astype(dtype)
        for part in parts
    ]


def flat_rows(
    codes: jax.Array,
    scales: Scales,
    codebook: jax.Array,
    nested: Nested | None,
    block: int,
    shape: tuple[int, int],
    dtype: DTypeLike,
) -> jax.Array:
    """The decoded matrix [N, K] whose blocks run on from row to row."""
    flat = decode.dequantize_blockwise(
        codes, scales, codebook, nested, block=block, columns=shape[0] * shape[1], dtype=dtype
    )
    return flat.reshape(shape)
