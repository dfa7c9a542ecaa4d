"""BART (arXiv:1910.13461): an encoder-decoder with learned positions and norms behind its sums."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.attention import Attention
from jqlora.models.bart_config import BartConfig, BartSide
from jqlora.models.linear import Embed
from jqlora.models.multi_head import MultiHeadAttention, Shared
from jqlora.models.norm import LayerNorm
from jqlora.models.projection import project
from jqlora.models.seq2seq import DecoderCache, EncoderDecoder, Stacked
from jqlora.models.seq2seq_heads import config_for
from jqlora.models.stack import Remat, check_options, entering, run, stacked

OFFSET = 2
"""Rows of the positions' table before that of the first position."""
EPSILON = 1e-5


class BartLayer(nn.Module):
    """Self-attention, attention to the encoder in a decoder, and MLP, each added to its input and
    normed after."""

    config: BartConfig
    side: BartSide
    decoder: bool
    dtype: Any
    param_dtype: Any
    attention: Attention

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: Shared, own: jax.Array, cache: DecoderCache | None
    ) -> tuple[jax.Array, tuple[DecoderCache | None, jax.Array | None]]:
        """x [B, T, D] -> (x, (fresh keys and values or None, x if hidden states are wanted))."""
        del own
        x = entering(x)
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = functools.partial(
            MultiHeadAttention, config.heads_of(self.side), attention=self.attention, **types
        )
        norm = functools.partial(LayerNorm, EPSILON, **types)
        through = functools.partial(
            project, use_bias=True, initializer_range=config.initializer_range, **types
        )
        past, known = (None, None) if cache is None else cache
        y, fresh = attention(name="self_attn")(x, x, shared.attending, cache=past)
        x = norm(name="self_attn_layer_norm")(x + y)
        across = None
        if self.decoder:
            assert shared.across is not None
            y, across = attention(name="encoder_attn")(x, shared.memory, shared.across, known=known)
            x = norm(name="encoder_attn_layer_norm")(x + y)
        y = ACTIVATIONS[config.activation](through(x, self.side.intermediate_size, "fc1"))
        x = norm(name="final_layer_norm")(x + through(y, config.hidden_size, "fc2"))
        kept = None
        if cache is not None:
            kept = fresh, None if shared.memory is None else across
        return x, (kept, x if shared.emit_hidden else None)


class BartStack(nn.Module):
    """The encoder or the decoder: positions, a norm and the layers."""

    config: BartConfig
    side: BartSide
    decoder: bool
    dtype: Any
    param_dtype: Any
    scan: bool
    remat: Remat
    attention: Attention

    def setup(self) -> None:
        check_options(self.remat, self.attention)
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed_positions = Embed(
            config.max_position_embeddings + OFFSET,
            config.hidden_size,
            embedding_init=nn.initializers.normal(config.initializer_range),
            **types,
        )
        self.layernorm_embedding = LayerNorm(EPSILON, **types)
        self.layers = stacked(
            BartLayer,
            self.side.num_layers,
            scan=self.scan,
            remat=self.remat,
            config=config,
            side=self.side,
            decoder=self.decoder,
            attention=self.attention,
            **types,
        )

    def __call__(
        self, x: jax.Array, slots: jax.Array, shared: Shared, past: DecoderCache | None
    ) -> Stacked:
        """Embedded x [B, T, D], its tokens in ``slots`` int32 [T] -> states.

        Slots from ``max_position_embeddings`` on have no embedding: NaN, as ``nn.Embed`` gives.
        """
        x = embedded = self.layernorm_embedding(x + self.embed_positions(slots + OFFSET)[None])
        own = jnp.arange(self.side.num_layers, dtype=jnp.int32)
        x, (fresh, hidden) = run(self.layers, x, shared, own, past)
        return x, fresh, None if hidden is None else jnp.concatenate([embedded[None], hidden])


class BartModel(nn.Module):
    """Everything but what follows the decoder."""

    config: BartConfig
    dtype: Any
    param_dtype: Any
    scan: bool
    remat: Remat
    attention: Attention

    def setup(self) -> None:
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"scan": self.scan, "remat": self.remat, "attention": self.attention, **types}
        init = nn.initializers.normal(config.initializer_range)
        self.shared = Embed(config.vocab_size, config.hidden_size, embedding_init=init, **types)
        self.encoder = BartStack(config, config.encoder, decoder=False, **options)
        self.decoder = BartStack(config, config.decoder, decoder=True, **options)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Ids int32 [B, T] -> [B, T, D], without positions."""
        x = self.shared(input_ids)
        if self.config.scaled_embedding:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return x

    def encode(self, input_ids: jax.Array, shared: Shared) -> Stacked:
        slots = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        return self.encoder(self.embed(input_ids), slots, shared, None)

    def decode(
        self, input_ids: jax.Array, slots: jax.Array, shared: Shared, past: DecoderCache | None
    ) -> Stacked:
        return self.decoder(self.embed(input_ids), slots, shared, past)

    def attend(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] against every token's embedding: [B, T, V]."""
        return self.shared.attend(x)


class LogitsBias(nn.Module):
    """Added to the logits of every token; the checkpoint has it as a buffer, mostly zeros."""

    param_dtype: Any

    @nn.compact
    def __call__(self, logits: jax.Array) -> jax.Array:
        shape = (1, logits.shape[-1])
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        return logits + bias.astype(logits.dtype)[None]


class BartForTask(EncoderDecoder):
    """BART; the lists of layers are ``model/encoder/layers`` and ``model/decoder/layers``."""

    cross_name = "encoder_attn"
    config: BartConfig

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.model = BartModel(
            self.config, scan=self.scan, remat=self.remat, attention=self.attention, **types
        )
        if self.task == "seq2seq-lm":
            self.final_logits_bias = LogitsBias(self.param_dtype)
        spread = self.config.initializer_range
        self.setup_head(spread, spread)

    def encode(self, input_ids: jax.Array, shared: Shared) -> Stacked:
        return self.model.encode(input_ids, shared)

    def decode(
        self, input_ids: jax.Array, slots: jax.Array, shared: Shared, past: DecoderCache | None
    ) -> Stacked:
        return self.model.decode(input_ids, slots, shared, past)

    def head(self, x: jax.Array) -> jax.Array:
        return self.final_logits_bias(self.model.attend(x))


def build_bart(
    config: BartConfig, task: str = "seq2seq-lm", dtype: Any = jnp.float32, **options: Any
) -> BartForTask:
    """The module. Raises CheckpointError for a classifier whose config names no one end token."""
    types = {"dtype": dtype, "param_dtype": dtype, **options}
    return BartForTask(config_for(config, task), task, **types)
