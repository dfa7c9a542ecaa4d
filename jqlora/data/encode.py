"""Examples of the records of a data set, under a policy for those that are too long.

The policy is the user's: an error naming the record (the default, because a cut answer teaches a
model to stop in mid-sentence), cutting the end, or windows over plain text. Records left with
nothing to learn are dropped, and the report names them.
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from jqlora.data.records import Record
from jqlora.data.template import AUTO, Template
from jqlora.data.tokenize import Example, TrainOn, tokenize
from jqlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["error", "truncate", "split"]


@dataclasses.dataclass(frozen=True)
class EncodeReport:
    """What became of the records: counts, and the origins of those that changed or were dropped."""

    records: int
    examples: int
    tokens: int
    targets: int
    longest: int
    shortened: tuple[str, ...]
    without_target: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report in sentences, for a log."""
        said = [
            f"{self.records} records, {self.tokens} tokens, {self.targets} of them targets; "
            f"the longest sequence has {self.longest}"
        ]
        for what, origins in (
            ("cut to fit", self.shortened),
            ("left out, having nothing to learn", self.without_target),
        ):
            if origins:
                more = f" and {len(origins) - 3} more" if len(origins) > 3 else ""
                said.append(f"{len(origins)} {what}: {', '.join(origins[:3])}{more}")
        return said


def encode(
    record: Record,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    train_on: TrainOn = "completion",
    template: Template = AUTO,
    too_long: Literal["error", "truncate"] = "error",
) -> Example:
    """The record as token ids with its target mask.

    ``train_on="all"`` makes every token but the first a target. A sequence longer than
    ``max_length`` is an error, or loses its end with ``too_long="truncate"``.

    Raises:
      DataError: too long, or it cannot be rendered (:func:`jqlora.data.template.render`).
    """
    example = tokenize(record, tokenizer, template=template, train_on=train_on)
    return _fit(example, max_length, too_long)[0]


def encode_all(
    records: Iterable[Record],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    train_on: TrainOn = "completion",
    template: Template = AUTO,
    too_long: TooLong = "error",
) -> tuple[list[Example], EncodeReport]:
    """All records encoded, without those that have no target token, and a report of both.

    ``too_long="split"`` cuts a long sequence into windows of ``max_length``, which suits plain
    text. A window's first token is not a target, so windows overlap by one token.

    Raises:
      DataError: as :func:`encode`, or no record has anything to learn.
    """
    examples: list[Example] = []
    shortened, without_target = [], []
    count = 0
    for record in records:
        count += 1
        whole = tokenize(record, tokenizer, template=template, train_on=train_on)
        windows = _fit(whole, max_length, too_long)
        taught = [window for window in windows if window.targets]
        examples += taught
        if windows[0] is not whole:
            shortened.append(record.origin)
        if not taught:
            without_target.append(record.origin)
    if not examples:
        raise DataError(
            f"none of the {count} records has a token to learn; with train_on='completion' each "
            "needs an answer that begins within the maximal length"
        )
    lengths = [len(example) for example in examples]
    return examples, EncodeReport(
        records=count,
        examples=len(examples),
        tokens=sum(lengths),
        targets=sum(example.targets for example in examples),
        longest=max(lengths),
        shortened=tuple(shortened),
        without_target=tuple(without_target),
    )


def _fit(example: Example, max_length: int | None, too_long: TooLong) -> list[Example]:
    """The example itself where it is short enough, else what the policy makes of it."""
    size = len(example)
    if max_length is None or size <= max_length:
        return [example]
    if max_length < 2:
        raise DataError(f"a maximal length of {max_length} leaves no token to predict; give more")
    if too_long == "error":
        raise DataError(
            f"{example.origin}: the record has {size} tokens, more than the {max_length} allowed; "
            "raise data.length (if the model has that many positions), or set data.too_long to "
            "'truncate' or, for plain text, 'split'"
        )
    last = size - 1 if too_long == "split" else 1
    return [_window(example, start, max_length) for start in range(0, last, max_length - 1)]


def _window(example: Example, start: int, length: int) -> Example:
    mask = example.loss_mask[start : start + length].copy()
    mask[:1] = False
    return Example(example.input_ids[start : start + length], mask, example.origin)
