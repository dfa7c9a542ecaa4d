"""Decoding 4-bit and 8-bit codes: the definition.

``value = round(codebook[code] * scale)``: the product in fp32, rounded once to the wanted dtype.
With zero points, ``round((codebook[code] - zero) * scale)``.

A select tree over the 16 entries would hold dozens of fp32 intermediates of the matrix's size alive
on a GPU; the look-up into the codebook holds none, and is the fastest on a CPU besides.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jqlora_kernels.layouts import BITSANDBYTES, repack
from jqlora_kernels.operands import select
from jqlora_kernels.packing import codes_per_byte, unpack
from jqlora_kernels.scales import Affine, Nested, Scales, decode_scales, look_up


def dequantize_blockwise(
    codes: jax.Array,
    scales: Scales,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    columns: int,
    dtype: DTypeLike,
    layout: str = BITSANDBYTES,
) -> jax.Array:
    """Values [*lead, rows, columns]; with ``index`` those of one element of the one lead axis.

    ``codebook`` f32 [16] goes with ``codes`` uint8 [*lead, rows, ceil(columns/2)], element 2j in
    the high nibble; f32 [256] with one code to a byte, [*lead, rows, columns]. ``scales``
    [*lead, rows, ceil(columns/block)] is f32 or, with ``nested``, uint8, or an ``Affine``.
    ``layout`` is that of the codes: another than bitsandbytes' is undone first, at the price of a
    copy of the codes of the one element.
    """
    codes, scales, nested = select(codes, scales, nested, index)
    codes = repack(codes, layout, BITSANDBYTES, codes_per_byte(codebook))
    if codes_per_byte(codebook) == 2:
        codes = unpack(codes)[..., :columns]
    values = look_up(codebook, codes)
    return scale_blocks(values, decode_scales(scales, nested), block).astype(dtype)


def scale_blocks(values: jax.Array, scales: Scales, block: int) -> jax.Array:
    """fp32 [..., n] times the scale of each block, [..., ceil(n/block)], after its zero point is
    taken off where there is one; the last block may be short."""
    *lead, count = values.shape
    if isinstance(scales, Affine):
        zeros = jnp.repeat(scales.zeros.astype(jnp.float32), block, axis=-1)[..., :count]
        values, scales = values - zeros, scales.scales
    if count % block:
        return values * jnp.repeat(scales, block, axis=-1)[..., :count]
    return (values.reshape(*lead, -1, block) * scales[..., None]).reshape(values.shape)
