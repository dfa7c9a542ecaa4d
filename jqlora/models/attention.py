"""Grouped-query self-attention over ``jax.nn.dot_product_attention``.

Softmax is float32 in either implementation, as in transformers. cuDNN's flash attention serves
training and scoring; calls with a cache go through XLA, whose masks cost nothing at one query and
which takes queries at any offset from their keys.
"""

import functools
from typing import Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.config import LlamaConfig
from jqlora.models.masks import Attending
from jqlora.models.projection import project
from jqlora.models.rope import rotate

Attention: TypeAlias = Literal["auto", "xla", "cudnn"]
LayerCache: TypeAlias = tuple[jax.Array, jax.Array]
"""One layer's keys and values, [B, S, KV, head_dim] each."""


def implementation(
    attention: Attention, dtype: jnp.dtype, head_dim: int
) -> Literal["xla", "cudnn"]:
    """ "xla" or "cudnn" for a call without cache; "auto" takes cuDNN wherever it can serve."""
    if attention != "auto":
        return attention
    half = dtype in (jnp.bfloat16, jnp.float16)
    fits = half and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if fits and jax.default_backend() == "gpu" else "xla"


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions (GQA: arXiv:2305.13245)."""

    config: LlamaConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    attention: Attention

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        attending: Attending,
        windowed: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> (y [B, T, D], this call's keys and values [B, T, KV, H] if cached)."""
        config = self.config
        batch, length, _ = x.shape

        through = functools.partial(
            project,
            initializer_range=config.initializer_range,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

        def heads(name: str, count: int) -> jax.Array:
            y = through(x, count * config.head_dim, name, use_bias=config.qkv_bias)
            return y.reshape(batch, length, count, config.head_dim)

        queries = heads("q_proj", config.num_attention_heads)
        keys = heads("k_proj", config.num_key_value_heads)
        values = heads("v_proj", config.num_key_value_heads)
        queries = rotate(queries, attending.cos, attending.sin)
        keys = rotate(keys, attending.cos, attending.sin)

        mask = attending.mask
        if mask is not None and attending.windowed_mask is not None:
            mask = jnp.where(windowed, attending.windowed_mask, mask)
        fresh, backend = None, implementation(self.attention, queries.dtype, config.head_dim)
        if cache is not None:
            assert attending.slot is not None
            fresh, backend = (keys, values), "xla"
            start = (0, attending.slot, 0, 0)
            keys = jax.lax.dynamic_update_slice(cache[0], keys.astype(cache[0].dtype), start)
            values = jax.lax.dynamic_update_slice(cache[1], values.astype(cache[1].dtype), start)
        window = attending.window
        # XLA's gradient of a half-precision attention mixes dtypes, which a caller may have
        # forbidden; float32 costs it nothing on a CPU. A cached call has no gradient and must not
        # copy its cache.
        wide = backend == "xla" and cache is None
        inner = jnp.float32 if wide else queries.dtype
        with jax.numpy_dtype_promotion("standard"):
            mixed = jax.nn.dot_product_attention(
                queries.astype(inner),
                keys.astype(inner),
                values.astype(inner),
                mask=mask,  # pyright: ignore[reportArgumentType] None is its documented default
                is_causal=attending.causal,
                local_window_size=None if window is None else (window - 1, 0),
                implementation=backend,
            )
        mixed = mixed.astype(queries.dtype)
        mixed = mixed.reshape(batch, length, -1)
        mixed = through(mixed, config.hidden_size, "o_proj", use_bias=config.output_bias)
        return mixed, fresh
