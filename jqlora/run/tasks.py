"""The rows of a run's task, made into batches and what they are scored by."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jqlora.config import RunConfig
from jqlora.data import Batch
from jqlora.errors import ConfigError
from jqlora.run.data import RunData, check_warmup
from jqlora.run.writing import writer
from jqlora.tasks import TASKS, Task
from jqlora.tasks.batches import Collate, evaluation_batches, training_batches
from jqlora.tasks.features import Feature, Report, label_features
from jqlora.tasks.labelled import read_labelled
from jqlora.tasks.scoring import OUTPUTS, check_scorable, label_scores, span_scores
from jqlora.tasks.spans import window_features
from jqlora.tasks.squad import read_questions
from jqlora.tasks.summaries import read_summaries, summary_features
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
        return Collate(rows=rows, limit=self.length, pad=pad, target_limit=self.target_length)

    def measured(self, source: Any, rows: int) -> tuple[Measured, list[str]]:
        """A source in batches of so many rows, with its score; and messages."""
        features, report, broken, scored = self.features(source)
        batches, order = evaluation_batches(features, self.collate(rows))
        return scored(batches, order), [*report.lines(), *_left_out(broken)]


def read_task(config: RunConfig, tokenizer: Any, model: Any) -> RunData:
    """Read and lay out the rows of the config's task for a model with its head.

    Raises SourceError, DataError and ConfigError as the reading of the task does.
    """
    data, train = config.data, config.train
    task = TASKS[data.task or ""]
    check_scorable(task)
    reading = Reading(
        task=task,
        tokenizer=tokenizer,
        length=data.length,
        too_long=data.too_long,
        stride=data.stride,
        labels=data.labels,
        numbering=numbering_of(task, model),
        prefix=data.prefix,
        target_length=data.target_length,
    )
    features, report, broken, _ = reading.features(data.train)
    _check_labels(task, features, model)
    loader = training_batches(
        features,
        reading.collate(train.batch_size),
        seed=train.seed,
        epochs=train.epochs,
        steps=train.steps,
    )
    check_warmup(config, loader)
    messages = [f"training: {line}" for line in (*report.lines(), *_left_out(broken))]
    messages.append(
        f"training: {loader.total_steps} steps of {train.batch_size} rows of at most {data.length} "
        f"tokens; {loader.steps_per_epoch} steps an epoch"
    )
    evaluations = {}
    for name, source in _validation(config).items():
        evaluations[name], said = reading.measured(source, train.batch_size // train.accumulate)
        messages += [f"{name}: {line}" for line in said]
    return RunData(loader, evaluations, messages)


def outputs_of(task: str | None) -> tuple[str, ...]:
    """What is kept of a model's outputs when a task is measured; nothing of text's."""
    return () if task is None else OUTPUTS[TASKS[task].kind]


def numbering_of(task: Task, model: Any) -> tuple[int, ...] | None:
    """The model's numbers of the task's classes, where its config names the same ones in another
    order, as a published MNLI model does; None where it has no names of its own.

    Raises ConfigError where its head has another number of labels.
    """
    count = task.num_labels
    if task.kind != "labels" or count is None:
        return None
    names = [name.lower() for name in model.config.labels]
    if len(names) != count:
        raise ConfigError(f"{task.name} has {count} labels, the model's head {len(names)}")
    if task.labels and sorted(names) == sorted(task.labels):
        return tuple(names.index(name) for name in task.labels)
    return None


def _validation(config: RunConfig) -> dict[str, Any]:
    given = config.data.validation
    if given is None:
        return {}
    if isinstance(given, dict):
        return {f"validation_{name}": source for name, source in given.items()}
    return {"validation": given}


def _check_labels(task: Task, features: Sequence[Feature], model: Any) -> None:
    if task.kind != "labels" or task.number:
        return
    count = model.config.num_labels
    for feature in features:
        if feature.targets["labels"] >= count:
            raise ConfigError(
                f"{feature.origin}: the label {feature.targets['labels']} is beyond the {count} of "
                "model.num_labels"
            )


def _left_out(broken: Sequence[str]) -> list[str]:
    if not broken:
        return []
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return [f"{len(broken)} lines lack columns and are left out: {', '.join(broken[:3])}{more}"]
