"""Attention by blocks: the scores of a whole sequence are never in memory.

A block of queries meets one block of keys at a time, and blocks that causality or a window rules
out are not visited. Forward, the softmax of a row is carried on from block to block by its largest
score and its sum (Milakov and Gimelshein, arXiv:1805.02867); backward, scores are computed again,
and weights from those two (FlashAttention-2, arXiv:2307.08691, section 3.1).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jqlora.models.masks import reaches

BLOCK = 256
"""The most slots of a block; of 128, 256 and 512 the quickest on a CPU."""
MASKED = -1e30
"""A masked score. It is finite, so that a row in which nothing is seen has no NaN."""


class _Rule(NamedTuple):
    """What is known of all scores before they are computed."""

    groups: int
    """Heads of queries to a head of keys; a block has them one below the other."""
    rows: int
    """Slots of a block of queries."""
    columns: int
    """Slots of a block of keys."""
    scale: float
    causal: bool
    window: int | None
    softcap: float | None


def blockwise_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Queries [B, T, N, H], keys and values [B, S, KV, H] -> [B, T, N, H] in their dtype.

    Scores are multiplied by ``scale``, then capped. ``mask`` is bool [B | 1, 1, T | 1, S], True at
    what is seen; ``causal`` and its ``window`` rule out slots as well. Scores, softmax and sums are
    fp32; operands of 16 bits are multiplied with each other as they are, which is as exact.
    Gradients go to queries, keys and values.
    """
    rows, columns = (_block_size(x.shape[1], block) for x in (queries, keys))
    behind = -keys.shape[1] % columns
    if mask is not None:
        below = -mask.shape[2] % rows if mask.shape[2] > 1 else 0
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, below), (0, behind)))
    elif behind and not causal:  # causality hides what is padded
        mask = (jnp.arange(keys.shape[1] + behind) < keys.shape[1])[None, None, None]
    groups = queries.shape[2] // keys.shape[2]
    rule = _Rule(groups, rows, columns, scale, causal, window, softcap)
    parts = (_split(queries, rows, groups), _split(keys, columns, 1), _split(values, columns, 1))
    return _join(_attention(*parts, mask, rule), queries.shape[1], groups)


