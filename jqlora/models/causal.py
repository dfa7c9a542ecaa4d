"""What every causal language model is around its layers: a base, a head, and a cache.

A family is a subclass that names its base module and makes it. The base maps ids to states and
holds states against its embedding where the head is tied to that.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.attention import Attention, LayerCache
from jqlora.models.linear import Dense
from jqlora.models.masks import Attending
from jqlora.models.outputs import CausalLMOutput, KVCache
from jqlora.models.preparation import Tokens, append, attending_for, tokens_of
from jqlora.models.stack import Remat


class CausalLM(nn.Module):
    """A causal language model; parameters are ``param_dtype``, computation is ``dtype``.

    ``scan`` stacks the layers' parameters on a lead axis [L] under the name of their list, such as
    ``layers`` (compile time does not grow with depth); without it they live under ``layers_0``,
    ``layers_1``, ... . ``remat`` "full" keeps only each layer's input for the backward pass,
    "offload" in pinned host memory, "dots" the projections' outputs too. ``attention`` "auto" is
    cuDNN for half-precision calls on a GPU and XLA elsewhere.
    """

    task = "causal-lm"
    base_name = ""
    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = True
    remat: Remat = "none"
    attention: Attention = "auto"

    def make_base(self, **fields: Any) -> nn.Module:
        """The base, called as ``base(input_ids, positions, attending, past)``; it returns the
        normed states [B, T, D], the fresh keys and values [L, B, T, KV, H] and the hidden states.
        """
        raise NotImplementedError

    def attending(
        self, tokens: Tokens, cache: KVCache | None, *, padded: bool, emit_hidden: bool
    ) -> Attending:
        """What the layers share in one call."""
        return attending_for(tokens, cache, padded=padded, emit_hidden=emit_hidden)

    def finish(self, logits: jax.Array) -> jax.Array:
        """What the head's products become, [B, T, V]."""
        return logits

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        base = self.make_base(scan=self.scan, remat=self.remat, attention=self.attention, **types)
        setattr(self, self.base_name, base)
        if not self.config.tie_word_embeddings:
            init = nn.initializers.normal(self.config.initializer_range)
            self.lm_head = Dense(self.config.vocab_size, use_bias=False, kernel_init=init, **types)

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
        x, fresh, hidden, tokens = self._through_layers(
            input_ids,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            emit_hidden=output_hidden_states,
        )
        logits = self.head(x[:, -logits_to_keep:])  # -0 keeps all
        if cache is not None:
            assert fresh is not None
            cache = append(cache, fresh, tokens.segment_ids)
        return CausalLMOutput(logits=logits, hidden_states=hidden, cache=cache)

    def states(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D]: what :meth:`head` makes logits of; arguments as for a call."""
        return self._through_layers(
            input_ids,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
            cache=None,
            emit_hidden=False,
        )[0]

    def head(self, x: jax.Array) -> jax.Array:
        """Logits [B, T, V] of states [B, T, D]."""
        if self.config.tie_word_embeddings:
            return self.finish(getattr(self, self.base_name).attend(x))
        return self.finish(self.lm_head(x))

    def _through_layers(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: KVCache | None,
        emit_hidden: bool,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None, Tokens]:
        tokens = tokens_of(
            input_ids.shape,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
        )
        padded = attention_mask is not None or segment_ids is not None
        attending = self.attending(tokens, cache, padded=padded, emit_hidden=emit_hidden)
        past = None if cache is None else (cache.keys, cache.values)
        base = getattr(self, self.base_name)
        return *base(input_ids, tokens.positions, attending, past), tokens

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for ``length`` tokens (padding included) of ``batch`` rows."""
        config = self.config
        heads = (config.num_key_value_heads, config.head_dim)
        return KVCache.empty((config.num_hidden_layers, batch, length, *heads), self.dtype)

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the smallest call, to trace the model without data."""
        return {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}
