"""Llama, Mistral, Qwen, Gemma and Phi-3: one decoder in plain Linen, its layers scanned or looped.

Module paths are those of the Hugging Face checkpoint without the layer number. Nothing here knows
adapters or quantization: projections are ``nn.Dense``, the embedding is ``nn.Embed``.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.attention import Attention, LayerCache
from jqlora.models.config import LlamaConfig
from jqlora.models.masks import Attending, Tables
from jqlora.models.norm import RMSNorm
from jqlora.models.outputs import CausalLMOutput, KVCache
from jqlora.models.preparation import append, attending_for, tokens_of
from jqlora.models.projection import project
from jqlora.models.rope import Rope, rope_tables
from jqlora.models.self_attention import SelfAttention
from jqlora.models.stack import Remat, check_options, run, stacked


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
        self.embed_tokens = nn.Embed(
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
        self, input_ids: jax.Array, attending: Attending, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Ids [B, T] -> (normed x [B, T, D], fresh k and v [L, B, T, KV, H], hidden states)."""
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


class LlamaForCausalLM(nn.Module):
    """A causal language model; parameters are ``param_dtype``, computation is ``dtype``.

    ``scan`` stacks the layers' parameters on a lead axis [L] under ``layers`` (compile time does
    not grow with depth); without it they live under ``layers_0``, ``layers_1``, ... . ``remat``
    "full" keeps only each layer's input for the backward pass, "dots" the projections' outputs
    too. ``attention`` "auto" is cuDNN for half-precision calls on a GPU and XLA elsewhere.
    """

    task = "causal-lm"
    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = True
    remat: Remat = "none"
    attention: Attention = "auto"

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.model = LlamaModel(
            self.config, scan=self.scan, remat=self.remat, attention=self.attention, **types
        )
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Dense(
                self.config.vocab_size,
                use_bias=False,
                kernel_init=nn.initializers.normal(self.config.initializer_range),
                **types,
            )

    def __call__(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits [B, T, V] for ``input_ids`` int32 [B, T].

        ``attention_mask`` [B, T] is 1 at real tokens (padding on either side); ``segment_ids``
        int32 [B, T] packs several sequences into a row, 0 being padding. ``positions`` default to
        counting the real tokens of each row or segment. With a ``cache`` the mask covers these T
        tokens only, which are written behind the cached ones. Outputs at padding mean nothing.
        ``logits_to_keep`` asks for the logits of the last so many tokens alone, 0 for all.
        """
        config = self.config
        tokens = tokens_of(
            input_ids.shape,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
        )
        attending = attending_for(
            tokens,
            cache,
            padded=attention_mask is not None or segment_ids is not None,
            window=config.sliding_window,
            windowed=config.windowed,
            tables=self._tables(config.rope, tokens.positions),
            windowed_tables=self._tables(config.local_rope, tokens.positions),
            emit_hidden=output_hidden_states,
        )
        past = None if cache is None else (cache.keys, cache.values)
        x, fresh, hidden = self.model(input_ids, attending, past)
        x = x[:, -logits_to_keep:]  # -0 keeps all
        if config.tie_word_embeddings:
            logits = self.model.embed_tokens.attend(x)
        else:
            logits = self.lm_head(x)
        if config.logit_softcap is not None:
            cap = jnp.asarray(config.logit_softcap, logits.dtype)
            logits = cap * jnp.tanh(logits / cap)
        if cache is not None:
            assert fresh is not None
            cache = append(cache, fresh, tokens.segment_ids)
        return CausalLMOutput(logits=logits, hidden_states=hidden, cache=cache)

    def _tables(self, rope: Rope | None, positions: jax.Array) -> Tables | None:
        if rope is None:
            return None
        head_dim, longest = self.config.head_dim, self.config.max_position_embeddings
        cos, sin = rope_tables(rope, positions, head_dim=head_dim, max_positions=longest)
        return cos.astype(self.dtype), sin.astype(self.dtype)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for ``length`` tokens (padding included) of ``batch`` rows."""
        config = self.config
        heads = (config.num_key_value_heads, config.head_dim)
        return KVCache.empty((config.num_hidden_layers, batch, length, *heads), self.dtype)

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the smallest call, to trace the model without data."""
        return {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}
