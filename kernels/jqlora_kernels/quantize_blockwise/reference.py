"""Blockwise quantization to 4-bit or 8-bit codes, of weights, states and scales: the definition."""

import jax
import jax.numpy as jnp

from jqlora_kernels.packing import pack
from jqlora_kernels.scales import GROUP, look_up

# The smallest normal number: XLA flushes denormals to zero on a CPU, so a smaller guard (as the
# 1e-38 of bitsandbytes) would itself become zero and turn an all-zero block into NaN.
TINY = float(jnp.finfo(jnp.float32).tiny)


def quantize_blockwise(
    values: jax.Array, levels: jax.Array, codes: jax.Array | None = None, *, block: int
) -> tuple[jax.Array, jax.Array]:
    """Codes uint8 and scales f32 [ceil(n/block)] of ``values`` [n] (fp32, bf16 or fp16).

    Each block is divided by its largest magnitude and every element takes the code of the nearest
    level, a tie the lower one. ``levels`` f32 [m] ascend; ``codes`` uint8 [m] are written for them,
    by default 0 ... m-1. ``m`` is at most 16 or above 16:

    * up to 16 levels are 4-bit codes, packed [ceil(n/2)] with element 2j in the high nibble of byte
      j; an odd last nibble is the code of 0;
    * more, at most 256, are 8-bit codes [n]. Any table serves, signed or unsigned (an unsigned one
      has no level below 0, and what lies below takes the lowest): the 8-bit states of an optimizer
      are ``quantize_blockwise(state, table, block=256)``, and come back by
      ``dequantize_blockwise(codes[None], scales[None], table, block=256, columns=n, dtype=...)[0]``
      (Dettmers et al. 2021, arXiv 2110.02861, block-wise dynamic quantization).

    A last, shorter block is allowed. Like bitsandbytes' own, whole blocks are multiplied by the
    reciprocal of their scale while a short last one is divided by it. A block whose magnitudes are
    all below the smallest normal number of fp32 takes the codes of 0. Raises ``ValueError`` for
    more than 256 levels.
    """
    if levels.shape[0] > 256:
        raise ValueError(f"{levels.shape[0]} levels do not fit an 8-bit code")
    scaled, scales = scale_to_one(values, block)
    packed = levels.shape[0] <= 16
    if packed and values.shape[0] % 2:
        scaled = jnp.append(scaled, jnp.float32(0.0))
    index = nearest_level(scaled, levels)
    found = index.astype(jnp.uint8) if codes is None else look_up(codes, index)
    return (pack(found) if packed else found), scales


def scale_to_one(values: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """``values`` [n] divided by the largest magnitude of their block, and those [ceil(n/block)]."""
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
    return scaled, scales


def nearest_level(scaled: jax.Array, levels: jax.Array) -> jax.Array:
    """int32 index of the level nearest to each value; a midpoint belongs to the lower level.

    Counting the midpoints below a value takes 15 vectorized comparisons for 16 levels, faster than
    any search; for 256 levels a binary search takes 8.
    """
    bounds = (levels[:-1] + levels[1:]) / 2
    if bounds.shape[0] > 15:
        return jnp.searchsorted(bounds, scaled, side="left").astype(jnp.int32)
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
    codes = nearest_level(scaled.reshape(-1)[:count], table)
    return codes.astype(jnp.uint8), absmax, offset
