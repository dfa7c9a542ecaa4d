"""Rows of different lengths in batches of a few shapes.

A batch is as long as its longest row needs, rounded up to one of a few lengths (16, 32, 64, ... and
the largest that is allowed), so that a compiled step meets a handful of shapes however many rows
there are. Missing rows are copies that have nothing to predict.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jqlora.data import Batch, Loader
from jqlora.data.pipeline import Draw, loader_of
from jqlora.tasks.features import NOTHING, Feature

SHORTEST = 16


def padded_length(needed: int, limit: int, shortest: int = SHORTEST) -> int:
    """The least of 16, 32, 64, ... and ``limit`` that is at least ``needed``."""
    length = shortest
    while length < needed:
        length *= 2
    return min(length, limit)


@dataclasses.dataclass(frozen=True)
class Collate:
    """Stacks up to ``rows`` features; ``pad`` is the id at padding, where the mask is 0. Texts to
    be written have at most ``target_limit`` tokens; without a limit a target that is an array has
    one entry for each token of the input."""

    rows: int
    limit: int
    pad: int
    target_limit: int = 0

    def __call__(self, features: Sequence[Feature]) -> Batch:
        """``input_ids``, ``attention_mask`` and the other inputs int32 [rows, T], and the targets
        [rows], or [rows, T'] of texts to be written."""
        length = padded_length(max(map(len, features)), self.limit)
        missing = self.rows - len(features)
        members = [*features, *[features[0]] * missing]
        batch: dict[str, Any] = {
            "attention_mask": _stacked([np.ones(len(f), np.int32) for f in members], length, 0)
        }
        for name in members[0].inputs:
            pad = self.pad if name == "input_ids" else 0
            batch[name] = _stacked([feature.inputs[name] for feature in members], length, pad)
        for name in members[0].targets:
            given = [feature.targets[name] for feature in members]
            if np.ndim(given[0]):
                limit = self.target_limit
                width = padded_length(max(map(len, given)), limit) if limit else length
                values = _stacked(given, width, NOTHING[name])
            else:
                values = np.asarray(given)
            if missing:
                floating = np.issubdtype(values.dtype, np.floating)
                values[-missing:] = np.nan if floating else NOTHING[name]
            batch[name] = values
        return batch


def training_batches(
    features: Sequence[Feature],
    collate: Collate,
    *,
    seed: int,
    epochs: float | None,
    steps: int | None,
    draw: Draw | None = None,
) -> Loader:
    """A resumable loader in an order of ``seed``; raises as :func:`jqlora.data.make_loader`.

    ``draw`` changes each batch by chance, as ``seed`` and the batch's number have it.
    """
    return loader_of(
        features,
        collate,
        content=(part for feature in features for part in feature.content()),
        order=(*dataclasses.astuple(collate), seed),
        batch_size=collate.rows,
        seed=seed,
        epochs=epochs,
        steps=steps,
        draw=draw,
    )


def evaluation_batches(
    features: Sequence[Feature], collate: Collate
) -> tuple[list[Batch], list[int]]:
    """All features once, those of like length together, and the feature that each row is.

    Rows beyond those, at the end of the last batch, are filling.
    """
    order = sorted(range(len(features)), key=lambda i: len(features[i]))
    chunks = [order[at : at + collate.rows] for at in range(0, len(order), collate.rows)]
    return [collate([features[i] for i in chunk]) for chunk in chunks], order


def in_order(rows: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """What belongs to each feature, of what belongs to each row of the batches."""
    found: list[Any] = [None] * len(order)
    for at, feature in enumerate(order):
        found[feature] = rows[at]
    return found


def _stacked(rows: Sequence[np.ndarray], length: int, pad: int) -> np.ndarray:
    block = np.full((len(rows), length), pad, np.int32)
    for i, row in enumerate(rows):
        block[i, : len(row)] = row
    return block
