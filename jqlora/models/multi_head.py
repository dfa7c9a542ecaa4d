"""Attention of encoder-decoders: to a sequence itself, or from the decoder to the encoder."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jqlora.models.attention import Attention, LayerCache, attend
from jqlora.models.masks import Attending
from jqlora.models.projection import project


@struct.dataclass
class Shared:
    """What every layer of one call shares.

    ``memory`` are the encoder's states, None in the encoder and where the keys and values made of
    them are cached; ``across`` says which of them are real, None in the encoder.
    """

    attending: Attending
    bias: jax.Array | None = None  # [1, N, T, S], added to the scores of self-attention
    memory: jax.Array | None = None  # [B, S, D]
    across: Attending | None = None

    @property
    def emit_hidden(self) -> bool:
        return self.attending.emit_hidden


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How a family shapes its attention: the projections' names, in the order of queries, keys,
    values and output, and the spread that each is drawn with."""

    names: tuple[str, str, str, str]
    spreads: tuple[float, float, float, float]
    count: int
    head_dim: int
    scale: float
    use_bias: bool


class MultiHeadAttention(nn.Module):
    """Projections around ``attend``."""

    heads: Heads
    dtype: Any
    param_dtype: Any
    attention: Attention

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array | None,
        attending: Attending,
        *,
        bias: jax.Array | None = None,
        known: LayerCache | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """x [B, T, D] attends to ``source`` [B, S, D] -> (y [B, T, D], its keys and values
        [B, S, N, H]).

        Without a source these are ``known``. With a ``cache`` x also attends to what is in it.
        """
        heads = self.heads

        def through(y: jax.Array, place: int, features: int) -> jax.Array:
            return project(
                y,
                features,
                heads.names[place],
                use_bias=heads.use_bias,
                initializer_range=heads.spreads[place],
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )

        def split(y: jax.Array, place: int) -> jax.Array:
            y = through(y, place, heads.count * heads.head_dim)
            return y.reshape(*y.shape[:2], heads.count, heads.head_dim)

        queries = split(x, 0)
        if source is not None:
            known = split(source, 1), split(source, 2)
        assert known is not None
        mixed, _ = attend(
            queries,
            *known,
            attending,
            jnp.asarray(False),  # no layer has a window
            cache,
            attention=self.attention,
            scale=heads.scale,
            bias=bias,
        )
        return through(mixed, 3, x.shape[-1]), known
