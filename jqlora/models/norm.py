"""Root-mean-square normalization, rounded where transformers rounds it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """``scale · x / sqrt(mean(x²) + eps)`` over the last axis (arXiv:1910.07467, equation 4).

    Statistics and quotient are float32; the quotient is rounded to ``dtype`` *before* the scale is
    applied, as Hugging Face does, which ``nn.RMSNorm`` does the other way round.
    """

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normal = (wide * jax.lax.rsqrt(mean + self.eps)).astype(self.dtype)
        return normal * scale.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
