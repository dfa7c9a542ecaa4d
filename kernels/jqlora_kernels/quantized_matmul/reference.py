"""Products with a block-quantized matrix: the definition.

The matrix is stored by output rows, (N, K), and both products contract it where it lies:
``y = x @ W.T`` over K and ``dx = g @ W`` over N, so that no transposed copy is ever made.

Decoding need not put the two nibbles of a byte side by side. It writes all high nibbles (the even
columns) and then all low ones, and takes ``x`` in the same order; contracting over permuted columns
changes nothing but the order of summation, and halves the time of the decode on a CPU.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jqlora_kernels.dequantize_blockwise import reference as decode
from jqlora_kernels.scales import Nested, decode_scales, look_up


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
) -> jax.Array:
    """``x`` [M, K] times the decoded matrix (N = ``features`` rows of K): [M, N] in ``x.dtype``.

    ``codes`` uint8 [N, K/2] and ``scales`` [N, K/block] if K is a multiple of ``block``; otherwise
    [1, ceil(N*K/2)] and [1, ceil(N*K/block)], blocks running on from row to row. Weights are
    rounded to ``x.dtype``, products accumulate in fp32.
    """
    codes, scales, nested = decode.select(codes, scales, nested, index)
    if x.shape[1] % block == 0:
        weight = even_odd_columns(codes, scales, codebook, nested, block, x.dtype)
        x = split_columns(x)
    else:
        weight = flat_rows(codes, scales, codebook, nested, block, (features, x.shape[1]), x.dtype)
    return contract(x, weight, 1)


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
) -> jax.Array:
    """``g`` [M, N] times the decoded matrix the other way round: [M, K = ``features``].

    The barrier ties the decode to ``g``: otherwise XLA would find the same decode in the forward
    pass and keep its result, the very array that storing codes is meant to avoid.
    """
    codes, scales, nested = decode.select(codes, scales, nested, index)
    codes, g = lax.optimization_barrier((codes, g))
    if features % block == 0:
        weight = even_odd_columns(codes, scales, codebook, nested, block, g.dtype)
        return join_columns(contract(g, weight, 0))
    shape = (g.shape[1], features)
    return contract(g, flat_rows(codes, scales, codebook, nested, block, shape, g.dtype), 0)


def contract(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """``x``'s last axis with ``axis`` of the matrix, accumulated in fp32, in ``x.dtype``."""
    product = lax.dot_general(
        x, weight, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product.astype(x.dtype)


def even_odd_columns(
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None,
    block: int,
    dtype: DTypeLike,
) -> jax.Array:
    """The decoded matrix [N, K], its even columns first and its odd columns after them."""
    per_block = decode_scales(scales, nested)
    halves = [
        decode.scale_blocks(look_up(codebook, nibbles), per_block, block // 2).astype(dtype)
        for nibbles in (codes >> 4, codes & 15)
    ]
    return jnp.concatenate(halves, axis=1)


def flat_rows(
    codes: jax.Array,
    scales: jax.Array,
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


def split_columns(x: jax.Array) -> jax.Array:
    """[M, K] with its even columns first."""
    return jnp.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)


def join_columns(x: jax.Array) -> jax.Array:
    """Inverse of :func:`split_columns`."""
    rows, columns = x.shape
    return jnp.stack([x[:, : columns // 2], x[:, columns // 2 :]], axis=-1).reshape(rows, columns)
