"""What a call must know before its first layer: positions, rotary tables and masks."""

import jax
import jax.numpy as jnp

from jqlora.models.attention import LayerCache
from jqlora.models.config import LlamaConfig
from jqlora.models.masks import Attending, default_positions, reaches, same_segment
from jqlora.models.outputs import KVCache
from jqlora.models.rope import rope_tables


def attending_for(
    config: LlamaConfig,
    shape: tuple[int, ...],
    *,
    dtype: jnp.dtype,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: KVCache | None,
    emit_hidden: bool,
) -> tuple[Attending, jax.Array]:
    """What the layers share, and these tokens' segment ids int32 [B, T] (all 1 if not given).

    Raises ValueError where ``segment_ids`` and a cache are combined without ``positions``: whose
    continuation a segment is cannot be known.
    """
    batch, length = shape
    if positions is None and cache is not None and segment_ids is not None:
        raise ValueError("segment_ids with a cache need explicit positions")
    past = None if cache is None else jnp.sum(cache.segment_ids > 0, axis=1, dtype=jnp.int32)
    if positions is None:
        positions = default_positions(
            batch, length, attention_mask=attention_mask, segment_ids=segment_ids, past=past
        )
    segments = _segments(shape, attention_mask, segment_ids)
    cos, sin = rope_tables(
        config.rope,
        positions,
        head_dim=config.head_dim,
        max_positions=config.max_position_embeddings,
    )
    uniform = all(config.windowed) or not any(config.windowed)
    window = config.sliding_window
    mask = windowed_mask = None
    if cache is not None:
        slots = cache.length + jnp.arange(length, dtype=jnp.int32)
        every = jnp.arange(cache.segment_ids.shape[1], dtype=jnp.int32)
        known = jax.lax.dynamic_update_slice(cache.segment_ids, segments, (0, cache.length))
        same = same_segment(segments, known)
        mask = same & reaches(slots, every, window=window if uniform else None)
        windowed_mask = None if uniform else same & reaches(slots, every, window=window)
    else:
        if attention_mask is not None or segment_ids is not None:
            mask = same_segment(segments, segments)
        if not uniform:
            slots = jnp.arange(length, dtype=jnp.int32)
            mask = mask if mask is not None else jnp.ones((1, 1, length, length), bool)
            windowed_mask = mask & reaches(slots, slots, window=window)
    attending = Attending(
        cos=cos.astype(dtype),
        sin=sin.astype(dtype),
        mask=mask,
        windowed_mask=windowed_mask,
        slot=None if cache is None else cache.length,
        causal=cache is None,
        window=window if uniform and cache is None else None,
        emit_hidden=emit_hidden,
    )
    return attending, segments


def _segments(
    shape: tuple[int, ...], attention_mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    return (
        segments if attention_mask is None else jnp.where(attention_mask.astype(bool), segments, 0)
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