def _block_size(length: int, most: int) -> int:
    """Of blocks that are as equal as can be, several in multiples of eight."""
    count = -(-length // most)
    return length if count == 1 else -(-length // (8 * count)) * 8


def _split(x: jax.Array, size: int, groups: int) -> jax.Array:
    """x [B, T, KV·groups, H], padded by zeros, as blocks [count, B, KV, groups·size, H]."""
    batch, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, size, heads // groups, groups, width).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], groups * size, width)


def _join(x: jax.Array, length: int, groups: int) -> jax.Array:
    """The inverse of :func:`_split`."""
    count, batch, shared, rows, width = x.shape
    x = x.reshape(count, batch, shared, groups, rows // groups, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, shared * groups, width)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None, rule: _Rule
) -> jax.Array:
    """Blocks of queries [I, B, KV, G·rows, H], of keys and values [J, B, KV, columns, H]."""
    return _forward(queries, keys, values, mask, rule)[0]


def _forward(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None, rule: _Rule
) -> tuple[jax.Array, Any]:
    def of_queries(i: jax.Array, block: jax.Array) -> tuple[jax.Array, Any]:
        def with_keys(j: jax.Array, carry: Any) -> Any:
            highest, total, mixed = carry
            scores, _ = _scores(block, keys[j], mask, i, j, rule)
            new = jnp.maximum(highest, scores.max(axis=-1))
            weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
            mixed = mixed * kept[..., None] + _contract(weights, values[j], 3, 2)
            return new, total * kept + weights.sum(axis=-1), mixed

        of_row = jnp.zeros(block.shape[:-1], jnp.float32)
        start = of_row + MASKED, of_row, jnp.zeros(block.shape, jnp.float32)
        highest, total, mixed = lax.fori_loop(*_keys_for(i, len(keys), rule), with_keys, start)
        return i + 1, (mixed / total[..., None], highest, total)

    _, (mixed, highest, total) = lax.scan(of_queries, jnp.int32(0), queries)
    return mixed.astype(queries.dtype), (queries, keys, values, mask, mixed, highest, total)


def _backward(rule: _Rule, kept: Any, cotangents: jax.Array) -> tuple[Any, ...]:
    queries, keys, values, mask, mixed, highest, total = kept
    # of each row the sum over all keys of a weight times its gradient
    sums = (mixed * cotangents.astype(jnp.float32)).sum(axis=-1)

    def of_keys(carry: Any, block: Any) -> tuple[Any, Any]:
        (j, of_queries), (key, value) = carry, block

        def with_queries(i: jax.Array, gradients: Any) -> Any:
            of_queries, of_key, of_value = gradients
            scores, slope = _scores(queries[i], key, mask, i, j, rule)
            weights = jnp.exp(scores - highest[i][..., None]) / total[i][..., None]
            of_weights = _contract(cotangents[i], value, 3, 3)
            # where a block has all keys, its own rounding cancels in the difference
            of_row = sums[i] if len(keys) > 1 else (weights * of_weights).sum(axis=-1)
            of_scores = weights * (of_weights - of_row[..., None]) * slope
            of_key += _contract(of_scores, queries[i], 2, 2)
            of_value += _contract(weights, cotangents[i], 2, 2)
            return of_queries.at[i].add(_contract(of_scores, key, 3, 2)), of_key, of_value

        of_block = jnp.zeros(key.shape, jnp.float32)
        bounds = _queries_for(j, len(queries), rule)
        of_queries, *own = lax.fori_loop(*bounds, with_queries, (of_queries, of_block, of_block))
        return (j + 1, of_queries), tuple(own)

    start = jnp.int32(0), jnp.zeros(queries.shape, jnp.float32)
    (_, of_queries), own = lax.scan(of_keys, start, (keys, values))
    gradients = zip((of_queries, *own), (queries, keys, values), strict=True)
    return *(gradient.astype(x.dtype) for gradient, x in gradients), None


_attention.defvjp(_forward, _backward)


def _scores(
    queries: jax.Array,
    keys: jax.Array,
    mask: jax.Array | None,
    i: jax.Array,
    j: jax.Array,
    rule: _Rule,
) -> tuple[jax.Array, jax.Array | float]:
    """Of block ``i`` of queries and block ``j`` of keys [B, KV, G·rows, columns], and their
    derivative by the products."""
    scores = _contract(queries, keys, 3, 3) * rule.scale
    slope: jax.Array | float = rule.scale
    if rule.softcap is not None:
        capped = jnp.tanh(scores / rule.softcap)
        scores, slope = rule.softcap * capped, rule.scale * (1 - capped * capped)
    seen = _seen(mask, i, j, rule)
    if seen is not None:
        grouped = scores.reshape(*scores.shape[:2], rule.groups, rule.rows, rule.columns)
        scores = jnp.where(seen[:, :, None], grouped, MASKED).reshape(scores.shape)
    return scores, slope


def _seen(mask: jax.Array | None, i: jax.Array, j: jax.Array, rule: _Rule) -> jax.Array | None:
    """bool [B | 1, 1, rows | 1, columns] of a block of scores; None where all are seen."""
    seen = None
    if mask is not None:
        seen = lax.dynamic_slice_in_dim(mask, j * rule.columns, rule.columns, axis=3)
        if mask.shape[2] > 1:
            seen = lax.dynamic_slice_in_dim(seen, i * rule.rows, rule.rows, axis=2)
    if rule.causal:
        slots = [
            start * size + jnp.arange(size, dtype=jnp.int32)
            for start, size in ((i, rule.rows), (j, rule.columns))
        ]
        past = reaches(*slots, window=rule.window)
        seen = past if seen is None else seen & past
    return seen


def _keys_for(i: jax.Array, count: int, rule: _Rule) -> tuple[Any, Any]:
    """The first block of keys that block ``i`` of queries sees, and the one behind the last."""
    if not rule.causal:
        return 0, count
    first, last = i * rule.rows, (i + 1) * rule.rows - 1
    start = 0 if rule.window is None else jnp.maximum(first - rule.window + 1, 0) // rule.columns
    return start, jnp.minimum(last // rule.columns + 1, count)


def _queries_for(j: jax.Array, count: int, rule: _Rule) -> tuple[Any, Any]:
    """The first block of queries that sees block ``j`` of keys, and the one behind the last."""
    if not rule.causal:
        return 0, count
    first, last = j * rule.columns, (j + 1) * rule.columns - 1
    start = first // rule.rows
    if rule.window is None:
        return start, count
    return start, jnp.minimum((last + rule.window - 1) // rule.rows + 1, count)


def _contract(x: jax.Array, y: jax.Array, i: int, j: int) -> jax.Array:
    """Axis ``i`` with axis ``j`` of two blocks, head by head, in fp32."""
    dtype = x.dtype if x.dtype == y.dtype else jnp.float32
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (((i,), (j,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    )
