"""What a call must know before its first layer: positions, rotary tables and masks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jqlora.models.attention import LayerCache
from jqlora.models.masks import Attending, Tables, default_positions, reaches, same_segment
from jqlora.models.outputs import KVCache


class Tokens(NamedTuple):
    """Where the tokens of a call stand; both int32 [B, T]."""

    positions: jax.Array
    segment_ids: jax.Array  # all 1 where neither mask nor segments are given; 0 is padding


def tokens_of(
    shape: tuple[int, ...],
    *,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: KVCache | None,
) -> Tokens:
    """Positions and segments of tokens [B, T] from what the caller gave.

    Raises ValueError where ``segment_ids`` and a cache are combined without ``positions``: whose
    continuation a segment is cannot be known.
    """
    if positions is None and cache is not None and segment_ids is not None:
        raise ValueError("segment_ids with a cache need explicit positions")
    if positions is None:
        past = None if cache is None else jnp.sum(cache.segment_ids > 0, axis=1, dtype=jnp.int32)
        positions = default_positions(
            *shape, attention_mask=attention_mask, segment_ids=segment_ids, past=past
        )
    segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    if attention_mask is not None:
        segments = jnp.where(attention_mask.astype(bool), segments, 0)
    return Tokens(positions, segments)


def attending_for(
    tokens: Tokens,
    cache: KVCache | None,
    *,
    padded: bool,
    window: int | None = None,
    windowed: tuple[bool, ...] = (),
    tables: Tables | None = None,
    windowed_tables: Tables | None = None,
    emit_hidden: bool,
) -> Attending:
    """What the layers share; ``padded`` says that a mask or segments were given.

    ``windowed`` says for each layer whether it attends through ``window``.
    """
    length = tokens.segment_ids.shape[1]
    uniform = all(windowed) or not any(windowed)
    window = window if any(windowed) else None
    mask = windowed_mask = None
    if cache is not None:
        slots = cache.length + jnp.arange(length, dtype=jnp.int32)
        every = jnp.arange(cache.segment_ids.shape[1], dtype=jnp.int32)
        start = (0, cache.length)
        known = jax.lax.dynamic_update_slice(cache.segment_ids, tokens.segment_ids, start)
        same = same_segment(tokens.segment_ids, known)
        mask = same & reaches(slots, every, window=window if uniform else None)
        windowed_mask = None if uniform else same & reaches(slots, every, window=window)
    else:
        if padded:
            mask = same_segment(tokens.segment_ids, tokens.segment_ids)
        if not uniform:
            slots = jnp.arange(length, dtype=jnp.int32)
            mask = mask if mask is not None else jnp.ones((1, 1, length, length), bool)
            windowed_mask = mask & reaches(slots, slots, window=window)
    return Attending(
        tables=tables,
        windowed_tables=windowed_tables,
        mask=mask,
        windowed_mask=windowed_mask,
        slot=None if cache is None else cache.length,
        causal=cache is None,
        window=window if uniform and cache is None else None,
        emit_hidden=emit_hidden,
    )


def append(cache: KVCache, fresh: LayerCache, segments: jax.Array) -> KVCache:
    """The cache with this call's keys and values [L, B, T, KV, H] behind those it had."""
    start = (0, 0, cache.length, 0, 0)
    return KVCache(
        keys=jax.lax.dynamic_update_slice(cache.keys, fresh[0].astype(cache.keys.dtype), start),
        values=jax.lax.dynamic_update_slice(
            cache.values, fresh[1].astype(cache.values.dtype), start
        ),
        segment_ids=jax.lax.dynamic_update_slice(cache.segment_ids, segments, (0, cache.length)),
        length=cache.length + jnp.int32(segments.shape[1]),
    )
