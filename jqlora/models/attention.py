"""Grouped-query attention, with or without a cache, in four implementations.

Softmax is float32 in each, as in transformers. Training and scoring go through cuDNN's flash
attention on a GPU and through blocks on a CPU; calls with a cache go through XLA, whose masks cost
nothing at one query and which takes queries at any offset from their keys. Soft-capped scores
(Gemma 2) have no kernel: neither cuDNN nor ``jax.nn.dot_product_attention`` can cap, so where they
are not taken by blocks they are written out for XLA, scores and all. Scores with a bias (T5) go
through XLA too.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jqlora.errors import ConfigError
from jqlora.models.blockwise import blockwise_attention
from jqlora.models.masks import Attending, reaches
from jqlora.platforms import traced_platform

Attention: TypeAlias = Literal["auto", "xla", "cudnn", "blockwise"]
LayerCache: TypeAlias = tuple[jax.Array, jax.Array]
"""One layer's keys and values, [B, S, KV, head_dim] each."""


def implementation(
    attention: Attention,
    dtype: jnp.dtype,
    head_dim: int,
    softcap: float | None = None,
    *,
    biased: bool = False,
) -> Literal["xla", "cudnn", "blockwise"]:
    """What serves a call without cache; "auto" is cuDNN or blocks wherever they can serve on a GPU
    and on a CPU.

    Raises ConfigError for one that would leave out a soft cap or a bias.
    """
    if attention in ("cudnn", "blockwise"):
        if biased:
            raise ConfigError(f"{attention=} cannot add a bias to scores; accepted: auto, xla")
        if attention == "cudnn" and softcap is not None:
            what = f"cannot soft-cap scores (at {softcap})"
            raise ConfigError(f"{attention=} {what}; accepted: auto, xla, blockwise")
    if attention != "auto":
        return attention
    platform = traced_platform()
    if platform == "cpu" and not biased:
        return "blockwise"
    half = dtype in (jnp.bfloat16, jnp.float16)
    fits = half and head_dim % 8 == 0 and head_dim <= 128 and softcap is None and not biased
    return "cudnn" if fits and platform == "gpu" else "xla"


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    attending: Attending,
    windowed: jax.Array,
    cache: LayerCache | None,
    *,
    attention: Attention,
    scale: float,
    softcap: float | None = None,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache | None]:
    """Queries [B, T, N, H], keys and values [B, S, KV, H] -> (y [B, T, N·H], fresh).

    With a ``cache`` the keys are those in it and these behind them, and ``fresh`` is these keys and
    values; else None. Scores are multiplied by ``scale``, then capped, or have ``bias``
    [1 | B, N, T, S] added.
    """
    dtype = queries.dtype
    biased = bias is not None
    backend = implementation(attention, dtype, queries.shape[-1], softcap, biased=biased)
    fresh = None
    if cache is not None:
        assert attending.slot is not None
        fresh, backend = (keys, values), "xla"
        start = (0, attending.slot, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache[0], keys.astype(cache[0].dtype), start)
        values = jax.lax.dynamic_update_slice(cache[1], values.astype(cache[1].dtype), start)
    # XLA's gradient of a half-precision attention mixes dtypes, which a caller may have
    # forbidden; float32 costs it nothing on a CPU. A cached call has no gradient and must not
    # copy its cache.
    inner = jnp.float32 if backend == "xla" and cache is None else dtype
    queries, keys, values = (x.astype(inner) for x in (queries, keys, values))
    mask, window = attending.mask_for(windowed), attending.window
    if backend == "blockwise":
        mixed = blockwise_attention(
            queries,
            keys,
            values,
            mask,
            scale=scale,
            causal=attending.causal,
            window=window,
            softcap=softcap,
        )
        return mixed.reshape(*mixed.shape[:2], -1), fresh
    if backend == "cudnn" and mask is not None:  # it wants a row for every query
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], queries.shape[1], keys.shape[1]))
    with jax.numpy_dtype_promotion("standard"):
        if softcap is not None:
            if attending.causal:
                slots = jnp.arange(queries.shape[1], dtype=jnp.int32)
                past = reaches(slots, slots, window=window)
                mask = past if mask is None else mask & past
            assert mask is not None
            mixed = _capped(queries, keys, values, mask, scale=scale, softcap=softcap)
        else:
            mixed = jax.nn.dot_product_attention(
                queries,
                keys,
                values,
                bias=None if bias is None else bias.astype(inner),
                mask=mask,  # pyright: ignore[reportArgumentType] None is its documented default
                scale=scale,
                is_causal=attending.causal,
                local_window_size=None if window is None else (window - 1, 0),
                implementation=backend,
            )
    return mixed.astype(dtype).reshape(*mixed.shape[:2], -1), fresh


def _capped(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Attention with scores ``c·tanh(s/c)`` (Gemma 2, arXiv:2408.00118, section 2).

    Queries [B, T, N, H], keys and values [B, S, KV, H], mask bool [B | 1, 1, T, S]; scores and
    softmax are float32.
    """
    batch, length, heads, head_dim = queries.shape
    grouped = queries.reshape(batch, length, keys.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * (scale / softcap))
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, values)
    return mixed.reshape(batch, length, heads, head_dim)
