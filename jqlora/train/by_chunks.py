"""Cross-entropy without the logits of a whole batch.

At a vocabulary of 128,256 the logits of 4,096 tokens are 2.1 GB in fp32, and softmax and gradient
make that three times. They need never be there together: the head is applied to a chunk of the
sequence, whose loss and gradient are taken at once, and what is kept is the gradient of the states
[B, T, D]. No product is computed twice, as rematerialization would: the backward pass only scales
what the forward pass left.

Chunks run along the sequence, so that a batch in pieces on several devices stays in them. The
vocabulary is not cut: the softmax over a piece of it cannot be finished before all pieces are
known, so products would be computed twice after all, for what a smaller chunk saves as well.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jqlora.attach import Bound
from jqlora.types import Variables

CHUNK_TOKENS = 512
"""Tokens of a chunk at least: with fewer, reading the head's matrix takes longer than multiplying
by it does."""
CHUNK_LOGITS = 2**24
"""Logits of a chunk, where that is more; 64 MiB in fp32."""

Head = Callable[[list[jax.Array], jax.Array, jax.Array], jax.Array]
"""``head(leaves, x [B, C, D], number of the chunk) -> logits [B, C, V]``."""


def summed_losses(
    apply: Callable[..., Any],
    variables: Variables,
    inputs: dict[str, Any],
    targets: jax.Array,
    counted: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    """Sum of ``-log p(target)`` over the ``counted`` positions, fp32 scalar.

    ``inputs`` are those of the model, and of its ``states``; ``targets`` int32 and ``counted`` bool
    [B, T]. The logits of all are made only where ``apply`` is not bound to a model whose states and
    head can be called apart.
    """
    if not isinstance(apply, Bound) or not hasattr(apply.model, "states"):
        return chunk_losses(apply(variables, **inputs, key=key).logits, targets, counted)
    reached: set[Any] = set()
    x = apply.partly(reached, variables, **inputs, key=key, method="states")
    leaves, structure = jax.tree.flatten((variables, key))

    def head(leaves: list[jax.Array], x: jax.Array, chunk: jax.Array) -> jax.Array:
        variables, key = jax.tree.unflatten(structure, leaves)
        key = None if key is None else jax.random.fold_in(key, chunk)
        return apply.partly(reached, variables, x, key=key, method="head")

    rows, tokens, _ = x.shape
    length = chunk_length(rows, tokens, apply.model.config.vocab_size)
    count = -(-tokens // length)
    chunks = tuple(in_chunks(a, count, length) for a in (x, targets, counted))
    uses = used(lambda leaves: head(leaves, chunks[0][0], jnp.int32(0)), leaves)
    apply.check(reached)
    return losses_of(head, tuple(uses), leaves, *chunks)


def chunk_length(rows: int, length: int, vocabulary: int) -> int:
    """Tokens of every row in a chunk, such that chunks are even."""
    most = max(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)
    parts = math.ceil(length / max(1, most // rows))
    return math.ceil(length / parts)


def in_chunks(a: jax.Array, count: int, length: int) -> jax.Array:
    """[B, T, ...] as [count, B, length, ...], with zeros behind the last tokens."""
    behind = ((0, 0), (0, count * length - a.shape[1]), *((0, 0) for _ in a.shape[2:]))
    chunks = jnp.pad(a, behind).reshape(a.shape[0], count, length, *a.shape[2:])
    return jnp.moveaxis(chunks, 1, 0)


def used(function: Callable[..., Any], leaves: list[jax.Array]) -> list[bool]:
    """Which leaves the result depends on."""
    jaxpr = jax.make_jaxpr(function)(leaves).jaxpr
    needed = {id(v) for v in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in equation.outvars):
            needed |= {id(v) for v in equation.invars}
    return [id(v) in needed for v in jaxpr.invars]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def losses_of(
    head: Head,
    uses: tuple[bool, ...],
    leaves: list[jax.Array],
    x: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
) -> jax.Array:
    """The sum over chunks ``x`` [count, B, C, D], ``targets`` and ``counted`` [count, B, C].

    ``uses`` says which leaves the head depends on.
    """

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        chunk, x, targets, counted = part
        return total + chunk_losses(head(leaves, x, chunk), targets, counted), None

    return over_chunks(add, jnp.zeros((), jnp.float32), x, targets, counted)[0]


def forward(
    head: Head, uses: tuple[bool, ...], leaves: Any, x: Any, targets: Any, counted: Any
) -> tuple[jax.Array, tuple[list[jax.Array | None], jax.Array]]:
    """The sum, and as residuals its gradients for the leaves that are differentiated, and x."""
    values = [leaf.value for leaf in leaves]
    wanted = [use and leaf.perturbed for use, leaf in zip(uses, leaves, strict=True)]

    def add(carry: Any, part: Any) -> tuple[Any, jax.Array]:
        total, gradients = carry
        chunk, x, targets, counted = part

        def losses(trained: list[jax.Array], x: jax.Array) -> jax.Array:
            given = iter(trained)
            every = [next(given) if want else v for want, v in zip(wanted, values, strict=True)]
            return chunk_losses(head(every, x, chunk), targets, counted)

        value, pull = jax.vjp(losses, trained, x)
        more, gradient = pull(jnp.ones_like(value))
        return (total + value, jax.tree.map(jnp.add, gradients, more)), gradient

    trained = [value for want, value in zip(wanted, values, strict=True) if want]
    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained))
    (total, found), of_x = over_chunks(add, start, x.value, targets.value, counted.value)
    gradients = iter(found)
    return total, ([next(gradients) if want else None for want in wanted], of_x)


def backward(
    head: Head, uses: tuple[bool, ...], residuals: Any, cotangent: jax.Array
) -> tuple[Any, ...]:
    """The gradients scaled."""
    gradients, of_x = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), residuals)
    return gradients, of_x, None, None


losses_of.defvjp(forward, backward, symbolic_zeros=True)


def over_chunks(add: Callable[..., Any], start: Any, *chunks: jax.Array) -> tuple[Any, Any]:
    """A scan over the chunks and their numbers."""
    count = len(chunks[0])
    return lax.scan(add, start, (jnp.arange(count, dtype=jnp.int32), *chunks), unroll=count == 1)


def chunk_losses(logits: jax.Array, targets: jax.Array, counted: jax.Array) -> jax.Array:
    """The sum over the counted positions of logits [..., V], which are taken to fp32."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.where(counted, losses, 0.0).sum()
