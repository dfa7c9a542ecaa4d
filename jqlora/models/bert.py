"""BERT, RoBERTa and XLM-RoBERTa without their heads (arXiv:1810.04805, arXiv:1907.11692)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jqlora.models.attention import Attention, attend
from jqlora.models.encoder import Embeddings, EncoderLayer, dense
from jqlora.models.encoder_config import EncoderConfig
from jqlora.models.encoder_stack import run_stack
from jqlora.models.masks import Attending
from jqlora.models.stack import Remat


@struct.dataclass
class Shared:
    """What every layer of one call shares."""

    attending: Attending
    attention: Attention = struct.field(pytree_node=False)

    @property
    def emit_hidden(self) -> bool:
        return self.attending.emit_hidden

    def after_layer(self, x: jax.Array, first: jax.Array) -> jax.Array:
        return x


class BertSelfAttention(nn.Module):
    """Every token attends to every real one."""

    config: EncoderConfig
    types: Any

    @nn.compact
    def __call__(self, x: jax.Array, shared: Shared) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        config = self.config

        def heads(name: str) -> jax.Array:
            y = dense(x, config.hidden_size, name, config, dict(self.types))
            return y.reshape(*x.shape[:2], config.num_attention_heads, config.head_dim)

        everywhere = jnp.asarray(False)  # no layer has a window
        options = {"attention": shared.attention, "scale": config.head_dim**-0.5}
        parts = heads("query"), heads("key"), heads("value")
        return attend(*parts, shared.attending, everywhere, None, **options)[0]


class BertEncoder(nn.Module):
    """The layers."""

    config: EncoderConfig
    types: Any
    scan: bool
    remat: Remat

    @nn.compact
    def __call__(self, x: jax.Array, shared: Shared) -> tuple[jax.Array, jax.Array | None]:
        return run_stack(
            EncoderLayer,
            x,
            shared,
            depth=self.config.num_hidden_layers,
            name="layer",
            scan=self.scan,
            remat=self.remat,
            config=self.config,
            types=self.types,
            mixer=BertSelfAttention,
        )


class Pooler(nn.Module):
    """The first token through a dense layer and a tanh."""

    config: EncoderConfig
    types: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, D]."""
        types = dict(self.types)
        return jnp.tanh(dense(x[:, 0], self.config.hidden_size, "dense", self.config, types))


class BertModel(nn.Module):
    """Embeddings, layers, and the pooler where the head wants it."""

    config: EncoderConfig
    types: Any
    scan: bool
    remat: Remat
    attention: Attention
    pooled: bool

    def setup(self) -> None:
        config, types = self.config, self.types
        self.embeddings = Embeddings(config, types, config.hidden_size)
        self.encoder = BertEncoder(config, types, self.scan, self.remat)
        if self.pooled:
            self.pooler = Pooler(config, types)

    def __call__(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None,
        token_type_ids: jax.Array | None,
        positions: jax.Array | None,
        emit_hidden: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Ids int32 [B, T] -> (x [B, T, D], or [B, D] pooled; hidden states [L + 1, B, T, D])."""
        if positions is None:
            positions = default_positions(self.config, input_ids)
        attending = Attending.both_ways(attention_mask, emit_hidden=emit_hidden)
        x = embedded = self.embeddings(input_ids, token_type_ids, positions)
        x, hidden = self.encoder(x, Shared(attending, self.attention))
        if hidden is not None:
            hidden = jnp.concatenate([embedded[None], hidden])
        return self.pooler(x) if self.pooled else x, hidden

    def attend(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] against every token's embedding: [B, T, V]."""
        return self.embeddings.word_embeddings.attend(x)


def default_positions(config: EncoderConfig, input_ids: jax.Array) -> jax.Array:
    """int32 [B | 1, T]: counted from 0, or from behind the padding's id over tokens that are none.

    Only the latter (fairseq's) serves rows that are padded on the left.
    """
    if not config.kind.positions_after_padding:
        return jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]
    padding = 1 if config.pad_token_id is None else config.pad_token_id
    real = (input_ids != padding).astype(jnp.int32)
    return jnp.cumsum(real, axis=1, dtype=jnp.int32) * real + padding
