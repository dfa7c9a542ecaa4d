"""What every encoder-decoder is around its layers: embeddings, the head of its task, and a cache.

A family is a subclass that says how ids become the encoder's states and the decoder's, and the
decoder's states logits of tokens.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.attention import Attention, LayerCache
from jqlora.models.linear import Dense
from jqlora.models.masks import Attending
from jqlora.models.multi_head import Shared
from jqlora.models.outputs import (
    EncoderOutput,
    KVCache,
    Seq2SeqAnsweringOutput,
    Seq2SeqCache,
    Seq2SeqLMOutput,
)
from jqlora.models.preparation import append, attending_for, tokens_of
from jqlora.models.seq2seq_heads import ClassificationHead, at_last, end_of, shift_right
from jqlora.models.stack import Remat

DecoderCache = tuple[LayerCache, LayerCache | None]
"""Keys and values of the decoder's tokens and of the encoder's, each with lead axis [L]."""
Stacked = tuple[jax.Array, DecoderCache | None, jax.Array | None]
"""States [B, T, D], fresh keys and values, hidden states [L + 1, B, T, D]."""


class EncoderDecoder(nn.Module):
    """An encoder-decoder for one task; its other fields are those of
    :class:`~jqlora.models.causal.CausalLM`.

    It writes (seq2seq-lm), or classifies texts, or says how well each token begins and ends an
    answer; for token-classification it is its encoder alone.
    """

    cross_name = ""
    config: Any
    task: str = "seq2seq-lm"
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

    def setup_head(self, spread: float, classifier_spread: float) -> None:
        """Make the head of a task that does not write, drawn with these standard deviations; to be
        called from ``setup``."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.task == "sequence-classification":
            self.classification_head = ClassificationHead(self.config.num_labels, spread, **types)
        if self.task == "question-answering":
            init = nn.initializers.normal(spread)
            self.qa_outputs = Dense(2, kernel_init=init, **types)
        if self.task == "token-classification":
            init = nn.initializers.normal(classifier_spread)
            self.classifier = Dense(self.config.num_labels, kernel_init=init, **types)

    def __call__(
        self,
        input_ids: jax.Array | None,
        *,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        cache: Seq2SeqCache | None = None,
        output_hidden_states: bool = False,
    ) -> Seq2SeqLMOutput | Seq2SeqAnsweringOutput | EncoderOutput:
        """Logits [B, T, V] for ``decoder_input_ids`` int32 [B, T], given ``input_ids`` int32
        [B, S]; or what the task has in their place.

        Masks [B, S] and [B, T] are 1 at real tokens (padding on either side); outputs at padding
        mean nothing. With a ``cache`` the decoder's tokens are written behind the cached ones. The
        first such call runs the encoder and leaves what the decoder needs of it in the cache;
        those that follow pass None for ``input_ids`` and no ``attention_mask``.

        A model that does not write takes no cache, and without ``decoder_input_ids`` its decoder
        reads ``input_ids`` one place later. A classifier's row whose ``input_ids`` lack the end
        token has NaN for logits.

        Raises ValueError for a call that has neither ``input_ids`` nor a cache of them, or lacks or
        has what its task does not.
        """
        if self.task != "seq2seq-lm" and (cache is not None or input_ids is None):
            raise ValueError(f"a model for {self.task} takes input_ids and no cache")
        x, hidden, cache = self._through_layers(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            cache=cache,
            emit_hidden=output_hidden_states,
        )
        if self.task == "token-classification":
            return EncoderOutput(
                logits=self.classifier(x), hidden_states=hidden["encoder_hidden_states"]
            )
        if self.task == "question-answering":
            ends = self.qa_outputs(x)
            return Seq2SeqAnsweringOutput(
                start_logits=ends[..., 0], end_logits=ends[..., 1], **hidden
            )
        if self.task == "sequence-classification":
            assert input_ids is not None
            pooled = at_last(x, input_ids, end_of(self.config))
            return Seq2SeqLMOutput(logits=self.classification_head(pooled), **hidden)
        return Seq2SeqLMOutput(logits=self.head(x), cache=cache, **hidden)

    def states(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D]: what :meth:`head` makes logits of; arguments as for a call."""
        return self._through_layers(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            cache=None,
            emit_hidden=False,
        )[0]

    def _through_layers(
        self,
        input_ids: jax.Array | None,
        *,
        attention_mask: jax.Array | None,
        decoder_input_ids: jax.Array | None,
        decoder_attention_mask: jax.Array | None,
        cache: Seq2SeqCache | None,
        emit_hidden: bool,
    ) -> tuple[jax.Array, dict[str, Any], Seq2SeqCache | None]:
        """The last states of all layers that the task has, the hidden states by their names in an
        output, and the cache after this call."""
        memory = encoder_hidden = None
        source = attention_mask
        if input_ids is not None:
            both = Attending.both_ways(attention_mask, emit_hidden=emit_hidden)
            memory, _, encoder_hidden = self.encode(input_ids, Shared(both))
        elif cache is None or cache.cross is None or attention_mask is not None:
            raise ValueError(
                "without input_ids a call needs a cache that has seen them, and no attention_mask"
            )
        else:
            source = cache.source
        if self.task == "token-classification":
            assert memory is not None
            return memory, {"encoder_hidden_states": encoder_hidden}, None
        if decoder_input_ids is None:
            if self.task == "seq2seq-lm" or input_ids is None:
                raise ValueError("a call that is to write needs decoder_input_ids")
            decoder_input_ids = shift_right(input_ids, self.config)
        tokens = tokens_of(
            decoder_input_ids.shape,
            attention_mask=decoder_attention_mask,
            positions=None,
            segment_ids=None,
            cache=None if cache is None else cache.decoder,
        )
        attending = attending_for(
            tokens,
            None if cache is None else cache.decoder,
            padded=decoder_attention_mask is not None,
            emit_hidden=emit_hidden,
        )
        shared = Shared(attending, memory=memory, across=Attending.both_ways(source))
        x, fresh, hidden = self._decoded(decoder_input_ids, shared, cache)
        if cache is not None:
            assert fresh is not None
            if input_ids is not None:
                whole = jnp.ones(input_ids.shape, bool)
                source = whole if source is None else source.astype(bool)
            cache = Seq2SeqCache(
                decoder=append(cache.decoder, fresh[0], tokens.segment_ids),
                cross=cache.cross if fresh[1] is None else fresh[1],
                source=source,
            )
        both_hidden = {"encoder_hidden_states": encoder_hidden, "decoder_hidden_states": hidden}
        return x, both_hidden, cache

    def _decoded(self, input_ids: jax.Array, shared: Shared, cache: Seq2SeqCache | None) -> Stacked:
        """The decoder's states for ids behind those that are cached; keys and values of the encoder
        are made anew where ``shared`` has its states."""
        slots = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        if cache is None:
            return self.decode(input_ids, slots, shared, None)
        past = cache.decoder
        known = cache.cross if shared.memory is None else None
        return self.decode(
            input_ids, slots + past.length, shared, ((past.keys, past.values), known)
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
        asked = {"input_ids": ids}
        return asked | {"decoder_input_ids": ids} if self.task == "seq2seq-lm" else asked
