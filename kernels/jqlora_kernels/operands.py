"""What a stored matrix, or a stack of them, is handed to an operation as."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from jqlora_kernels.scales import Affine, Nested, Scales

Operands: TypeAlias = tuple[jax.Array, Scales, jax.Array, Nested | None, jax.Array | None]
"""``(codes, scales, codebook, nested, index)``."""


def select(
    codes: jax.Array, scales: Scales, nested: Nested | None, index: jax.Array | None
) -> tuple[jax.Array, Any, Nested | None]:
    """Element ``index`` of the lead axis of every operand, or the operands as they are."""
    if index is None:
        return codes, scales, nested

    def take(stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)

    if nested is not None:
        nested = (take(nested[0]), take(nested[1]), nested[2])
    return take(codes), jax.tree.map(take, scales), nested


def limited(
    backends: Mapping[str, Callable[..., jax.Array]], block: int
) -> dict[str, Callable[..., jax.Array]]:
    """``backends`` of an operation, all but "reference" refusing what no kernel decodes: zero
    points, and blocks of no power of two, of which a kernel's tile might hold parts of two."""

    def refusing(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def serve(*operands: Any) -> jax.Array:
            if any(isinstance(operand, Affine) for operand in operands):
                raise NotImplementedError("zero points: the kernel decodes codebook and scale only")
            if block & (block - 1):
                raise NotImplementedError(f"{block=} is no power of two")
            return kernel(*operands)

        return serve

    return {
        name: backend if name == "reference" else refusing(backend)
        for name, backend in backends.items()
    }
