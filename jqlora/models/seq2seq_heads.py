"""What encoder-decoders end in that do not write: a classifier of texts, and of tokens' ends.

They read the text twice, as their authors had it (arXiv:1910.13461, section 3.1): the decoder is
given the encoder's own text one place later, and its state at the text's end has seen all of it
with both.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.errors import CheckpointError, ConfigError
from jqlora.models.projection import project

IGNORED = -100
"""The label of what is not to be predicted, as everywhere in transformers."""


def shift_right(ids: jax.Array, config: Any) -> jax.Array:
    """Ids or labels int32 [B, T] as the decoder reads them: its start token, then all but the last,
    with padding in place of -100. Raises ConfigError where the config names no such tokens."""
    start, padding = config.decoder_start_token_id, config.pad_token_id
    if start is None or padding is None:
        raise ConfigError(
            f"decoder_start_token_id={start} and pad_token_id={padding} of the model's "
            "config must be tokens for a text to be shifted; or give decoder_input_ids"
        )
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    return jnp.where(before == IGNORED, padding, before)


def at_last(x: jax.Array, ids: jax.Array, token: int) -> jax.Array:
    """Of states x [B, T, D] those [B, D] at the last ``token`` of each row of ids int32 [B, T].

    A row without one has no such state: NaN, as ``nn.Embed`` gives for an id it does not know.
    """
    place = jnp.where(ids == token, jnp.arange(ids.shape[1], dtype=jnp.int32), -1).max(1)
    found = jnp.take_along_axis(x, jnp.maximum(place, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(place[:, None] >= 0, found, jnp.asarray(jnp.nan, x.dtype))


def end_of(config: Any) -> int:
    """The one token that a classifier's text ends in; CheckpointError where there is none, or are
    several."""
    if len(config.eos_token_ids) != 1:
        raise CheckpointError(
            f"config.json: eos_token_id={list(config.eos_token_ids)} is not supported for "
            "sequence-classification, which reads the state at that token; accepted: one token"
        )
    return config.eos_token_ids[0]


def config_for(config: Any, task: str) -> Any:
    """The configuration of a model for ``task``, which an answer's two ends or a text's end may
    touch; raises as :func:`end_of` does."""
    if task == "sequence-classification":
        end_of(config)
    return config.with_labels(2) if task == "question-answering" else config


class ClassificationHead(nn.Module):
    """``out_proj(tanh(dense(x)))``, both drawn with the standard deviation ``spread``."""

    labels: int
    spread: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, D] -> logits [B, labels]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"use_bias": True, "initializer_range": self.spread, **types}
        y = jnp.tanh(project(x, x.shape[-1], "dense", **options))
        return project(y, self.labels, "out_proj", **options)
