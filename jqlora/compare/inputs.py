"""What both sides are run on: texts or token ids, padded, with labels for the model's task.

Everything follows from the arguments and one seed. Rows have different lengths, so that padding is
part of what is compared. Labels are drawn, not meant: a loss and its gradient need some, and equal
ones on both sides.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jqlora.compare.observation import Arrays, Batch
from jqlora.errors import ConfigError, DataError
from jqlora.models.seq2seq_heads import end_of
from jqlora.train.task_loss import IGNORED

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "In 1969 two people walked on the Moon; a third stayed in orbit and saw its far side alone.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Water boils at 100 degrees Celsius at sea level, and at about 93 degrees in Denver.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.",
    "Elle a dit que le musée ouvrirait à neuf heures, sauf le lundi.",
    "Yes.",
    "The committee, which had met twice without agreeing, adjourned until the spring; its "
    "chairwoman, asked whether she would stand again, said that she had not been asked.",
    "Q: What is the capital of Australia?\nA: Canberra.",
    "3.14159 26535 89793 23846",
    "She sold the old piano, bought a better one, and learned to play it badly.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
)
BATCHES = 3
"""Batches that training goes through in turn."""
MASKED_SHARE, ASKED_SHARE = 0.3, 0.7


class Inputs(NamedTuple):
    """The batches, and in words where their tokens are from."""

    batches: list[Batch]
    origin: str


def make_inputs(
    model: Any,
    tokenizer: Any,
    *,
    texts: Sequence[str] | None = None,
    rows: int = 4,
    length: int | None = None,
    seed: int = 0,
    count: int = BATCHES,
) -> Inputs:
    """``count`` batches of ``rows`` rows, at most ``length`` tokens each (by default 64, or as many
    as the model has positions).

    Rows are ``texts`` in turn, by default :data:`TEXTS`; without a tokenizer they are random ids.
    Raises ConfigError for a length that the model has no positions for, DataError for texts without
    a tokenizer.
    """
    config, longest = model.config, positions_of(model.config)
    length = min(64, longest or 64) if length is None else length
    if not 2 <= length <= (longest or length):
        raise ConfigError(f"length={length}: accepted are 2 to {longest} tokens for this model")
    if rows < 1:
        raise ConfigError(f"batch={rows}: at least one row is needed")
    generator = np.random.default_rng(seed)
    if tokenizer is None:
        if texts is not None:
            raise DataError("texts were given, but the checkpoint has no tokenizer")
        source, origin = _random_rows(config, length, generator), f"random ids, seed {seed}"
    else:
        origin = "built-in texts" if texts is None else f"{len(texts)} texts"
        source = _text_rows(TEXTS if texts is None else texts, tokenizer, length)
    padding = _padding(config, tokenizer)
    mask_id = getattr(tokenizer, "mask_token_id", None)
    batches = []
    for _ in range(count):
        ids, mask = _padded([next(source) for _ in range(rows)], length, padding)
        if model.task == "seq2seq-lm":
            answers = _padded([next(source) for _ in range(rows)], length, padding)
            batches.append(_seq2seq(ids, mask, *answers))
        else:
            batches.append(_batch(model, ids, mask, generator, mask_id))
    return Inputs(batches, origin)


def positions_of(config: Any) -> int | None:
    """The most tokens that a model has positions for; None where it knows no limit."""
    longest = getattr(config, "longest", None) or getattr(config, "max_position_embeddings", None)
    if longest and getattr(getattr(config, "kind", None), "positions_after_padding", False):
        longest -= config.pad_token_id + 1
    return longest


def _text_rows(texts: Sequence[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    rows = [list(tokenizer(text).input_ids)[:length] for text in texts]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError("no text has a token")
    while True:
        yield from rows


def _random_rows(config: Any, length: int, generator: np.random.Generator) -> Iterator[list[int]]:
    """The first row fills its batch, the others are shorter by chance."""
    first = min(max(config.pad_token_id or 0, 2) + 1, config.vocab_size - 1)
    while True:
        for least in (length, *[max(length // 3, 2)] * 3):
            size = int(generator.integers(least, length + 1))
            yield generator.integers(first, config.vocab_size, size).tolist()


def _padding(config: Any, tokenizer: Any) -> int:
    """The model's own padding id, since some models count positions by it."""
    found = getattr(config, "pad_token_id", None)
    found = getattr(tokenizer, "pad_token_id", None) if found is None else found
    return 0 if found is None else found


