"""Rows that an encoder is given: token ids of a text or of two, with what is to be predicted."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jqlora.errors import DataError
from jqlora.tasks.labelled import Labelled

NOTHING = {"labels": -100, "start_positions": 2**30, "end_positions": 2**30}
"""Targets that the losses do not count; a float label that is NaN is none either."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """``inputs`` are int32 arrays [n] by their names (``input_ids``, maybe ``token_type_ids``) and
    ``targets`` numbers by theirs, or int32 [m] of a text to be written."""

    inputs: dict[str, np.ndarray]
    targets: dict[str, Any]
    origin: str

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    def content(self) -> Iterator[bytes]:
        """All that a resumed run must find the same."""
        for array in self.inputs.values():
            yield len(array).to_bytes(8, "little")
            yield array.tobytes()
        for target in self.targets.values():
            yield np.asarray(target).tobytes()


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the records, for a log."""

    records: int
    features: int
    longest: int
    shortened: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report in sentences."""
        rows = f"{self.records} records"
        if self.features != self.records:
            rows += f" in {self.features} rows"
        said = [f"{rows}; the longest has {self.longest} tokens"]
        if self.shortened:
            more = f" and {len(self.shortened) - 3} more" if len(self.shortened) > 3 else ""
            names = ", ".join(self.shortened[:3])
            said.append(f"{len(self.shortened)} cut to fit: {names}{more}")
        return said


def label_features(
    records: Sequence[Labelled],
    tokenizer: Any,
    *,
    max_length: int,
    truncate: bool,
    numbering: Sequence[int] | None = None,
) -> tuple[list[Feature], Report]:
    """One row for each record, as transformers' tokenizers make it of one text or a pair.

    A row longer than ``max_length`` is an error, or with ``truncate`` loses the end of its longer
    text. ``numbering`` gives the model's number of each class; without it labels are kept.
    """
    columns = [list(column) for column in zip(*(r.texts for r in records), strict=True)]
    whole = tokenizer(*columns, verbose=False)
    lengths = [len(ids) for ids in whole["input_ids"]]
    over = [i for i, length in enumerate(lengths) if length > max_length]
    if over and not truncate:
        raise DataError(
            f"{records[over[0]].origin}: the record has {lengths[over[0]]} tokens, more than the "
            f"{max_length} allowed ({len(over)} records have); raise data.length, if the model has "
            "that many positions, or set data.too_long to 'truncate'"
        )
    encoded = whole
    if over:
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    features = []
    for i, record in enumerate(records):
        label = record.label if numbering is None else numbering[int(record.label)]
        kind = np.int32 if isinstance(label, int) else np.float32
        features.append(
            Feature(inputs_of(encoded, i), {"labels": np.asarray(label, kind)}, record.origin)
        )
    report = Report(
        records=len(records),
        features=len(features),
        longest=max(map(len, features)),
        shortened=tuple(records[i].origin for i in over),
    )
    return features, report


def inputs_of(encoded: Any, row: int) -> dict[str, np.ndarray]:
    """One row of what a tokenizer returned, without the mask, which padding makes anew."""
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return {name: np.asarray(encoded[name][row], np.int32) for name in names}
