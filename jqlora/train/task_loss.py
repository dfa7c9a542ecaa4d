"""The losses of tasks beyond the next token, equal to transformers' ``.loss``.

A batch holds ``input_ids`` int32 [B, T], mostly ``attention_mask`` [B, T] and ``token_type_ids``
[B, T], and what is to be predicted:

* masked-lm, token-classification: ``labels`` int32 [B, T], -100 where nothing is asked;
* sequence-classification: ``labels`` int32 [B] for one label of several; float [B, labels] for
  several at once; float [B] or [B, labels] for regression, NaN where nothing is asked;
* question-answering: ``start_positions`` and ``end_positions`` int32 [B]; one outside of the row
  counts nothing;
* seq2seq-lm: ``labels`` int32 [B, T'], -100 where nothing is asked. The decoder reads them one
  place later behind the config's ``decoder_start_token_id``, or ``decoder_input_ids`` [B, T'].

Each gives a sum and the count to divide it by, as ``make_train_step`` wants. Logits of whole
vocabularies are made by chunks, as for next tokens (:mod:`jqlora.train.by_chunks`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jqlora.errors import ConfigError
from jqlora.models.seq2seq_heads import IGNORED, shift_right
from jqlora.train.by_chunks import chunk_losses, summed_losses
from jqlora.train.loss import Batch, causal_lm_loss
from jqlora.types import Variables

Summed = tuple[jax.Array, jax.Array]
Loss = Callable[[Any, Variables, Batch, jax.Array | None], Summed]

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "positions")
SEQ2SEQ_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def loss_for(model: Any) -> Loss:
    """The loss of ``model``'s task: ``loss(apply, variables, batch, key) -> (sum, count)``.

    For a sequence classifier the config's ``problem_type`` decides; without one, as in
    transformers, a single output means regression, integer labels one label of several, and others
    several at once. Raises ConfigError for a task that has none.

    >>> step = make_train_step(apply, tx, loss=loss_for(model))     # doctest: +SKIP
    """
    task = model.task
    if task == "causal-lm":
        return causal_lm_loss
    if task == "question-answering":
        return _answering_loss
    if task == "masked-lm":
        return _masked_loss
    if task == "token-classification":
        return _labelled(classes)
    if task == "seq2seq-lm":
        return _seq2seq(model.config)
    if task == "sequence-classification":
        return _labelled(lambda logits, labels: _classifier_loss(model.config, logits, labels))
    raise ConfigError(f"task={task!r} has no loss here")


def classes(logits: jax.Array, labels: jax.Array) -> Summed:
    """Cross-entropy of logits [..., C] over the labels int [...] that are not -100."""
    targets, counted = _asked(labels)
    return chunk_losses(logits, targets, counted), counted.sum(dtype=jnp.float32)


def binaries(logits: jax.Array, labels: jax.Array) -> Summed:
    """Binary cross-entropy of logits [B, C] with labels [B, C] in 0..1, over all entries."""
    losses = optax.sigmoid_binary_cross_entropy(
        logits.astype(jnp.float32), labels.astype(jnp.float32)
    )
    return losses.sum(), jnp.float32(losses.size)


def squares(logits: jax.Array, labels: jax.Array) -> Summed:
    """Squared error of logits [B, C] and labels [B, C], or [B] where C is 1, over all entries
    whose label is a number; NaN counts nothing."""
    labels = labels.reshape(logits.shape).astype(jnp.float32)
    counted = ~jnp.isnan(labels)
    errors = jnp.square(logits.astype(jnp.float32) - jnp.where(counted, labels, 0.0))
    return jnp.where(counted, errors, 0.0).sum(), counted.sum(dtype=jnp.float32)


_BY_PROBLEM = {
    "regression": squares,
    "single_label_classification": classes,
    "multi_label_classification": binaries,
}


def _classifier_loss(config: Any, logits: jax.Array, labels: jax.Array) -> Summed:
    problem = config.problem_type
    if problem is None:
        integer = jnp.issubdtype(labels.dtype, jnp.integer)
        problem = "single_label_classification" if integer else "multi_label_classification"
        if config.num_labels == 1:
            problem = "regression"
        elif not integer and config.model_type == "deberta-v2":
            # transformers means soft labels here, which it does for no other encoder
            raise ConfigError("labels are float: set problem_type in the model's config")
    return _BY_PROBLEM[problem](logits, labels)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {name: batch[name] for name in INPUTS if name in batch}


def _labelled(measure: Callable[[jax.Array, jax.Array], Summed]) -> Loss:
    def loss(apply: Any, variables: Variables, batch: Batch, key: jax.Array | None) -> Summed:
        logits = apply(variables, **_inputs(batch), key=key).logits
        return measure(logits, jnp.asarray(batch["labels"]))

    return loss


def _asked(labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The labels, with some class where nothing is asked; and where something is."""
    counted = labels != IGNORED
    return jnp.where(counted, labels, 0), counted


def _over_vocabulary(
    apply: Any, variables: Variables, inputs: dict[str, Any], labels: jax.Array, key: Any
) -> Summed:
    targets, counted = _asked(labels)
    total = summed_losses(apply, variables, inputs, targets, counted, key)
    return total, counted.sum(dtype=jnp.float32)


def _masked_loss(apply: Any, variables: Variables, batch: Batch, key: jax.Array | None) -> Summed:
    return _over_vocabulary(apply, variables, _inputs(batch), jnp.asarray(batch["labels"]), key)


def _seq2seq(config: Any) -> Loss:
    def loss(apply: Any, variables: Variables, batch: Batch, key: jax.Array | None) -> Summed:
        labels = jnp.asarray(batch["labels"])
        inputs = {name: batch[name] for name in SEQ2SEQ_INPUTS if name in batch}
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = shift_right(labels, config)
        return _over_vocabulary(apply, variables, inputs, labels, key)

    return loss


def _answering_loss(
    apply: Any, variables: Variables, batch: Batch, key: jax.Array | None
) -> Summed:
    """The mean of the two ends' cross-entropies, each over the ends that lie in the row."""
    output = apply(variables, **_inputs(batch), key=key)
    length = output.start_logits.shape[1]
    means, counts = [], []
    for logits, name in (
        (output.start_logits, "start_positions"),
        (output.end_logits, "end_positions"),
    ):
        ends = jnp.clip(jnp.asarray(batch[name]), 0, length)
        total, count = classes(logits, jnp.where(ends == length, IGNORED, ends))
        means.append(total / jnp.maximum(count, 1.0))
        counts.append(count)
    count = (counts[0] + counts[1]) / 2
    return count * (means[0] + means[1]) / 2, count
