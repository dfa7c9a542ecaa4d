"""Blockwise quantization to packed 4-bit codes, and of scales to 8-bit codes: the definition."""

import jax
import jax.numpy as jnp
from jax import lax

from jqlora_kernels.scales import GROUP, look_up

# The smallest normal number: XLA flushes denormals to zero on a CPU, so a smaller guard (as the
# 1e-38 of bitsandbytes) would itself become zero and turn an all-zero block into NaN.
TINY = float(jnp.finfo(jnp.float32).tiny)


def quantize_blockwise(
    values: jax.Array, levels: jax.Array, codes: jax.Array, *, block: int
) -> tuple[jax.Array, jax.Array]:
    """Packed codes uint8 [ceil(n/2)] and scales f32 [ceil(n/block)] of ``values`` [n].

    Each block is divided by its largest magnitude and every element takes the code of the nearest
    level, a tie the lower one. Element 2j is the high nibble of byte j. ``levels`` f32 [m] ascend
    and ``codes`` uint8 [m] are written for them. A last, shorter block is allowed, and an odd last
    nibble is the code of 0. Like bitsandbytes' own, whole blocks are multiplied by the reciprocal
    of their scale while a short last one is divided by it.
    """
    count = values.shape[0]
    whole = count - count % block
    blocks = values[:whole].astype(jnp.float32).reshape(-1, block)
    scales = jnp.max(jnp.abs(blocks), axis=1, initial=0.0)
    scaled = (blocks * (1.0 / jnp.maximum(scales, TINY))[:, None]).reshape(-1)
    if count > whole:
        tail = values[whole:].astype(jnp.float32)
        scale = jnp.max(jnp.abs(tail))
        scales = jnp.append(scales, scale)
        scaled = jnp.concatenate([scaled, tail / jnp.maximum(scale, TINY)])
    if count % 2:
        scaled = jnp.append(scaled, jnp.float32(0.0))
    return pack(look_up(codes, nearest_level(scaled, levels))), scales


def pack(nibbles: jax.Array) -> jax.Array:
    """Codes uint8 [2m] two to a byte, the first in the high nibble: uint8 [m].

    Each pair is read as one little-endian 16-bit number. Slicing out every other code instead would
    be fused with all that comes before and keep XLA from vectorizing it on a CPU: four times
    slower.
    """
    pairs = lax.bitcast_convert_type(nibbles.reshape(-1, 2), jnp.uint16)
    return ((pairs << 4) | (pairs >> 8)).astype(jnp.uint8)


def nearest_level(scaled: jax.Array, levels: jax.Array) -> jax.Array:
    """int32 index of the level nearest to each value; a midpoint belongs to the lower level.

    Counting the midpoints below a value takes 15 vectorized comparisons, faster than any search.
    """
    bounds = (levels[:-1] + levels[1:]) / 2
    index = jnp.zeros(scaled.shape, jnp.int32)
    for i in range(bounds.shape[0]):
        index += (scaled > bounds[i]).astype(jnp.int32)
    return index


def quantize_scales(scales: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Double quantization of f32 [n]: codes uint8 [n], group scales f32 [ceil(n/256)], offset f32.

    The mean is taken off, groups of 256 are divided by their largest magnitude, and each value
    takes the nearest entry of the ascending ``table`` f32 [256] (QLoRA §3, "Double Quantization").
    """
    count = scales.shape[0]
    offset = jnp.mean(scales)
    groups = jnp.pad(scales - offset, (0, -count % GROUP)).reshape(-1, GROUP)
    absmax = jnp.max(jnp.abs(groups), axis=1)
    scaled = groups * (1.0 / jnp.maximum(absmax, TINY))[:, None]
    bounds = (table[:-1] + table[1:]) / 2
    codes = jnp.searchsorted(bounds, scaled.reshape(-1)[:count], side="left")
    return codes.astype(jnp.uint8), absmax, offset