def _padded(rows: list[list[int]], length: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = np.full((len(rows), length), padding), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids, mask


def _batch(
    model: Any, ids: np.ndarray, mask: np.ndarray, generator: np.random.Generator, mask_id: Any
) -> Batch:
    if model.task == "causal-lm":
        return causal(ids, mask)
    config, inputs = model.config, {"input_ids": ids, "attention_mask": mask}
    kinds = getattr(config, "type_vocab_size", 0)
    if kinds:
        second = np.cumsum(mask, 1) > mask.sum(1, keepdims=True) // 2
        inputs["token_type_ids"] = np.where(mask & second, min(1, kinds - 1), 0)
    if model.task == "masked-lm":
        hidden = mask & (generator.random(mask.shape) < MASKED_SHARE)
        hidden[:, 0] |= ~hidden.any(1)
        other = generator.integers(0, config.vocab_size, ids.shape) if mask_id is None else mask_id
        inputs["input_ids"] = np.where(hidden, other, ids)
        return labelled(inputs, {"labels": np.where(hidden, ids, IGNORED)}, mask)
    if model.task == "token-classification":
        asked = mask & (generator.random(mask.shape) < ASKED_SHARE)
        asked[:, 0] |= ~asked.any(1)
        drawn = generator.integers(0, config.num_labels, mask.shape)
        return labelled(inputs, {"labels": np.where(asked, drawn, IGNORED)}, mask)
    if model.task == "sequence-classification" and hasattr(config, "decoder_start_token_id"):
        last = np.cumsum(mask, 1) == mask.sum(1, keepdims=True)
        inputs["input_ids"] = np.where(mask & last, end_of(config), ids)
    if model.task == "question-answering":
        lengths = mask.sum(1)
        start = generator.integers(0, lengths)
        end = generator.integers(start, lengths)
        return labelled(inputs, {"start_positions": start, "end_positions": end}, mask)
    return labelled(inputs, {"labels": _row_labels(config, len(ids), generator)}, mask, whole=True)


def _row_labels(config: Any, rows: int, generator: np.random.Generator) -> np.ndarray:
    count = config.num_labels
    problem = config.problem_type or ("regression" if count == 1 else "single")
    if problem.startswith("single"):
        return generator.integers(0, count, rows)
    if problem == "regression":
        return generator.normal(size=(rows,) if count == 1 else (rows, count)).astype(np.float32)
    return generator.integers(0, 2, (rows, count)).astype(np.float32)


def causal(ids: np.ndarray, mask: np.ndarray) -> Batch:
    """Rows of tokens [B, T], padded on the right, each token to be predicted from those before."""
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    ours = {"input_ids": ids, "positions": positions, "segment_ids": mask, "loss_mask": mask}
    theirs = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": np.where(mask, ids, IGNORED),
    }
    return Batch(_narrow(ours), _narrow(theirs), mask, mask)


def labelled(inputs: Arrays, labels: Arrays, mask: np.ndarray, *, whole: bool = False) -> Batch:
    """Both sides take the same words; ``whole`` where the answer is one for each row."""
    both = _narrow({**inputs, **labels})
    return Batch(both, both, mask, None if whole else mask)


def _seq2seq(ids: np.ndarray, mask: np.ndarray, answers: np.ndarray, real: np.ndarray) -> Batch:
    labels = {"labels": np.where(real, answers, IGNORED)}
    both = _narrow({"input_ids": ids, "attention_mask": mask, **labels})
    return Batch(both, both, mask, real)


def _narrow(arrays: Arrays) -> Arrays:
    return {
        name: array if array.dtype == np.float32 else array.astype(np.int32)
        for name, array in arrays.items()
    }
