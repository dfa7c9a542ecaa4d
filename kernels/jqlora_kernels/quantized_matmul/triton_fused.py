"""Products on the tensor cores with tiles of the matrix decoded in the kernel, Pallas-Triton.

The nibbles of a byte are neighbouring columns. Rather than interleave what it decodes, the kernel
takes ``x`` as even columns and odd columns, [2, M, K/2], and adds two products. With one code to a
byte there is one part, all of ``x``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from jqlora_kernels import triton_tiles
from jqlora_kernels.packing import codes_per_byte

BYTES = 32
"""Bytes of codes a step takes from each row of the matrix, at most a block."""


class Tile(NamedTuple):
    """What one program computes, ``rows`` of ``x`` by ``features`` of the product; 16 is the least
    that tensor cores take."""

    rows: int
    features: int
    block: int
    bytes: int

    @staticmethod
    def of(count: int, dtype: DTypeLike, block: int, parts: int) -> "Tile":
        """The tile for ``count`` rows and blocks of ``block`` elements, ``parts`` to a byte.

        Exact products of fp32 do without tensor cores, and larger tiles would spill registers.
        """
        small = count <= 16 or jnp.dtype(dtype) == jnp.float32
        rows, features = (16, 32) if small else (64, 64)
        return Tile(rows, features, block, min(block // parts, BYTES))


def split_columns(x: jax.Array, parts: int) -> jax.Array:
    """``x`` [M, K] as [parts, M, K/parts]: the columns that each code of a byte meets."""
    return jnp.stack([x[:, i::parts] for i in range(parts)]) if parts > 1 else x[None]


def multiply(
    x: jax.Array,
    operands: tuple[jax.Array, ...],
    *,
    block: int,
    features: int,
    interpret: bool = False,
) -> jax.Array:
    """``x`` [M, K] times the matrix of ``triton_tiles.flat_operands``: [M, N]."""
    count, columns = x.shape
    parts = codes_per_byte(operands[3])
    tile = Tile.of(count, x.dtype, block, parts)
    return triton_tiles.call(
        functools.partial(forward_tile, tile=tile, shape=(features, columns)),
        (split_columns(x, parts), *operands),
        grid=(pl.cdiv(count, tile.rows), pl.cdiv(features, tile.features)),
        out=jax.ShapeDtypeStruct((count, features), x.dtype),
        warps=4,
        stages=3,
        interpret=interpret,
        name="quantized_matmul",
    )


def multiply_transposed(
    g: jax.Array,
    operands: tuple[jax.Array, ...],
    *,
    block: int,
    features: int,
    interpret: bool = False,
) -> jax.Array:
    """``g`` [M, N] times the matrix the other way round: [M, K = ``features``]."""
    count, outputs = g.shape
    parts = codes_per_byte(operands[3])
    tile = Tile.of(count, g.dtype, block, parts)
    columns = features // parts
    by_part = triton_tiles.call(
        functools.partial(transposed_tile, tile=tile, shape=(outputs, features)),
        (g, *operands),
        grid=(pl.cdiv(count, tile.rows), columns // tile.bytes),
        out=jax.ShapeDtypeStruct((parts, count, columns), g.dtype),
        warps=4,
        stages=3,
        interpret=interpret,
        name="quantized_matmul_transposed",
    )
    return jnp.moveaxis(by_part, 0, -1).reshape(count, features)


def weight_tile(refs, row, first_byte, shape, tile: Tile, dtype):
    """Decoded columns of the matrix's rows ``row``, [rows, bytes] of ``dtype`` for each part."""
    layers, codes, scales, codebook, *nested = refs
    features, columns = shape
    parts = codes_per_byte(codebook)
    layer = layers[0]
    inside = row < features
    block = row * (columns // tile.block) + parts * first_byte // tile.block
    scale = triton_tiles.load_scales(scales, tuple(nested), layer, block, inside)
    column = first_byte + jnp.arange(tile.bytes, dtype=jnp.int32)
    byte = row[:, None] * (columns // parts) + column[None, :]
    mask = jnp.broadcast_to(inside[:, None], byte.shape)
    decoded = triton_tiles.decode(codes, codebook, layer, byte, mask)
    return tuple((values * scale[:, None]).astype(dtype) for values in decoded)


def forward_tile(x, *refs, tile: Tile, shape: tuple[int, int]) -> None:
    """``tile.rows`` x ``tile.features`` of the product, along all of K."""
    *weight, out = refs
    _, count, width = x.shape
    m = pl.program_id(0) * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    n = pl.program_id(1) * tile.features + jnp.arange(tile.features, dtype=jnp.int32)

    def step(i, total):
        first = i * tile.bytes
        decoded = weight_tile(weight, n, first, shape, tile, x.dtype)
        column = first + jnp.arange(tile.bytes, dtype=jnp.int32)
        mask = jnp.broadcast_to((m < count)[:, None], (tile.rows, tile.bytes))
        for part, values in enumerate(decoded):
            rows = plt.load(x.at[part, m[:, None], column[None, :]], mask=mask, other=0)
            total += dot(rows, values, ((1,), (1,)))
        return total

    zero = jnp.zeros((tile.rows, tile.features), jnp.float32)
    total = lax.fori_loop(0, width // tile.bytes, step, zero)
    mask = (m < count)[:, None] & (n < shape[0])[None, :]
    plt.store(out.at[m[:, None], n[None, :]], total.astype(out.dtype), mask=mask)


def transposed_tile(g, *refs, tile: Tile, shape: tuple[int, int]) -> None:
    """``tile.rows`` x ``tile.bytes`` of every part of the gradient, along all of N.

    The decoded tile goes through shared memory, being the right operand contracted over its rows.
    As the left one (dx.T = W.T @ g.T) it was compiled too, for an H100 at 64 rows: shared memory
    fell from 43,520 to 31,232 bytes, but registers rose from 126 to 164, so that three programs
    fit a multiprocessor instead of four.
    """
    *weight, out = refs
    count, features = g.shape
    m = pl.program_id(0) * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    first = pl.program_id(1) * tile.bytes

    def step(i, totals):
        n = i * tile.features + jnp.arange(tile.features, dtype=jnp.int32)
        decoded = weight_tile(weight, n, first, shape, tile, g.dtype)
        mask = (m < count)[:, None] & (n < features)[None, :]
        rows = plt.load(g.at[m[:, None], n[None, :]], mask=mask, other=0)
        return tuple(
            total + dot(rows, values, ((1,), (0,)))
            for total, values in zip(totals, decoded, strict=True)
        )

    zero = jnp.zeros((tile.rows, tile.bytes), jnp.float32)
    steps = pl.cdiv(features, tile.features)
    totals = lax.fori_loop(0, steps, step, (zero,) * out.shape[0])
    column = first + jnp.arange(tile.bytes, dtype=jnp.int32)
    mask = jnp.broadcast_to((m < count)[:, None], (tile.rows, tile.bytes))
    for part, total in enumerate(totals):
        store = out.at[part, m[:, None], column[None, :]]
        plt.store(store, total.astype(out.dtype), mask=mask)


def dot(a: jax.Array, b: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Contraction accumulated in fp32. Without the precision fp32 operands were cut to TF32."""
    return lax.dot_general(
        a,
        b,
        (axes, ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
