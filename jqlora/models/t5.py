"""T5, T5 v1.1, FLAN-T5 and mT5 (arXiv:1910.10683): an encoder-decoder with relative positions.

Scores are not scaled; to them is added what a table says of the distance between query and key, in
buckets: exact nearby, logarithmic farther off, none beyond a longest distance. One table serves all
layers of a stack. It belongs to the first layer in the checkpoint, and here to the stack, so that
layers are equal and may be scanned.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.attention import Attention, LayerCache
from jqlora.models.masks import Attending
from jqlora.models.multi_head import MultiHeadAttention, Shared
from jqlora.models.norm import RMSNorm
from jqlora.models.projection import project
from jqlora.models.seq2seq import DecoderCache, Stacked
from jqlora.models.stack import Remat, check_options, entering, run, stacked
from jqlora.models.t5_config import T5Config


def distance_buckets(length: int, *, both_ways: bool, count: int, longest: int) -> np.ndarray:
    """int32 [2 length - 1]: the bucket of each distance key - query, from 1 - length to
    length - 1, in float32 as in transformers.

    Both ways, half the buckets are for keys behind the query; else those share the first.
    """
    distance = np.arange(1 - length, length)
    behind = 0
    if both_ways:
        count //= 2
        behind = count * (distance > 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = count // 2
    far = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    width = np.float32(math.log(longest / exact))
    steps = np.log(far) / width * np.float32(count - exact)
    bucket = np.minimum(exact + steps.astype(np.int32), count - 1)
    return (behind + np.where(distance < exact, distance, bucket)).astype(np.int32)


class T5Attention(nn.Module):
    """Attention after a norm, added to the stream; ``inner`` is what its module is called."""

    config: T5Config
    inner: str
    dtype: Any
    param_dtype: Any
    attention: Attention

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array | None, attending: Attending, **given: Any
    ) -> tuple[jax.Array, LayerCache]:
        """x [B, T, D] attends to ``memory`` [B, S, D], to itself where it has ``SelfAttention``,
        or to what is ``given`` as known -> (x, keys and values)."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normed = RMSNorm(self.config.layer_norm_eps, name="layer_norm", **types)(x)
        source = normed if self.inner == "SelfAttention" else memory
        mixed, known = MultiHeadAttention(
            self.config.heads, attention=self.attention, name=self.inner, **types
        )(normed, source, attending, **given)
        return x + mixed, known


class DenseReluDense(nn.Module):
    """``wo(act(wi(x)))``, or ``wo(act(wi_0(x)) · wi_1(x))`` where gated (arXiv:2002.05202)."""

    config: T5Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        through = functools.partial(
            project, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
        )
        factor, width = config.initializer_factor, config.intermediate_size
        inward = functools.partial(
            through, initializer_range=factor * config.hidden_size**-0.5, features=width
        )
        act = ACTIVATIONS[config.activation]
        if config.gated:
            y = act(inward(x, name="wi_0")) * inward(x, name="wi_1")
        else:
            y = act(inward(x, name="wi"))
        return through(y, config.hidden_size, "wo", initializer_range=factor * width**-0.5)


class T5FeedForward(nn.Module):
    """The MLP after a norm, added to the stream."""

    config: T5Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normed = RMSNorm(self.config.layer_norm_eps, name="layer_norm", **types)(x)
        return x + DenseReluDense(self.config, name="DenseReluDense", **types)(normed)


class T5Block(nn.Module):
    """Self-attention, attention to the encoder in a decoder, and MLP, numbered as its layers."""

    config: T5Config
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
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = functools.partial(T5Attention, self.config, attention=self.attention, **types)
        past, known = (None, None) if cache is None else cache
        x, fresh = attention("SelfAttention", name="layer_0")(
            x, None, shared.attending, bias=shared.bias, cache=past
        )
        across = None
        if self.decoder:
            assert shared.across is not None
            x, across = attention("EncDecAttention", name="layer_1")(
                x, shared.memory, shared.across, known=known
            )
        x = T5FeedForward(self.config, name=f"layer_{1 + self.decoder}", **types)(x)
        kept = None
        if cache is not None:
            kept = fresh, None if shared.memory is None else across
        return x, (kept, x if shared.emit_hidden else None)


class T5Stack(nn.Module):
    """The encoder or the decoder: the table of distances, blocks and final norm."""

    config: T5Config
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
        spread = config.initializer_factor * config.hidden_size**-0.5
        self.relative_attention_bias = nn.Embed(
            config.buckets,
            config.num_attention_heads,
            embedding_init=nn.initializers.normal(spread),
            **types,
        )
        self.block = stacked(
            T5Block,
            self.depth,
            scan=self.scan,
            remat=self.remat,
            config=config,
            decoder=self.decoder,
            attention=self.attention,
            **types,
        )
        self.final_layer_norm = RMSNorm(config.layer_norm_eps, **types)

    @property
    def depth(self) -> int:
        config = self.config
        return config.num_decoder_layers if self.decoder else config.num_encoder_layers

    def __call__(
        self, x: jax.Array, slots: jax.Array, shared: Shared, past: DecoderCache | None
    ) -> Stacked:
        """Embedded x [B, T, D], its tokens in ``slots`` int32 [T] -> normed states."""
        embedded = x
        keys = x.shape[1] if past is None else past[0][0].shape[2]
        shared = shared.replace(bias=self._bias(slots, keys))  # pyright: ignore[reportAttributeAccessIssue]
        own = jnp.arange(self.depth, dtype=jnp.int32)
        x, (fresh, hidden) = run(self.block, x, shared, own, past)
        x = self.final_layer_norm(x)
        if hidden is not None:
            hidden = jnp.concatenate([embedded[None], hidden[:-1], x[None]])
        return x, fresh, hidden

    def _bias(self, slots: jax.Array, keys: int) -> jax.Array:
        """[1, N, T, S]: what is added to the scores of queries in ``slots`` with S keys."""
        buckets = distance_buckets(
            keys,
            both_ways=not self.decoder,
            count=self.config.buckets,
            longest=self.config.longest_distance,
        )
        distance = jnp.arange(keys, dtype=jnp.int32)[None, :] - slots[:, None]
        rows = jnp.asarray(buckets)[distance + (keys - 1)]
        return self.relative_attention_bias(rows).transpose(2, 0, 1)[None]
