"""Llama, Mistral, Qwen, Gemma and Phi-3: one decoder in plain Linen, its layers scanned or looped.

Module paths are those of the Hugging Face checkpoint without the layer number. Nothing here knows
adapters or quantization: projections are ``Dense``, the embedding is ``Embed``.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.attention import Attention, LayerCache
from jqlora.models.causal import CausalLM
from jqlora.models.config import LlamaConfig
from jqlora.models.linear import Embed
from jqlora.models.masks import Attending, Tables
from jqlora.models.norm import RMSNorm
from jqlora.models.outputs import KVCache
from jqlora.models.preparation import Tokens, attending_for
from jqlora.models.projection import project
from jqlora.models.rope import Rope, rope_tables
from jqlora.models.self_attention import SelfAttention
from jqlora.models.stack import Remat, check_options, entering, run, stacked


class MLP(nn.Module):
    """``down(act(gate(x)) · up(x))`` (gated linear units, arXiv:2002.05202)."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config

        through = functools.partial(
            project,
            use_bias=config.mlp_bias,
            initializer_range=config.initializer_range,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        if config.fused_projections:
            fused = through(x, 2 * config.intermediate_size, "gate_up_proj")
            gate, up = jnp.split(fused, 2, axis=-1)
        else:
            gate = through(x, config.intermediate_size, "gate_proj")
            up = through(x, config.intermediate_size, "up_proj")
        gate = ACTIVATIONS[config.hidden_act](gate)
        return through(gate * up, config.hidden_size, "down_proj")


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the stream; sandwiched, before one too."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any
    attention: Attention

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(_norm, self.config, **types)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(self.config, attention=self.attention, **types)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(self.config, **types)
        if self.config.sandwich_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def __call__(
        self,
        x: jax.Array,
        attending: Attending,
        windowed: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, tuple[LayerCache | None, jax.Array | None]]:
        """x [B, T, D] -> (x, (fresh keys and values or None, x if hidden states are wanted))."""
        x = entering(x)
        mixed, fresh = self.self_attn(self.input_layernorm(x), attending, windowed, cache)
        if self.config.sandwich_norms:
            x = x + self.post_attention_layernorm(mixed)
            x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        else:
            x = x + mixed
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x, (fresh, x if attending.emit_hidden else None)


def _norm(config: LlamaConfig, **types: Any) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, unit_offset=config.unit_offset_norms, **types)


class LlamaModel(nn.Module):
    """Embedding, layers and final norm."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any
    scan: bool
    remat: Remat
    attention: Attention

    def setup(self) -> None:
        check_options(self.remat, self.attention)
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed_tokens = Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nn.initializers.normal(config.initializer_range),
            **types,
        )
        self.layers = stacked(
            DecoderLayer,
            config.num_hidden_layers,
            scan=self.scan,
            remat=self.remat,
            config=config,
            attention=self.attention,
            **types,
        )
        self.norm = _norm(config, **types)

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        attending: Attending,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Ids [B, T] -> (normed x [B, T, D], fresh k and v [L, B, T, KV, H], hidden states).

        The rotary tables of ``attending`` hold all that positions say.
        """
        del positions
        x = self.embed_tokens(input_ids)
        if self.config.scaled_embedding:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        embedded = x
        windowed = jnp.asarray(self.config.windowed)
        x, (fresh, hidden) = run(self.layers, x, attending, windowed, cache)
        x = self.norm(x)
        if hidden is not None:
            hidden = jnp.concatenate([embedded[None], hidden[:-1], x[None]])
        return x, fresh, hidden

    def attend(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] against every token's embedding: [B, T, V]."""
        return self.embed_tokens.attend(x)


class LlamaForCausalLM(CausalLM):
    """Any of them; its fields are those of :class:`~jqlora.models.causal.CausalLM`."""

    base_name = "model"
    config: LlamaConfig

    def make_base(self, **fields: Any) -> nn.Module:
        return LlamaModel(self.config, **fields)

    def attending(
        self, tokens: Tokens, cache: KVCache | None, *, padded: bool, emit_hidden: bool
    ) -> Attending:
        config = self.config
        return attending_for(
            tokens,
            cache,
            padded=padded,
            window=config.sliding_window,
            windowed=config.windowed,
            tables=self._tables(config.rope, tokens.positions),
            windowed_tables=self._tables(config.local_rope, tokens.positions),
            emit_hidden=emit_hidden,
        )

    def finish(self, logits: jax.Array) -> jax.Array:
        if self.config.logit_softcap is None:
            return logits
        cap = jnp.asarray(self.config.logit_softcap, logits.dtype)
        return cap * jnp.tanh(logits / cap)

    def _tables(self, rope: Rope | None, positions: jax.Array) -> Tables | None:
        if rope is None:
            return None
        head_dim, longest = self.config.head_dim, self.config.max_position_embeddings
        return rope_tables(rope, positions, head_dim=head_dim, max_positions=longest)
