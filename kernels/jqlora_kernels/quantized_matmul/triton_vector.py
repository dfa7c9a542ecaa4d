"""A few rows of ``x`` times the matrix without tensor cores, Pallas-Triton.

Reading the codes is what takes the time, so every program reads long runs of a few rows of them,
multiplies in fp32 as they come, and adds up once, at the end. Rows of ``x`` beyond ``ROWS`` read
the codes again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jqlora_kernels import triton_tiles
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.quantized_matmul.triton_fused import split_columns

ROWS = 4
"""Rows of ``x`` a program multiplies."""
FEATURES = 4
"""Rows of the matrix a program reads."""
BYTES = 256
"""Bytes a step reads of each."""


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
    rows = min(count, ROWS)
    return triton_tiles.call(
        functools.partial(vector_tile, block=block, rows=rows, shape=(features, columns)),
        (split_columns(x, codes_per_byte(operands[3])), *operands),
        grid=(pl.cdiv(features, FEATURES), pl.cdiv(count, rows)),
        out=jax.ShapeDtypeStruct((count, features), x.dtype),
        warps=4,
        stages=2,
        interpret=interpret,
        name="quantized_matmul_vector",
    )


def vector_tile(x, *refs, block: int, rows: int, shape: tuple[int, int]) -> None:
    """``rows`` x ``FEATURES`` of the product, along all of K; bytes as [blocks, bytes a block]."""
    layers, codes, scales, codebook, *nested, out = refs
    features, columns = shape
    parts, count, width = x.shape
    run = min(block // parts, BYTES)
    m = pl.program_id(1) * rows
    n = pl.program_id(0) * FEATURES + jnp.arange(FEATURES, dtype=jnp.int32)
    layer = layers[0]
    start = jnp.arange(BYTES // run, dtype=jnp.int32) * run
    offset = start[:, None] + jnp.arange(run, dtype=jnp.int32)[None, :]

    def step(i, totals):
        first = i * BYTES
        inside = (n < features)[:, None] & (first + start < width)[None, :]
        place = n[:, None] * (columns // block) + (parts * (first + start) // block)[None, :]
        scale = triton_tiles.load_scales(scales, tuple(nested), layer, place, inside)
        column = first + offset
        byte = n[:, None, None] * width + column[None, :, :]
        mask = (n < features)[:, None, None] & (column < width)[None, :, :]
        decoded = triton_tiles.decode(codes, codebook, layer, byte, mask)
        weights = [(values * scale[:, :, None]).astype(x.dtype) for values in decoded]
        return tuple(
            total + products(x, weights, m + row, column) for row, total in enumerate(totals)
        )

    zero = jnp.zeros((FEATURES, *offset.shape), jnp.float32)
    totals = lax.fori_loop(0, pl.cdiv(width, BYTES), step, (zero,) * rows)
    for row, total in enumerate(totals):
        y = jnp.sum(jnp.sum(total, axis=2), axis=1)
        mask = (n < features) & (m + row < count)
        plt.store(out.at[m + row, n], y.astype(out.dtype), mask=mask)


def products(x, weights, row, column):
    """Row ``row`` of ``x`` at the bytes ``column`` times ``weights`` for each part, fp32."""
    _, count, width = x.shape
    mask = (column < width) & (row < count)
    total = None
    for part, values in enumerate(weights):
        taken = plt.load(x.at[part, row, column], mask=mask, other=0).astype(jnp.float32)
        product = values.astype(jnp.float32) * taken[None, :, :]
        total = product if total is None else total + product
    return total
