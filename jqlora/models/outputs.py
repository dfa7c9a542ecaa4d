"""What models return, and what they remember between calls."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, in slots ``0 .. length - 1``.

    Invariants: all leaves are of static shape; slots from ``length`` on are zeros with segment 0;
    one ``length`` serves the whole batch, so prompts of different lengths are padded on the left.
    """

    keys: jax.Array  # [L, B, S, KV, head_dim] in the compute dtype
    values: jax.Array  # [L, B, S, KV, head_dim]
    segment_ids: jax.Array  # int32 [B, S]: 0 where a slot is empty or padding
    length: jax.Array  # int32 []

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int, int], dtype: DTypeLike) -> "KVCache":
        """A cache of this shape [L, B, S, KV, head_dim] with nothing in it."""
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segment_ids=jnp.zeros(shape[1:3], jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )


@struct.dataclass
class CausalLMOutput:
    """Logits, and on request every hidden state and the cache after this call.

    ``hidden_states`` are transformers' ``output_hidden_states``: the embeddings, then the output of
    each layer, the last one after the final norm.
    """

    logits: jax.Array  # [B, T, V] in the compute dtype
    hidden_states: jax.Array | None = None  # [L + 1, B, T, D]
    cache: KVCache | None = None


@struct.dataclass
class EncoderOutput:
    """Logits [B, T, V] of a masked language model, [B, labels] or [B, T, labels] of a classifier.

    ``hidden_states`` are the embeddings, then the output of each layer.
    """

    logits: jax.Array
    hidden_states: jax.Array | None = None  # [L + 1, B, T, D]


@struct.dataclass
class QuestionAnsweringOutput:
    """How well each token begins and ends the answer, in the compute dtype."""

    start_logits: jax.Array  # [B, T]
    end_logits: jax.Array  # [B, T]
    hidden_states: jax.Array | None = None  # [L + 1, B, T, D]


@struct.dataclass
class Seq2SeqCache:
    """What an encoder-decoder remembers: the decoder's own keys and values, and those of its
    attention to the encoder, which are the same for every step.

    ``cross`` and ``source`` are None until a call with ``input_ids`` has run the encoder.
    """

    decoder: KVCache
    cross: tuple[jax.Array, jax.Array] | None = None  # keys and values [L, B, S, N, head_dim]
    source: jax.Array | None = None  # bool [B, S]: which of the encoder's tokens are real


@struct.dataclass
class Seq2SeqLMOutput:
    """Logits of the decoder, and on request every hidden state and the cache after this call.

    Hidden states are as in :class:`CausalLMOutput`; the encoder has none where it did not run.
    """

    logits: jax.Array  # [B, T, V], or [B, labels] of a classifier, in the compute dtype
    encoder_hidden_states: jax.Array | None = None  # [encoder's L + 1, B, S, D]
    decoder_hidden_states: jax.Array | None = None  # [decoder's L + 1, B, T, D]
    cache: Seq2SeqCache | None = None


@struct.dataclass
class Seq2SeqAnsweringOutput:
    """How well each token begins and ends the answer, in the compute dtype; hidden states as in
    :class:`Seq2SeqLMOutput`."""

    start_logits: jax.Array  # [B, T]
    end_logits: jax.Array  # [B, T]
    encoder_hidden_states: jax.Array | None = None  # [encoder's L + 1, B, S, D]
    decoder_hidden_states: jax.Array | None = None  # [decoder's L + 1, B, T, D]
