"""Normalization over features, rounded where transformers rounds it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """``scale · x / sqrt(mean(x²) + eps)`` over the last axis (arXiv:1910.07467, equation 4).

    Statistics and quotient are float32; the quotient is rounded to ``dtype`` *before* the scale is
    applied, as Hugging Face does, which ``nn.RMSNorm`` does the other way round. With
    ``unit_offset`` the factor is 1 + scale, and the product is rounded instead (Gemma).
    """

    eps: float
    dtype: Any
    param_dtype: Any
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normal = wide * jax.lax.rsqrt(mean + self.eps)
        if self.unit_offset:
            return (normal * (1 + scale.astype(jnp.float32))).astype(self.dtype)
        return normal.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """``scale · (x - mean) / sqrt(variance + eps) + bias`` over the last axis (arXiv:1607.06450).

    All of it is float32 and rounded once, as in torch. ``nn.LayerNorm`` would promote dtypes
    silently, and takes the variance as a difference of two large numbers.
    """

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return layer_norm(x, scale, bias, self.eps).astype(self.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """What :class:`LayerNorm` computes of x [..., D] with scale and bias [D]: float32 [..., D]."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(variance + eps)
    scale, bias = (leaf.astype(jnp.float32).reshape(shape) for leaf in (scale, bias))
    return normal * scale + bias
