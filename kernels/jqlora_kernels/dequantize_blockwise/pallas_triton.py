"""Decoding as a Pallas-Triton kernel, both levels of scales included.

Blocks that end with the rows and blocks that run on are the same thing in memory, so the kernel
sees every matrix as one row of bytes. One program decodes ``TILE`` of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from jqlora_kernels import triton_tiles
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.scales import Nested

TILE = 512
"""Bytes a program decodes."""


def dequantize_blockwise(
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    columns: int,
    dtype: DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """As ``reference.dequantize_blockwise``; values are equal bit for bit.

    Raises ``NotImplementedError`` for other dtypes than fp32, bf16 and fp16, for rows that end
    inside a block, and for matrices whose elements outnumber an int32.
    """
    rows = codes.shape[-2]
    triton_tiles.check_dtype(dtype)
    if rows > 1 and columns % block:
        raise NotImplementedError(
            f"{columns=} is no multiple of {block=}: rows must end with a block"
        )
    if rows * columns >= 2**31 - 2 * TILE:
        raise NotImplementedError(f"{rows * columns} elements cannot be numbered in an int32")
    lead = codes.shape[:-2] if index is None else ()
    operands = triton_tiles.flat_operands(codes, scales, codebook, nested, index)
    count = rows * columns
    values = triton_tiles.call(
        functools.partial(decode_tile, block=block, count=count),
        operands,
        grid=(math.prod(lead), pl.cdiv(operands[1].shape[1], TILE)),
        out=jax.ShapeDtypeStruct((math.prod(lead), count), dtype),
        warps=4,
        stages=1,
        interpret=interpret,
        name="dequantize_blockwise",
    )
    return values.reshape(*lead, rows, columns)


def decode_tile(layers, codes, scales, codebook, *refs, block: int, count: int) -> None:
    """One tile: runs of bytes that share a scale along the columns, scales along the rows."""
    *nested, out = refs
    parts = codes_per_byte(codebook)
    run = min(block // parts, TILE)
    place = pl.program_id(0)
    layer = layers[place]
    start = pl.program_id(1) * TILE + jnp.arange(TILE // run, dtype=jnp.int32) * run
    scale = triton_tiles.load_scales(
        scales, tuple(nested), layer, start // (block // parts), mask=parts * start < count
    )
    byte = start[:, None] + jnp.arange(run, dtype=jnp.int32)[None, :]
    decoded = triton_tiles.decode(codes, codebook, layer, byte, mask=parts * byte < count)
    scaled = [(values * scale[:, None]).astype(out.dtype) for values in decoded]
    if parts == 1:
        plt.store(out.at[place, byte], scaled[0], mask=byte < count)
        return
    element = 2 * byte[:, :, None] + jnp.arange(2, dtype=jnp.int32)[None, None, :]
    plt.store(out.at[place, element], jnp.stack(scaled, axis=-1), mask=element < count)
