"""Who may attend to whom: one rule for padding, packing, sliding windows and cached decoding.

A query in slot ``i`` sees a key in slot ``j`` if ``j <= i``, both carry the same segment id, and
``j > i - window`` where the layer has a window. Padding is segment 0: it sees only padding, so no
row is ever masked out wholly and no NaN can arise. A 0/1 attention mask is a segment id already.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

Tables: TypeAlias = tuple[jax.Array, jax.Array]
"""Cosines and sines [B | 1, T, rotated] in the compute dtype."""


@struct.dataclass
class Attending:
    """What every layer of one call shares.

    ``mask`` leaves out what ``causal`` and ``window`` state statically, because an attention kernel
    skips work for those. ``windowed_mask`` is set only where layers of both sorts are mixed,
    ``tables`` where positions are rotary, ``windowed_tables`` where windowed layers turn by tables
    of their own.
    """

    tables: Tables | None
    windowed_tables: Tables | None
    mask: jax.Array | None  # bool [B | 1, 1, T | 1, S]
    windowed_mask: jax.Array | None  # bool [B | 1, 1, T, S]
    slot: jax.Array | None  # int32 []: where the cache is written; None without a cache
    causal: bool = struct.field(pytree_node=False)
    window: int | None = struct.field(pytree_node=False)
    emit_hidden: bool = struct.field(pytree_node=False)

    @classmethod
    def both_ways(cls, mask: jax.Array | None, *, emit_hidden: bool = False) -> "Attending":
        """Every query sees every key that is real by ``mask`` [B, S], 1 or True at real ones."""
        return cls(
            tables=None,
            windowed_tables=None,
            mask=None if mask is None else mask.astype(bool)[:, None, None, :],
            windowed_mask=None,
            slot=None,
            causal=False,
            window=None,
            emit_hidden=emit_hidden,
        )

    def mask_for(self, windowed: jax.Array) -> jax.Array | None:
        """The mask of a layer; ``windowed`` is a bool scalar."""
        if self.mask is None or self.windowed_mask is None:
            return self.mask
        return jnp.where(windowed, self.windowed_mask, self.mask)

    def tables_for(self, windowed: jax.Array) -> Tables:
        """Cosines and sines of a layer."""
        assert self.tables is not None
        if self.windowed_tables is None:
            return self.tables
        (cos, sin), (own_cos, own_sin) = self.tables, self.windowed_tables
        return jnp.where(windowed, own_cos, cos), jnp.where(windowed, own_sin, sin)


def default_positions(
    batch: int,
    length: int,
    *,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    past: jax.Array | None = None,
) -> jax.Array:
    """Positions int32 [batch, length]; padding gets some valid position.

    With ``segment_ids`` int32 [B, T] each run of one id counts from 0; else ``attention_mask``
    [B, T] counts real tokens; else all are real. ``past`` int32 [B] counts the real tokens of a
    cache, which these continue.
    """
    if segment_ids is not None:
        steps = jnp.arange(length, dtype=jnp.int32)[None, :]
        before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        positions = steps - jax.lax.cummax(jnp.where(segment_ids != before, steps, 0), axis=1)
    elif attention_mask is not None:
        real = attention_mask.astype(bool).astype(jnp.int32)
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    else:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
    return positions if past is None else positions + past[:, None]


def same_segment(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """bool [B, 1, T, S] from segment ids int32 [B, T] and [B, S]."""
    return queries[:, None, :, None] == keys[:, None, None, :]


def reaches(queries: jax.Array, keys: jax.Array, *, window: int | None) -> jax.Array:
    """bool [1, 1, T, S]: whether the key at a slot [S] is in the past and window of a query [T]."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None, None]
