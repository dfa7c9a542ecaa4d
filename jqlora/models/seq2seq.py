"""What every encoder-decoder is around its layers: embeddings, a head, and a cache.

A family is a subclass that says how ids become the encoder's states and the decoder's, and states
logits.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.attention import Attention, LayerCache
from jqlora.models.masks import Attending
from jqlora.models.multi_head import Shared
from jqlora.models.outputs import KVCache, Seq2SeqCache, Seq2SeqLMOutput
from jqlora.models.preparation import append, attending_for, tokens_of
from jqlora.models.stack import Remat

DecoderCache = tuple[LayerCache, LayerCache | None]
"""Keys and values of the decoder's tokens and of the encoder's, each with lead axis [L]."""
Stacked = tuple[jax.Array, DecoderCache | None, jax.Array | None]
"""States [B, T, D], fresh keys and values, hidden states [L + 1, B, T, D]."""


class Seq2SeqLM(nn.Module):
    """A language model with an encoder; its fields are those of
    :class:`~jqlora.models.causal.CausalLM`."""

    task = "seq2seq-lm"
    cross_name = ""
    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = True
    remat: Remat = "none"
    attention: Attention = "auto"

    def encode(self, input_ids: jax.Array, shared: Shared) -> Stacked:
        """Ids int32 [B, S] -> the encoder's states."""
        raise NotImplementedError

    def decode(
        self, input_ids: jax.Array, slots: jax.Array, shared: Shared, past: DecoderCache | None
    ) -> Stacked:
        """Ids int32 [B, T], which stand in ``slots`` int32 [T] -> the decoder's states."""
        raise NotImplementedError

    def head(self, x: jax.Array) -> jax.Array:
        """States [B, T, D] -> logits [B, T, V]."""
        raise NotImplementedError

    def __call__(
        self,
        input_ids: jax.Array | None,
        *,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array,
        decoder_attention_mask: jax.Array | None = None,
        cache: Seq2SeqCache | None = None,
        output_hidden_states: bool = False,
    ) -> Seq2SeqLMOutput:
        """Logits [B, T, V] for ``decoder_input_ids`` int32 [B, T], given ``input_ids`` int32
        [B, S].

        Masks [B, S] and [B, T] are 1 at real tokens (padding on either side); outputs at padding
        mean nothing. With a ``cache`` the decoder's tokens are written behind the cached ones. The
        first such call runs the encoder and leaves what the decoder needs of it in the cache;
        those that follow pass None for ``input_ids`` and no ``attention_mask``.

        Raises ValueError for a call that has neither ``input_ids`` nor a cache of them.
        """
        known = None if cache is None else cache.cross
        past = None if cache is None else cache.decoder
        memory = encoder_hidden = None
        source = attention_mask
        if input_ids is not None:
            both = Attending.both_ways(attention_mask, emit_hidden=output_hidden_states)
            memory, _, encoder_hidden = self.encode(input_ids, Shared(both))
            known = None
        elif known is None or attention_mask is not None:
            raise ValueError(
                "without input_ids a call needs a cache that has seen them, and no attention_mask"
            )
        else:
            assert cache is not None
            source = cache.source
        tokens = tokens_of(
            decoder_input_ids.shape,
            attention_mask=decoder_attention_mask,
            positions=None,
            segment_ids=None,
            cache=past,
        )
        shared = Shared(
            attending_for(
                tokens,
                past,
                padded=decoder_attention_mask is not None,
                emit_hidden=output_hidden_states,
            ),
            memory=memory,
            across=Attending.both_ways(source),
        )
        slots = jnp.arange(decoder_input_ids.shape[1], dtype=jnp.int32)
        if past is not None:
            slots = slots + past.length
        x, fresh, hidden = self.decode(
            decoder_input_ids,
            slots,
            shared,
            None if past is None else ((past.keys, past.values), known),
        )
        if cache is not None:
            assert fresh is not None
            assert past is not None
            if input_ids is not None:
                whole = jnp.ones(input_ids.shape, bool)
                source = whole if source is None else source.astype(bool)
            cache = Seq2SeqCache(
                decoder=append(past, fresh[0], tokens.segment_ids),
                cross=known if fresh[1] is None else fresh[1],
                source=source,
            )
        return Seq2SeqLMOutput(
            logits=self.head(x),
            encoder_hidden_states=encoder_hidden,
            decoder_hidden_states=hidden,
            cache=cache,
        )

    def leaves_out(self, path: tuple[str, ...], *args: Any, **kwargs: Any) -> bool:
        """Whether a call with these arguments means to leave out the module at ``path``: one
        without ``input_ids`` does without the encoder, and without what makes its keys and values.
        """
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is not None:
            return False
        return "encoder" in path or (
            self.cross_name in path and path[-1] in self.config.heads.names[1:3]
        )

    def init_cache(self, batch: int, length: int) -> Seq2SeqCache:
        """An empty cache for ``length`` tokens of the decoder in each of ``batch`` rows."""
        config = self.config
        heads = (config.heads.count, config.heads.head_dim)
        shape = (config.num_decoder_layers, batch, length, *heads)
        return Seq2SeqCache(decoder=KVCache.empty(shape, self.dtype))

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the smallest call, to trace the model without data."""
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return {"input_ids": ids, "decoder_input_ids": ids}
