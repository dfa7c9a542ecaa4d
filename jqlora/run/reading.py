"""How a task's rows become features of a model, batches, and what they are scored by."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jqlora.data import Batch
from jqlora.errors import ConfigError
from jqlora.run.writing import writer
from jqlora.tasks import Task
from jqlora.tasks.batches import Collate, evaluation_batches
from jqlora.tasks.features import Feature, Report, label_features
from jqlora.tasks.labelled import read_labelled
from jqlora.tasks.masking import Masking, text_features
from jqlora.tasks.scoring import label_scores, span_scores, tag_scores
from jqlora.tasks.spans import window_features
from jqlora.tasks.squad import read_questions
from jqlora.tasks.summaries import read_summaries, summary_features
from jqlora.tasks.words import read_tagged, tag_features
from jqlora.train.evaluate import Measured

Scored = Callable[[list[Batch], list[int]], Measured]
"""What is measured on batches whose rows are the features in an order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How a task's rows become features of a model."""

    task: Task
    tokenizer: Any
    length: int
    too_long: str = "error"
    stride: int = 128
    labels: Sequence[str] = ()
    numbering: Sequence[int] | None = None
    prefix: str = ""
    target_length: int = 0

    def features(self, source: Any) -> tuple[Sequence[Feature], Report, list[str], Scored]:
        """The features of a source, a report, what was left out, and what scores them."""
        task, tokenizer = self.task, self.tokenizer
        if task.kind == "texts":
            return self._summaries(source)
        if task.kind == "tags":
            return self._tags(source)
        if task.kind == "masked":
            limits = {"max_length": self.length, "too_long": self.too_long}
            return *text_features(task, source, tokenizer, **limits), [], _unscored
        if task.kind == "spans":
            questions = read_questions(task, source)
            split = self.too_long == "split"
            windows, report = window_features(
                questions, tokenizer, max_length=self.length, stride=self.stride, split=split
            )

            def scored(batches: list[Batch], order: list[int]) -> Measured:
                return Measured(batches, span_scores(task, questions, windows, order))

            return windows, report, [], scored
        records, broken = read_labelled(task, source, self.labels)
        features, report = label_features(
            records,
            tokenizer,
            max_length=self.length,
            truncate=self.too_long == "truncate",
            numbering=self.numbering,
        )

        def labelled(batches: list[Batch], order: list[int]) -> Measured:
            return Measured(batches, label_scores(task, records, order, self.numbering))

        return features, report, broken, labelled

    def _tags(self, source: Any) -> tuple[Sequence[Feature], Report, list[str], Scored]:
        task, records = self.task, read_tagged(self.task, source, self.labels)
        features, report = tag_features(
            records,
            self.tokenizer,
            max_length=self.length,
            truncate=self.too_long == "truncate",
            numbering=self.numbering,
        )
        names = list(task.labels or self.labels)
        if self.numbering is not None:
            names = [names[self.numbering.index(i)] for i in range(len(names))]

        def tagged(batches: list[Batch], order: list[int]) -> Measured:
            return Measured(batches, tag_scores(task, names, features, order))

        return features, report, [], tagged

    def draw(self) -> Masking | None:
        """What changes the training batches by chance."""
        return Masking.of(self.tokenizer) if self.task.kind == "masked" else None

    def _summaries(self, source: Any) -> tuple[Sequence[Feature], Report, list[str], Scored]:
        records = read_summaries(self.task, source)
        features, report = summary_features(
            records,
            self.tokenizer,
            prefix=self.prefix,
            max_length=self.length,
            target_length=self.target_length,
            truncate=self.too_long == "truncate",
        )

        def written(batches: list[Batch], order: list[int]) -> Measured:
            write = writer(
                self.task,
                records,
                batches,
                order,
                tokenizer=self.tokenizer,
                max_new_tokens=self.target_length,
            )
            return Measured(batches, write=write)

        return features, report, [], written

    def collate(self, rows: int) -> Collate:
        """What stacks so many of the features."""
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise ConfigError("the tokenizer has no padding token, which batches of a task need")
        written = self.target_length if self.task.kind == "texts" else 0
        return Collate(rows=rows, limit=self.length, pad=pad, target_limit=written)

    def measured(self, source: Any, rows: int) -> tuple[Measured, list[str]]:
        """A source in batches of so many rows, with its score; and messages."""
        features, report, broken, scored = self.features(source)
        draw = self.draw()
        if draw is not None:
            features = draw.once(features)
        batches, order = evaluation_batches(features, self.collate(rows))
        return scored(batches, order), [*report.lines(), *left_out(broken)]


def _unscored(batches: list[Batch], order: list[int]) -> Measured:
    """The loss alone, and its perplexity."""
    return Measured(batches)


def left_out(broken: Sequence[str]) -> list[str]:
    if not broken:
        return []
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return [f"{len(broken)} lines lack columns and are left out: {', '.join(broken[:3])}{more}"]
