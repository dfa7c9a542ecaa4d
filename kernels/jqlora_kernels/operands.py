"""What a stored matrix, or a stack of them, is handed to an operation as."""

from typing import TypeAlias

import jax

from jqlora_kernels.scales import Nested

Operands: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, Nested | None, jax.Array | None]
"""``(codes, scales, codebook, nested, index)``."""


def select(
    codes: jax.Array, scales: jax.Array, nested: Nested | None, index: jax.Array | None
) -> tuple[jax.Array, jax.Array, Nested | None]:
    """Element ``index`` of the lead axis of every operand, or the operands as they are."""
    if index is None:
        return codes, scales, nested

    def take(stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)

    if nested is not None:
        nested = (take(nested[0]), take(nested[1]), nested[2])
    return take(codes), take(scales), nested
