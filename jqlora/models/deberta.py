"""DeBERTa v2 and v3 without their heads (arXiv:2006.03654, arXiv:2111.09543).

A score has up to three terms (equation 4 of the first): content with content, content with
position (c2p), position with content (p2c). Positions are relative, and embedded by bucket: exact
nearby, logarithmic farther off.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.disentangled import Disentangled
from jqlora.models.encoder import Embeddings, EncoderLayer, norm
from jqlora.models.encoder_config import EncoderConfig
from jqlora.models.encoder_stack import run_stack
from jqlora.models.linear import Dense
from jqlora.models.norm import layer_norm
from jqlora.models.projection import keep
from jqlora.models.stack import Remat


@struct.dataclass
class Shared:
    """What every layer of one call shares: masks, relative positions, the convolution's output."""

    real: jax.Array  # bool [B, S]
    table: jax.Array | None  # [2 span, D]: the positions' embeddings
    rows: jax.Array | None  # int32 [T, S]: which of them serves a query and a key
    conv: tuple[jax.Array, jax.Array, jax.Array] | None  # [B, T, D], the norm's scale and bias
    epsilon: float = struct.field(pytree_node=False)
    emit_hidden: bool = struct.field(pytree_node=False)

    def after_layer(self, x: jax.Array, first: jax.Array) -> jax.Array:
        """x [B, T, D]; the first layer's output with the convolution added, and normed anew."""
        if self.conv is None:
            return x
        out, scale, bias = self.conv
        y = layer_norm(x + out, scale, bias, self.epsilon)
        return jnp.where(first, jnp.where(self.real[..., None], y, 0).astype(x.dtype), x)


def position_rows(config: Disentangled, length: int) -> jax.Array:
    """int32 [T, T]: the row of the position table for query i and key j, by the bucket of i - j."""
    distance = np.arange(1 - length, length)
    if config.buckets:
        distance = _log_buckets(distance, config.buckets, config.longest)
    rows = jnp.asarray(np.clip(distance + config.span, 0, 2 * config.span - 1), jnp.int32)
    steps = jnp.arange(length, dtype=jnp.int32)
    return rows[steps[:, None] - steps[None, :] + (length - 1)]


def _log_buckets(distance: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    """Exact within half the buckets, then logarithmic, in float32 as in transformers."""
    middle = buckets // 2
    far = np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle)
    width = np.log(np.float32((longest - 1) / middle))
    steps = np.ceil(np.log(far) / width * np.float32(middle - 1)) + middle
    return np.where(np.abs(distance) <= middle, distance, steps * np.sign(distance)).astype(int)


class DisentangledSelfAttention(nn.Module):
    """Attention over contents and relative positions.

    With shared projections, positions go through the queries' and keys' own.
    """

    config: EncoderConfig
    types: Any

    def setup(self) -> None:
        config, extra = self.config, _extra(self.config)

        def projection() -> Dense:
            init = nn.initializers.normal(config.initializer_range)
            return Dense(config.hidden_size, kernel_init=init, **dict(self.types))

        self.query_proj, self.key_proj, self.value_proj = (projection() for _ in range(3))
        if not extra.shared_projections:
            if "c2p" in extra.terms:
                self.pos_key_proj = projection()
            if "p2c" in extra.terms:
                self.pos_query_proj = projection()

    def __call__(self, x: jax.Array, shared: Shared) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; scores and softmax are float32."""
        config, extra = self.config, _extra(self.config)

        def heads(projection: Dense, of: jax.Array) -> jax.Array:
            y = keep(projection(of))
            return y.reshape(*y.shape[:-1], config.num_attention_heads, config.head_dim)

        queries, keys = heads(self.query_proj, x), heads(self.key_proj, x)
        values = heads(self.value_proj, x)
        scores = product("bthd,bshd->bhts", queries, keys)
        if shared.table is not None and shared.rows is not None:
            scores += self._by_position(queries, keys, shared.table, shared.rows[None, None], heads)
        scores *= 1 / math.sqrt(config.head_dim * (1 + len(extra.terms)))
        # padding attends to everything alike, as in transformers: answers' losses count it
        both = shared.real[:, None, None, :] & shared.real[:, None, :, None]
        scores = jnp.where(both, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return jnp.einsum("bhts,bshd->bthd", weights, values).reshape(x.shape)

    def _by_position(
        self,
        queries: jax.Array,
        keys: jax.Array,
        table: jax.Array,
        rows: jax.Array,
        heads: Callable[[Dense, jax.Array], jax.Array],
    ) -> jax.Array:
        """The terms with positions: float32 [B, H, T, S], or 0 where there are none."""
        extra, scores = _extra(self.config), jnp.zeros((), jnp.float32)
        if "c2p" in extra.terms:
            project = self.key_proj if extra.shared_projections else self.pos_key_proj
            by_row = product("bthd,rhd->bhtr", queries, heads(project, table))
            scores = scores + jnp.take_along_axis(by_row, rows, axis=3)
        if "p2c" in extra.terms:
            project = self.query_proj if extra.shared_projections else self.pos_query_proj
            by_row = product("bshd,rhd->bhrs", keys, heads(project, table))
            scores = scores + jnp.take_along_axis(by_row, rows, axis=2)
        return scores


def product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Accumulated in float32, whatever the factors' dtype."""
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


