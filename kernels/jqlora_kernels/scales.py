"""What stands beside the codes of a block: its scale, which may itself be an 8-bit code, and a
zero point where there is one."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

GROUP = 256
"""How many scales share one second-level scale."""

Nested: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""``(absmax f32 [*lead, groups], offset f32 [*lead], table f32 [256])``."""


class Affine(NamedTuple):
    """Scales of blocks that have zero points: an element is ``(codebook[code] - zero) * scale``.

    ``scales`` f32 and ``zeros`` int16, both [*lead, rows, blocks]. Stands where scales stand.
    """

    scales: jax.Array
    zeros: jax.Array


Scales: TypeAlias = jax.Array | Affine


def decode_scales(scales: Scales, nested: Nested | None) -> Scales:
    """Scales as fp32 [*lead, rows, blocks]: as they are, or ``table[code] * absmax + offset``.

    Groups of 256 run over the flattened (rows, blocks) of each lead element. Zero points, which
    stay as they are, and a second level exclude each other (``ValueError``).
    """
    if nested is None:
        return scales
    if isinstance(scales, Affine):
        raise ValueError("scales with zero points have no second level")
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
