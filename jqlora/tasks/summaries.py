"""Texts that are written to a text, such as summaries, and ROUGE (Lin 2004) by ``rouge-score``."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jqlora.data.sources import Sources, read_rows
from jqlora.errors import DataError
from jqlora.tasks.features import Feature, Report, inputs_of
from jqlora.tasks.metrics import library
from jqlora.tasks.table import Task


@dataclasses.dataclass(frozen=True)
class Summary:
    """A text and what is to be written to it."""

    document: str
    summary: str
    origin: str


def read_summaries(task: Task, source: Sources) -> list[Summary]:
    """All records of a source. Raises SourceError and DataError as
    :func:`jqlora.data.read_records` does."""
    found = []
    for origin, row in read_rows(source):
        known = set(row) if isinstance(row, Mapping) else set()
        columns = next((pair for pair in task.texts if set(pair) <= known), None)
        if columns is None:
            accepted = " or ".join(", ".join(pair) for pair in task.texts)
            raise DataError(f"{origin}: {task.name} is read from the columns {accepted}")
        document, summary = (row[name] for name in columns)
        if not all(isinstance(text, str) and text.strip() for text in (document, summary)):
            raise DataError(f"{origin}: {' and '.join(columns)} must be text, and not empty")
        found.append(Summary(document, summary, origin))
    return found


def summary_features(
    records: Sequence[Summary],
    tokenizer: Any,
    *,
    prefix: str,
    max_length: int,
    target_length: int,
    truncate: bool,
) -> tuple[list[Feature], Report]:
    """Rows of an encoder-decoder: ``prefix`` and the text, and the tokens to be written as
    ``labels``, ended as the tokenizer ends them.

    A row longer than ``max_length``, or ``target_length`` on the other side, is an error, or with
    ``truncate`` loses its end.
    """
    inputs = tokenizer([prefix + record.document for record in records], verbose=False)
    targets = tokenizer(text_target=[record.summary for record in records], verbose=False)
    limits = ((inputs, max_length, "data.length"), (targets, target_length, "data.target_length"))
    over: dict[int, None] = {}
    for encoded, limit, setting in limits:
        for i, ids in enumerate(encoded["input_ids"]):
            if len(ids) > limit and not truncate:
                raise DataError(
                    f"{records[i].origin}: {len(ids)} tokens, more than the {limit} allowed; raise "
                    f"{setting}, or set data.too_long to 'truncate'"
                )
            if len(ids) > limit:
                over[i] = None
    if over:
        cut = {"truncation": True}
        texts = [prefix + record.document for record in records]
        inputs = tokenizer(texts, max_length=max_length, **cut)
        texts = [record.summary for record in records]
        targets = tokenizer(text_target=texts, max_length=target_length, **cut)
    features = [
        Feature(
            {"input_ids": inputs_of(inputs, i)["input_ids"]},
            {"labels": np.asarray(targets["input_ids"][i], np.int32)},
            record.origin,
        )
        for i, record in enumerate(records)
    ]
    longest = max(map(len, features))
    shortened = tuple(records[i].origin for i in sorted(over))
    return features, Report(len(records), len(features), longest, shortened)


def rouge(task: Task, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """The means of the F-measures in per cent, words reduced to their stems.

    For ``rougeLsum`` each line is a sentence; a text of one line is cut behind ``.``, ``!`` and
    ``?`` that white space follows.
    """
    module = library("rouge_score.rouge_scorer")
    scorer = module.RougeScorer(list(task.metrics), use_stemmer=True)
    rows = [
        scorer.score(_in_sentences(right), _in_sentences(found))
        for right, found in zip(wanted, written, strict=True)
    ]
    return {
        name: 100 * float(np.mean([row[name].fmeasure for row in rows])) for name in task.metrics
    }


def _in_sentences(text: str) -> str:
    text = text.strip()
    return text if "\n" in text else re.sub(r"(?<=[.!?])\s+", "\n", text)
