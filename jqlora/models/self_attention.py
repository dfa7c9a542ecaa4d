"""The attention module of the Llama line: projections and rotary positions around ``attend``."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.attention import Attention, LayerCache, attend
from jqlora.models.config import LlamaConfig
from jqlora.models.masks import Attending
from jqlora.models.norm import RMSNorm
from jqlora.models.projection import project
from jqlora.models.rope import rotate


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
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        through = functools.partial(
            project, initializer_range=config.initializer_range, use_bias=config.qkv_bias, **types
        )
        counts = (config.num_attention_heads, *(2 * (config.num_key_value_heads,)))
        widths = [count * config.head_dim for count in counts]
        if config.fused_projections:
            fused = through(x, sum(widths), "qkv_proj")
            parts = jnp.split(fused, [widths[0], widths[0] + widths[1]], axis=-1)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            parts = [through(x, width, name) for width, name in zip(widths, names, strict=True)]
        queries, keys, values = (
            part.reshape(*x.shape[:2], count, config.head_dim)
            for part, count in zip(parts, counts, strict=True)
        )
        if config.qk_norm:
            norm = functools.partial(
                RMSNorm, config.rms_norm_eps, unit_offset=config.unit_offset_norms, **types
            )
            queries, keys = norm(name="q_norm")(queries), norm(name="k_norm")(keys)
        cos, sin = attending.tables_for(windowed)
        mixed, fresh = attend(
            rotate(queries, cos, sin),
            rotate(keys, cos, sin),
            values,
            attending,
            windowed,
            cache,
            attention=self.attention,
            scale=(config.query_scalar or config.head_dim) ** -0.5,
            softcap=config.attention_softcap,
        )
        through = functools.partial(through, use_bias=config.output_bias)
        return through(mixed, config.hidden_size, "o_proj"), fresh
