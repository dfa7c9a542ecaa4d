"""Codes in bytes: those of a codebook of 16 go two to a byte, those of one of 256 one to a byte.

The size of the codebook is static and says which, so that no operation needs to be told twice.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def codes_per_byte(codebook: jax.Array | np.ndarray) -> int:
    """2 for a codebook [16], 1 for one of [256]; ``ValueError`` for another size."""
    (size,) = codebook.shape
    if size not in (16, 256):
        raise ValueError(f"a codebook has 16 or 256 entries, not {size}")
    return 2 if size == 16 else 1


def pack(nibbles: jax.Array) -> jax.Array:
    """Codes uint8 [2m] two to a byte, the first in the high nibble: uint8 [m].

    Each pair is read as one little-endian 16-bit number. Slicing out every other code instead would
    be fused with all that comes before and keep XLA from vectorizing it on a CPU: four times
    slower.
    """
    pairs = lax.bitcast_convert_type(nibbles.reshape(-1, 2), jnp.uint16)
    return ((pairs << 4) | (pairs >> 8)).astype(jnp.uint8)


def unpack(codes: jax.Array) -> jax.Array:
    """The inverse of ``pack`` along the last axis: uint8 [..., m] to [..., 2m]."""
    nibbles = jnp.stack([codes >> 4, codes & 15], axis=-1)
    return nibbles.reshape(*codes.shape[:-1], 2 * codes.shape[-1])
