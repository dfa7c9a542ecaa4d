"""What ``vmap`` makes of the operations: never a copy of the codes for every element of a batch.

A batch of ``x`` with one matrix is more rows of ``x``. A batch of matrices (experts) is a stack,
and a stack is worked on by index, one matrix after the other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jqlora_kernels.operands import Operands


def batchable_product(
    product: Callable[[jax.Array, Operands], jax.Array],
) -> Callable[[jax.Array, Operands], jax.Array]:
    """``product(x [M, K], operands) -> [M, N]`` with the batching rules above.

    The rule raises ``ValueError`` for a batch of codebooks: they are constants.
    """

    @custom_vmap
    def call(x: jax.Array, operands: Operands) -> jax.Array:
        return product(x, operands)

    @call.def_vmap
    def rule(size: int, batched: Any, x: jax.Array, operands: Operands) -> tuple[jax.Array, bool]:
        x_batched, operands_batched = batched
        if not any(jax.tree.leaves(operands_batched)):
            y = call(x.reshape(size * x.shape[1], x.shape[2]), operands)
            return y.reshape(size, x.shape[1], -1), True
        *stack, index = stacked(size, operands, operands_batched)
        if x_batched:
            return lax.map(lambda xi: call(xi[0], (*stack, xi[1])), (x, index)), True
        return lax.map(lambda i: call(x, (*stack, i)), index), True

    return call


def batchable_decode(
    decode: Callable[[Operands], jax.Array],
) -> Callable[[Operands], jax.Array]:
    """``decode(operands) -> [*lead, rows, columns]``, where a batch of matrices is one more lead
    axis, or with an index decoded one after the other."""

    @custom_vmap
    def call(operands: Operands) -> jax.Array:
        return decode(operands)

    @call.def_vmap
    def rule(size: int, batched: Any, operands: Operands) -> tuple[jax.Array, bool]:
        (operands_batched,) = batched
        if operands[-1] is None:
            return call((*whole(size, operands, operands_batched), None)), True
        *stack, index = stacked(size, operands, operands_batched)
        return lax.map(lambda i: call((*stack, i)), index), True

    return call


def stacked(size: int, operands: Operands, batched: Any) -> Operands:
    """Operands with one lead axis, and int32 [size]: which element of it each batch element is."""
    index, index_batched = operands[-1], batched[-1]
    if not any(jax.tree.leaves(batched[:-1])):
        assert index is not None  # something is batched
        return (*operands[:-1], index)
    codes, scales, codebook, nested = whole(size, operands, batched)
    numbers = jnp.arange(size, dtype=jnp.int32)
    if index is None:
        return codes, scales, codebook, nested, numbers
    layers = codes.shape[1]
    numbers = numbers * layers + (index if index_batched else jnp.broadcast_to(index, (size,)))

    def joined(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(size * layers, *leaf.shape[2:])

    if nested is not None:
        nested = (joined(nested[0]), joined(nested[1]), nested[2])
    return joined(codes), jax.tree.map(joined, scales), codebook, nested, numbers


def whole(size: int, operands: Operands, batched: Any) -> tuple[Any, Any, Any, Any]:
    """(codes, scales, codebook, nested) with the batch in front of every stored leaf."""
    codes, scales, codebook, nested, _ = operands
    codes_b, scales_b, codebook_b, nested_b, _ = batched
    if codebook_b or (nested is not None and nested_b[2]):
        raise ValueError("a codebook or table of scales cannot differ along a batch")

    def batch(leaf: jax.Array, has: bool) -> jax.Array:
        return leaf if has else jnp.broadcast_to(leaf, (size, *leaf.shape))

    if nested is not None:
        nested = (batch(nested[0], nested_b[0]), batch(nested[1], nested_b[1]), nested[2])
    return batch(codes, codes_b), jax.tree.map(batch, scales, scales_b), codebook, nested
