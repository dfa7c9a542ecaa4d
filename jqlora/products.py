"""Dense products in 16 bits that are fast on a CPU too.

XLA on a CPU multiplies bf16 matrices by the processor's own instructions for them only where the
result is wanted in fp32. Wanted in bf16, both operands are converted to fp32 first, several times
slower; and the transpose that automatic differentiation finds for the fast product has one operand
in fp32, and is slow again. So the result is rounded here, once, as it is anyway, and the gradient
has a rule of its own. On other platforms, and in fp32, this is ``lax.dot_general``.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jqlora.platforms import traced_platform


def dot_general(
    x: jax.Array,
    y: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """``lax.dot_general``, to be given to ``nn.Dense``.

    The last axis of ``x`` [..., K] by either one of a matrix ``y`` takes the fast way where
    nothing else is asked for.
    """
    (of_x, of_y), _ = dimension_numbers
    plain = precision is None and preferred_element_type is None
    dense = y.ndim == 2 and tuple(of_x) == (x.ndim - 1,)
    half = x.dtype == y.dtype and x.dtype.itemsize == 2
    if not (plain and dense and half and traced_platform() == "cpu"):
        return lax.dot_general(x, y, dimension_numbers, precision, preferred_element_type)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    product: Any = _half_product(rows, y, of_y[0])
    return product.reshape(*x.shape[:-1], y.shape[1 - of_y[0]])


def contract(x: jax.Array, y: jax.Array, i: int, j: int) -> jax.Array:
    """Axis ``i`` of one matrix with axis ``j`` of another, in fp32."""
    return lax.dot_general(x, y, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _half_product(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """``x`` [M, K] by ``axis`` of the matrix ``w``, summed in fp32 and rounded to their dtype."""
    return contract(x, w, 1, axis).astype(x.dtype)


def _forward(x: Any, w: Any, axis: int) -> tuple[jax.Array, tuple[Any, Any]]:
    """The product, and of the operands those that the gradient of the other one needs."""
    kept = x.value if w.perturbed else None, w.value if x.perturbed else None
    return _half_product(x.value, w.value, axis), kept


def _backward(axis: int, kept: tuple[Any, Any], g: jax.Array) -> tuple[Any, Any]:
    """Cotangents of ``x`` and ``w``, None for the one that is not differentiated."""
    x, w = kept
    of_x = None if w is None else contract(g, w, 1, 1 - axis).astype(g.dtype)
    if x is None:
        return of_x, None
    return of_x, (contract(g, x, 0, 0) if axis else contract(x, g, 0, 0)).astype(g.dtype)


_half_product.defvjp(_forward, _backward, symbolic_zeros=True)
