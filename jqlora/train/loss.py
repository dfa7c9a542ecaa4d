"""Next-token cross-entropy over the tokens that are to be learnt.

A batch is a dict of ``[B, T]`` arrays:

* ``input_ids`` int32, the tokens;
* ``positions`` int32, the position of each token in its own sequence;
* ``segment_ids`` int32, 0 for padding, else the number of the sequence within its packed row;
* ``loss_mask`` bool or int, nonzero where the token is one to be learnt (the completion).

Sums and counts are returned rather than means, because a mean over micro-batches or over batches is
only right when it is weighted by its tokens.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jqlora.train.by_chunks import chunk_losses, summed_losses
from jqlora.types import Variables

INPUTS = ("input_ids", "positions", "segment_ids")
BATCH = (*INPUTS, "loss_mask")
"""The arrays of a batch: what the model reads, and what is to be learnt of it."""

Batch = Mapping[str, jax.Array | np.ndarray]


def next_tokens(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What each position predicts, and whether it counts: int32 and bool, both ``[B, T]``.

    Position ``t`` predicts token ``t + 1`` where that token is to be learnt and belongs to the same
    sequence; the last position of a row predicts nothing.
    """
    segments = jnp.asarray(batch["segment_ids"])
    targets = jnp.roll(batch["input_ids"], -1, axis=1)
    wanted = jnp.roll(jnp.asarray(batch["loss_mask"]).astype(bool), -1, axis=1)
    together = (segments == jnp.roll(segments, -1, axis=1)) & (segments > 0)
    return targets, (wanted & together).at[:, -1].set(False)


def cross_entropy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum of ``-log p(next token)`` over the counted tokens, and their number; both fp32 scalars.

    ``logits`` ``[B, T, V]`` of any float dtype are taken to fp32 before the softmax.
    """
    targets, counted = next_tokens(batch)
    return chunk_losses(logits, targets, counted), counted.sum(dtype=jnp.float32)


def causal_lm_loss(
    apply, variables: Variables, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """:func:`cross_entropy` of a causal language model bound by ``jq.bind``, on one batch.

    Where the model's states and head can be called apart (:class:`~jqlora.models.CausalLM`), the
    logits of the whole batch are never made, see :mod:`jqlora.train.by_chunks`.
    """
    inputs = {name: batch[name] for name in INPUTS}
    targets, counted = next_tokens(batch)
    total = summed_losses(apply, variables, inputs, targets, counted, key)
    return total, counted.sum(dtype=jnp.float32)
