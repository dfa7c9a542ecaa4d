"""The layer that BERT, RoBERTa and DeBERTa share; they differ in how it attends.

Module paths are those of the Hugging Face checkpoint without the layer number.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.encoder_config import EncoderConfig
from jqlora.models.linear import Dense, Embed
from jqlora.models.norm import LayerNorm
from jqlora.models.projection import project
from jqlora.models.stack import entering


def dense(
    x: jax.Array, features: int, name: str, config: EncoderConfig, types: dict[str, Any]
) -> jax.Array:
    """x [..., K] -> [..., ``features``], with bias, in the submodule ``name``."""
    return project(
        x, features, name, use_bias=True, initializer_range=config.initializer_range, **types
    )


def norm(config: EncoderConfig, types: dict[str, Any], name: str | None = "LayerNorm") -> LayerNorm:
    """Layer normalization; without a name for a ``setup`` to give."""
    return LayerNorm(config.layer_norm_eps, name=name, **types)


class AddAndNorm(nn.Module):
    """``LayerNorm(dense(y) + x)``, y [B, T, K], x [B, T, D]."""

    config: EncoderConfig
    types: Any

    @nn.compact
    def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
        types = dict(self.types)
        return norm(self.config, types)(
            dense(y, self.config.hidden_size, "dense", self.config, types) + x
        )


class Attention(nn.Module):
    """A way to mix tokens, then projection, residual and norm."""

    config: EncoderConfig
    types: Any
    mixer: Any

    @nn.compact
    def __call__(self, x: jax.Array, shared: Any) -> jax.Array:
        mixed = self.mixer(self.config, self.types, name="self")(x, shared)
        return AddAndNorm(self.config, self.types, name="output")(mixed, x)


class Intermediate(nn.Module):
    """The wide half of the MLP with its activation."""

    config: EncoderConfig
    types: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        y = dense(x, config.intermediate_size, "dense", config, dict(self.types))
        return ACTIVATIONS[config.hidden_act](y)


class EncoderLayer(nn.Module):
    """Attention and MLP, each added to its input and normed after (arXiv:1706.03762, section 3.1).

    ``mixer`` is the class of the attention proper, ``types`` the dtypes of all submodules as pairs.
    """

    config: EncoderConfig
    types: Any
    mixer: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: Any, first: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B, T, D] -> (x, x again if hidden states are wanted)."""
        config, types = self.config, self.types
        x = entering(x)
        x = Attention(config, types, self.mixer, name="attention")(x, shared)
        wide = Intermediate(config, types, name="intermediate")(x)
        x = AddAndNorm(config, types, name="output")(wide, x)
        x = shared.after_layer(x, first)
        return x, x if shared.emit_hidden else None


class Embeddings(nn.Module):
    """Sums of token, position and token-type embeddings, normed.

    ``tokens`` gives back the token embedding for a tied output head.
    """

    config: EncoderConfig
    types: Any
    width: int
    positioned: bool = True

    def setup(self) -> None:
        config, types = self.config, dict(self.types)

        def table(rows: int) -> Embed:
            init = nn.initializers.normal(config.initializer_range)
            return Embed(rows, self.width, embedding_init=init, **types)

        self.word_embeddings = table(config.vocab_size)
        if self.positioned:
            self.position_embeddings = table(config.max_position_embeddings)
        if config.type_vocab_size:
            self.token_type_embeddings = table(config.type_vocab_size)
        if self.width != config.hidden_size:
            init = nn.initializers.normal(config.initializer_range)
            self.embed_proj = Dense(config.hidden_size, use_bias=False, kernel_init=init, **types)
        self.LayerNorm = norm(config, types, name=None)

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array | None, positions: jax.Array
    ) -> jax.Array:
        """Ids int32 [B, T], positions int32 [B | 1, T] -> [B, T, D]."""
        x = self.word_embeddings(input_ids)
        if self.config.type_vocab_size:
            kinds = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(kinds)
        if self.positioned:
            x = x + self.position_embeddings(positions)
        if self.width != self.config.hidden_size:
            x = self.embed_proj(x)
        return self.LayerNorm(x)
