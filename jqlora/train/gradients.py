"""Gradients of the adapters on one batch, by micro-batches.

Gradients of *summed* losses are summed, in fp32, and divided once by the token count of the whole
batch, so that ``accumulate`` changes memory and time but not the result (beyond the order of fp32
additions).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jqlora.errors import ConfigError
from jqlora.train.loss import Batch
from jqlora.types import Adapters, PyTree

Loss = Callable[..., tuple[jax.Array, jax.Array]]


class Summed(NamedTuple):
    """Gradients of a sum of losses, the sum, and the count to divide both by; fp32, but gradients
    of a single micro-batch have the adapters' dtype."""

    gradients: PyTree
    total: jax.Array
    count: jax.Array


def summed_gradients(
    apply: Callable[..., Any],
    loss: Loss,
    accumulate: int,
    adapters: Adapters,
    frozen: Mapping[str, Any],
    batch: Batch,
    key: jax.Array,
) -> Summed:
    """Of ``loss(apply, {**frozen, **adapters}, batch, key)``, which returns a sum and a count.

    ``frozen`` is ``{"params": base}`` and whatever else is not trained. Each micro-batch draws by
    the key folded with its number. Raises ``ConfigError`` when ``accumulate`` does not divide the
    batch's rows.
    """

    def summed_loss(adapters: Adapters, batch: Batch, key: jax.Array):
        return loss(apply, {**frozen, **adapters}, batch, key)

    def summed(batch: Batch, index: jax.Array):
        return jax.value_and_grad(summed_loss, has_aux=True)(
            adapters, batch, jax.random.fold_in(key, index)
        )

    def add_micro_batch(carry: Any, item: Any):
        gradients, total, count = carry
        (value, tokens), more = summed(*item)
        gradients = jax.tree.map(lambda g, m: g + m.astype(g.dtype), gradients, more)
        return (gradients, total + value, count + tokens), None

    parts = split_batch(batch, accumulate)
    if accumulate == 1:
        part = jax.tree.map(lambda leaf: leaf[0], parts)
        (total, count), gradients = summed(part, jnp.int32(0))
        return Summed(gradients, total, count)
    zero = jnp.zeros((), jnp.float32)
    start = (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), adapters), zero, zero)
    items = (parts, jnp.arange(accumulate))
    return Summed(*jax.lax.scan(add_micro_batch, start, items)[0])


def split_batch(batch: Batch, parts: int) -> dict[str, jax.Array]:
    """Leaves ``[B, ...]`` as ``[parts, B // parts, ...]``; ``ConfigError`` where that is uneven."""
    rows = {name: leaf.shape[0] for name, leaf in batch.items()}
    uneven = {name: size for name, size in rows.items() if size % parts}
    if uneven:
        raise ConfigError(f"accumulate={parts} does not divide the batch's rows {uneven}")
    return {
        name: jnp.reshape(leaf, (parts, leaf.shape[0] // parts, *leaf.shape[1:]))
        for name, leaf in batch.items()
    }
