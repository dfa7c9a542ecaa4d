"""GPT-2: learned positions, biases everywhere, one matrix for queries, keys and values.

The checkpoint keeps its dense weights (in, out), as ``Conv1D``; to Linen they are ``nn.Dense`` like
any other, and the difference ends in the family's naming.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.attention import Attention, LayerCache, attend
from jqlora.models.causal import CausalLM
from jqlora.models.gpt2_config import GPT2Config
from jqlora.models.linear import Embed
from jqlora.models.masks import Attending
from jqlora.models.norm import LayerNorm
from jqlora.models.projection import project
from jqlora.models.stack import Remat, check_options, entering, run, stacked


class GPT2Attention(nn.Module):
    """Causal attention; ``divisor`` is what this layer's scores are divided by beyond the usual."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any
    attention: Attention

    @nn.compact
    def __call__(
        self, x: jax.Array, attending: Attending, divisor: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> (y [B, T, D], this call's keys and values [B, T, N, H] if cached)."""
        config = self.config
        through = _projection(self)
        fused = through(x, 3 * config.hidden_size, "c_attn")
        shape = (*x.shape[:2], config.num_attention_heads, config.head_dim)
        queries, keys, values = (part.reshape(shape) for part in jnp.split(fused, 3, axis=-1))
        if config.scale_by_layer:
            queries = queries / divisor.astype(queries.dtype)
        mixed, fresh = attend(
            queries,
            keys,
            values,
            attending,
            jnp.asarray(False),  # no layer has a window
            cache,
            attention=self.attention,
            scale=config.head_dim**-0.5 if config.scale_scores else 1.0,
        )
        return through(mixed, config.hidden_size, "c_proj"), fresh


class GPT2MLP(nn.Module):
    """``c_proj(act(c_fc(x)))``."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        through = _projection(self)
        x = through(x, self.config.intermediate_size, "c_fc")
        return through(ACTIVATIONS[self.config.activation](x), self.config.hidden_size, "c_proj")


class GPT2Block(nn.Module):
    """Attention and MLP, each after a norm and added to the stream."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any
    attention: Attention

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.ln_1 = LayerNorm(self.config.layer_norm_eps, **types)
        self.attn = GPT2Attention(self.config, attention=self.attention, **types)
        self.ln_2 = LayerNorm(self.config.layer_norm_eps, **types)
        self.mlp = GPT2MLP(self.config, **types)

    def __call__(
        self, x: jax.Array, attending: Attending, divisor: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, tuple[LayerCache | None, jax.Array | None]]:
        """x [B, T, D] -> (x, (fresh keys and values or None, x if hidden states are wanted))."""
        x = entering(x)
        mixed, fresh = self.attn(self.ln_1(x), attending, divisor, cache)
        x = x + mixed
        x = x + self.mlp(self.ln_2(x))
        return x, (fresh, x if attending.emit_hidden else None)


def _projection(module: GPT2Attention | GPT2MLP) -> Any:
    return functools.partial(
        project,
        use_bias=True,
        initializer_range=module.config.initializer_range,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
    )


class GPT2Model(nn.Module):
    """Embeddings of tokens and positions, blocks and final norm."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any
    scan: bool
    remat: Remat
    attention: Attention

    def setup(self) -> None:
        check_options(self.remat, self.attention)
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(config.initializer_range)
        embed = functools.partial(Embed, features=config.hidden_size, embedding_init=init)
        self.wte = embed(config.vocab_size, **types)
        self.wpe = embed(config.max_position_embeddings, **types)
        self.h = stacked(
            GPT2Block,
            config.num_hidden_layers,
            scan=self.scan,
            remat=self.remat,
            config=config,
            attention=self.attention,
            **types,
        )
        self.ln_f = LayerNorm(config.layer_norm_eps, **types)

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        attending: Attending,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Ids [B, T] -> (normed x [B, T, D], fresh k and v [L, B, T, N, H], hidden states)."""
        x = embedded = self.wte(input_ids) + self.wpe(positions)
        divisors = jnp.arange(1, self.config.num_hidden_layers + 1, dtype=jnp.float32)
        x, (fresh, hidden) = run(self.h, x, attending, divisors, cache)
        x = self.ln_f(x)
        if hidden is not None:
            hidden = jnp.concatenate([embedded[None], hidden[:-1], x[None]])
        return x, fresh, hidden

    def attend(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] against every token's embedding: [B, T, V]."""
        return self.wte.attend(x)


class GPT2LMHeadModel(CausalLM):
    """GPT-2; its fields are those of :class:`~jqlora.models.causal.CausalLM`.

    The list of its blocks is ``h``. Positions from ``max_position_embeddings`` on have no
    embedding: NaN, as ``nn.Embed`` gives.
    """

    base_name = "transformer"
    config: GPT2Config

    def make_base(self, **fields: Any) -> nn.Module:
        return GPT2Model(self.config, **fields)
