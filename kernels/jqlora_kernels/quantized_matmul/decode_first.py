"""Products by a matrix decoded beforehand and the vendor's GEMM: for many rows of ``x``, where a
fused kernel would decode every tile of the matrix again for every tile of rows.

``decode`` is the decoding kernel of a backend, all but its operands, ``columns`` and ``dtype``.
"""

from collections.abc import Callable

import jax
from jax import lax

from jqlora_kernels.operands import Operands
from jqlora_kernels.quantized_matmul.reference import contract


def multiply(
    decode: Callable[..., jax.Array], x: jax.Array, operands: Operands, features: int
) -> jax.Array:
    """``x`` [M, K] times the matrix of ``features`` rows: [M, N]."""
    return contract(x, decoded(decode, operands, (features, x.shape[1]), x), 1)


def multiply_transposed(
    decode: Callable[..., jax.Array], g: jax.Array, operands: Operands, features: int
) -> jax.Array:
    """``g`` [M, N] times the matrix the other way round: [M, K = ``features``]."""
    codes, scales, codebook, nested, index = operands
    # Tied to g, or XLA would keep the forward pass's decoded matrix for this one.
    codebook, g = lax.optimization_barrier((codebook, g))
    operands = (codes, scales, codebook, nested, index)
    return contract(g, decoded(decode, operands, (g.shape[1], features), g), 0)


def decoded(
    decode: Callable[..., jax.Array], operands: Operands, shape: tuple[int, int], x: jax.Array
) -> jax.Array:
    """The matrix [N, K] = ``shape`` in the dtype of ``x``."""
    columns = shape[0] * shape[1] // operands[0].shape[-2]
    return decode(*operands, columns=columns, dtype=x.dtype).reshape(shape)
