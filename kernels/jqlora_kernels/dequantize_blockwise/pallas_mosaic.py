"""Decoding for Hopper, as a Pallas-Mosaic kernel on codes in the layout ``HOPPER``.

Like the products of this backend it is compiled and interpreted, never yet run on a device. One
warp group a program decodes 64 rows by some spans of 128 columns: tiles of codes come in and tiles
of values go out by TMA, several in flight. Programs are small, so that a multiprocessor holds some
and one's arithmetic hides another's waiting.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jqlora_kernels.layouts import SPAN
from jqlora_kernels.mosaic_lookup import HALF, fill_table, table_of, table_scratch
from jqlora_kernels.mosaic_tiles import (
    BYTES,
    Storage,
    check,
    flat_operands,
    kernel,
    row_numbers,
    weight_tile,
)
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.scales import Nested

SPANS = 8
"""Spans a program decodes at most."""
STEPS = 2
"""Spans in flight."""
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


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
    layout: str,
    interpret: bool = False,
) -> jax.Array:
    """As ``reference.dequantize_blockwise``; values are equal bit for bit.

    Raises ``NotImplementedError`` for what ``check`` refuses (rows go by 64), and for other dtypes
    than fp32, bf16 and fp16. ``interpret`` as for the products.
    """
    rows = codes.shape[-2]
    check(codebook, (rows, columns), HALF, block, layout)
    if jnp.dtype(dtype) not in map(jnp.dtype, DTYPES):
        raise NotImplementedError(
            f"{jnp.dtype(dtype)}: the kernel takes float32, bfloat16, float16"
        )
    lead = codes.shape[:-2] if index is None else ()
    count, spans = math.prod(lead), columns // SPAN
    each = next(n for n in range(SPANS, 0, -1) if spans % n == 0)
    of = Storage(codes_per_byte(codebook), columns, block, jnp.float32, interpret)
    wide = 128 // jnp.dtype(dtype).itemsize
    lines = (plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(128))
    scratch = {"values": plgpu.SMEM((STEPS, HALF, SPAN), dtype, transforms=lines)}
    values = kernel(
        functools.partial(decode_tile, spans=each, of=of),
        jax.ShapeDtypeStruct((count, rows, columns), dtype),
        scratch | table_scratch(codebook, 1),
        {"layers": count, "rows": rows // HALF, "spans": spans // each},
        interpret,
    )(*flat_operands(codes, scales, codebook, nested, index))
    return values.reshape(*lead, rows, columns)


def decode_tile(layers, codes, book, *refs, values, table=None, spans: int, of: Storage) -> None:
    """64 rows by ``spans`` spans of one matrix."""
    *scales, out = refs
    place = lax.axis_index("layers")
    layer = layers[place]
    first = lax.axis_index("rows") * HALF
    start = lax.axis_index("spans") * spans
    shared = None if table is None else table.at[0]
    fill_table(book, shared, of.plain)
    found = table_of(book, shared, of.plain)
    rows = pl.ds(first, HALF)

    def step(at, codes_tile):
        span, slot = start + at[0], lax.rem(at[0], STEPS)
        row = first + row_numbers(of.plain)
        pair = weight_tile(codes_tile, found, scales, layer, row, span, out.dtype, of)
        plgpu.wait_smem_to_gmem(STEPS - 1, wait_read_only=True)  # for the slot's last values
        for half, weight in enumerate(pair):
            values[slot, :, pl.ds(half * HALF, HALF)] = weight
        plgpu.commit_smem()
        target = out.at[place, rows, pl.ds(span * SPAN, SPAN)]
        plgpu.copy_smem_to_gmem(values.at[slot], target)

    plgpu.emit_pipeline(
        step,
        grid=(spans,),
        in_specs=[plgpu.BlockSpec((HALF, of.span_bytes), lambda s: (0, s), transforms=BYTES)],
        max_concurrent_steps=min(STEPS, spans),
    )(codes.at[layer, rows, pl.ds(start * of.span_bytes, spans * of.span_bytes)])
    plgpu.wait_smem_to_gmem(0)
