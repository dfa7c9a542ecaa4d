"""T5 with the head of its task, as the checkpoints of each class have it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.errors import ConfigError
from jqlora.models.attention import Attention
from jqlora.models.linear import Dense, Embed
from jqlora.models.multi_head import Shared
from jqlora.models.seq2seq import DecoderCache, EncoderDecoder, Stacked
from jqlora.models.seq2seq_heads import config_for
from jqlora.models.stack import Remat
from jqlora.models.t5 import T5Stack
from jqlora.models.t5_config import T5Config

INSIDE = ("sequence-classification", "token-classification")
"""Tasks whose classes in transformers keep all but the head in a module, ``transformer``."""


def t5_parts(config: T5Config, *, decoder: bool, options: dict[str, Any]) -> dict[str, nn.Module]:
    """Everything but the head, by the names of the checkpoint; ``options`` are those of a stack."""
    types = {name: options[name] for name in ("dtype", "param_dtype")}
    init = nn.initializers.normal(config.initializer_factor)
    parts: dict[str, nn.Module] = {
        "shared": Embed(config.vocab_size, config.hidden_size, embedding_init=init, **types),
        "encoder": T5Stack(config, decoder=False, **options),
    }
    if decoder:
        parts["decoder"] = T5Stack(config, decoder=True, **options)
    return parts


class T5Model(nn.Module):
    """Everything but the head, of the classes that keep it in a module of its own."""

    config: T5Config
    has_decoder: bool
    dtype: Any
    param_dtype: Any
    scan: bool
    remat: Remat
    attention: Attention

    def setup(self) -> None:
        fields = ("dtype", "param_dtype", "scan", "remat", "attention")
        options = {name: getattr(self, name) for name in fields}
        parts = t5_parts(self.config, decoder=self.has_decoder, options=options)
        for name, part in parts.items():
            setattr(self, name, part)


class T5ForTask(EncoderDecoder):
    """Any of them; the lists of blocks are ``encoder/block`` and ``decoder/block``, within
    ``transformer`` for a classifier."""

    cross_name = "EncDecAttention"
    config: T5Config

    def setup(self) -> None:
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"scan": self.scan, "remat": self.remat, "attention": self.attention, **types}
        if self.task in INSIDE:
            has_decoder = self.task != "token-classification"
            self.transformer = T5Model(config, has_decoder, **options)
        else:
            for name, part in t5_parts(config, decoder=True, options=options).items():
                setattr(self, name, part)
        if self.task == "seq2seq-lm" and not config.tie_word_embeddings:
            init = nn.initializers.normal(config.initializer_factor)
            self.lm_head = Dense(config.vocab_size, use_bias=False, kernel_init=init, **types)
        spread = config.initializer_factor
        self.setup_head(spread * config.hidden_size**-0.5, spread)

    @property
    def _base(self) -> Any:
        return self.transformer if self.task in INSIDE else self

    def encode(self, input_ids: jax.Array, shared: Shared) -> Stacked:
        slots = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        return self._base.encoder(self._base.shared(input_ids), slots, shared, None)

    def decode(
        self, input_ids: jax.Array, slots: jax.Array, shared: Shared, past: DecoderCache | None
    ) -> Stacked:
        return self._base.decoder(self._base.shared(input_ids), slots, shared, past)

    def head(self, x: jax.Array) -> jax.Array:
        if self.config.scaled_logits:
            x = x * jnp.asarray(self.config.hidden_size**-0.5, x.dtype)
        return self._base.shared.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)


def build_t5(
    config: T5Config, task: str = "seq2seq-lm", dtype: Any = jnp.float32, **options: Any
) -> T5ForTask:
    """The module. Raises ConfigError for float16, which T5's activations overflow, and
    CheckpointError for a classifier whose config names no one end token."""
    types = {"dtype": dtype, "param_dtype": dtype, **options}
    if jnp.float16 in (types["dtype"], types["param_dtype"]):
        raise ConfigError(
            "dtype='float16' overflows in T5's activations; accepted: bfloat16, float32"
        )
    return T5ForTask(config_for(config, task), task, **types)