class ConvLayer(nn.Module):
    """A convolution over the embeddings, and the norm that it shares with the first layer."""

    config: EncoderConfig
    types: Any

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D], real bool [B, T] -> (out [B, T, D], scale [D], bias [D])."""
        config, extra, types = self.config, _extra(self.config), dict(self.types)
        out = nn.Conv(
            config.hidden_size,
            kernel_size=(extra.conv_kernel,),
            padding=extra.conv_kernel // 2,
            feature_group_count=extra.conv_groups,
            name="conv",
            **types,
        )(x)
        out = ACTIVATIONS[extra.conv_act](jnp.where(real[..., None], out, jnp.zeros_like(out)))
        return out, *ScaleAndBias(types["param_dtype"], name="LayerNorm")(config.hidden_size)


class ScaleAndBias(nn.Module):
    """The parameters of a norm that is computed elsewhere."""

    param_dtype: Any

    @nn.compact
    def __call__(self, features: int) -> tuple[jax.Array, jax.Array]:
        return (
            self.param("scale", nn.initializers.ones, (features,), self.param_dtype),
            self.param("bias", nn.initializers.zeros, (features,), self.param_dtype),
        )


class DebertaEncoder(nn.Module):
    """The layers, the positions' table and the convolution."""

    config: EncoderConfig
    types: Any
    scan: bool
    remat: Remat

    @nn.compact
    def __call__(
        self, x: jax.Array, real: jax.Array, emit_hidden: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        config, extra, types = self.config, _extra(self.config), dict(self.types)
        table = conv = None
        if extra.relative:
            init = nn.initializers.normal(config.initializer_range)
            embed = nn.Embed(
                2 * extra.span,
                config.hidden_size,
                embedding_init=init,
                name="rel_embeddings",
                **types,
            )
            # no lookup: every row is used
            table = embed.embedding.astype(x.dtype)
            if extra.normed_positions:
                table = norm(config, types)(table)
        if extra.conv_kernel:
            conv = ConvLayer(config, self.types, name="conv")(x, real)
        return run_stack(
            EncoderLayer,
            x,
            Shared(
                real=real,
                table=table,
                rows=position_rows(extra, x.shape[1]) if extra.relative else None,
                conv=conv,
                epsilon=config.layer_norm_eps,
                emit_hidden=emit_hidden,
            ),
            depth=config.num_hidden_layers,
            name="layer",
            scan=self.scan,
            remat=self.remat,
            config=config,
            types=self.types,
            mixer=DisentangledSelfAttention,
        )


class DebertaModel(nn.Module):
    """Embeddings and layers."""

    config: EncoderConfig
    types: Any
    scan: bool
    remat: Remat

    def setup(self) -> None:
        config, extra = self.config, _extra(self.config)
        self.embeddings = Embeddings(
            config, self.types, extra.embedding_size, extra.absolute_positions
        )
        self.encoder = DebertaEncoder(config, self.types, self.scan, self.remat)

    def __call__(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None,
        token_type_ids: jax.Array | None,
        positions: jax.Array | None,
        emit_hidden: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Ids int32 [B, T] -> (x [B, T, D], hidden states [L + 1, B, T, D])."""
        if positions is None:
            positions = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]
        whole = jnp.ones(input_ids.shape, bool)
        real = whole if attention_mask is None else attention_mask.astype(bool)
        x = self.embeddings(input_ids, token_type_ids, positions)
        x = embedded = jnp.where(real[..., None], x, jnp.zeros_like(x))
        x, hidden = self.encoder(x, real, emit_hidden)
        return x, None if hidden is None else jnp.concatenate([embedded[None], hidden])

    def attend(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] against every token's embedding: [B, T, V]."""
        return self.embeddings.word_embeddings.attend(x)


def _extra(config: EncoderConfig) -> Disentangled:
    assert config.disentangled is not None
    return config.disentangled
