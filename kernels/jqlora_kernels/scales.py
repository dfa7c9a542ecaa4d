"""Second-level scales: the scales of the blocks, themselves stored as 8-bit codes."""

from typing import TypeAlias

import jax
import jax.numpy as jnp

GROUP = 256
"""How many scales share one second-level scale."""

Nested: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""``(absmax f32 [*lead, groups], offset f32 [*lead], table f32 [256])``."""


def decode_scales(scales: jax.Array, nested: Nested | None) -> jax.Array:
    """Scales as fp32 [*lead, rows, blocks]: as they are, or ``table[code] * absmax + offset``.

    Groups of 256 run over the flattened (rows, blocks) of each lead element.
    """
    if nested is None:
        return scales
    absmax, offset, table = nested
    *lead, rows, blocks = scales.shape
    count = rows * blocks
    codes = scales.reshape(*lead, count)
    group_scale = jnp.repeat(absmax, GROUP, axis=-1)
    products = look_up(table, codes) * group_scale[..., :count]
    return add_rounded(products, offset[..., None]).reshape(scales.shape)


def add_rounded(products: jax.Array, offset: jax.Array) -> jax.Array:
    """``products + offset``, where a product is rounded before it is added, as in bitsandbytes.

    Compilers fuse a multiplication and an addition into one rounding, on CPUs as on GPUs, and
    scales would differ from those in the last bit. XLA's barriers do not stop them; a minimum with
    the largest number does, and changes nothing.
    """
    return jnp.minimum(products, jnp.finfo(jnp.float32).max) + offset


def look_up(table: jax.Array, codes: jax.Array) -> jax.Array:
    """``table[codes]`` without bounds checks, which take half of the time on a CPU.

    An 8-bit code cannot leave a table of 256, nor a nibble one of 16.
    """
    return table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
