"""From what a model returned for each row to the scores of its task."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jqlora.tasks.batches import in_order
from jqlora.tasks.entities import entity_scores, is_of_entity
from jqlora.tasks.features import Feature
from jqlora.tasks.labelled import Labelled
from jqlora.tasks.metrics import METRICS, library
from jqlora.tasks.spans import Window, best_spans
from jqlora.tasks.squad import Question, squad_scores
from jqlora.tasks.table import Task

Outputs = Sequence[Mapping[str, np.ndarray]]
Score = Callable[[Outputs], dict[str, float]]
"""Scores by name, of a model's outputs for each row of the evaluation batches."""

OUTPUTS = {
    "labels": ("logits",),
    "tags": ("logits",),
    "masked": (),
    "spans": ("start_logits", "end_logits"),
    "choices": (),
    "texts": (),
}
"""What is kept of a model's outputs for each kind of task."""


def check_scorable(task: Task) -> None:
    """Raise ConfigError now rather than after training where a library is missing."""
    if task.kind == "texts":
        library("rouge_score.rouge_scorer")
    if task.kind == "labels":
        library("scipy.stats" if task.number else "sklearn.metrics")


def label_scores(
    task: Task,
    records: Sequence[Labelled],
    order: Sequence[int],
    numbering: Sequence[int] | None = None,
) -> Score:
    """The task's metrics; ``numbering`` are the model's numbers of the classes in their order."""
    true = np.asarray([record.label for record in records])

    def score(outputs: Outputs) -> dict[str, float]:
        logits = np.stack([row["logits"] for row in in_order(outputs, order)]).astype(np.float64)
        if numbering is not None:
            logits = logits[:, list(numbering)]
        predicted = logits[:, 0] if task.number else logits.argmax(-1)
        return {name: METRICS[name](true, predicted) for name in task.metrics}

    return score


def tag_scores(
    task: Task, names: Sequence[str], features: Sequence[Feature], order: Sequence[int]
) -> Score:
    """Precision, recall and F1 of entities and accuracy of tags; of tags that name no entities,
    such as parts of speech, the accuracy alone. ``names`` are of the model's numbers."""

    def score(outputs: Outputs) -> dict[str, float]:
        true, predicted = [], []
        for feature, row in zip(features, in_order(outputs, order), strict=True):
            labels = feature.targets["labels"]
            found = row["logits"][: len(labels)].argmax(-1)
            true.append([names[tag] for tag in labels[labels >= 0]])
            predicted.append([names[tag] for tag in found[labels >= 0]])
        scores = entity_scores(true, predicted) if all(map(is_of_entity, names)) else {}
        right = np.concatenate(true) == np.concatenate(predicted)
        scores |= {"accuracy": float(np.mean(right))}
        return {name: scores[name] for name in task.metrics if name in scores}

    return score


def span_scores(
    task: Task, questions: Sequence[Question], windows: Sequence[Window], order: Sequence[int]
) -> Score:
    """Exact match and F1 of the best spans, in per cent."""

    def score(outputs: Outputs) -> dict[str, float]:
        found = best_spans(
            questions,
            windows,
            in_order(outputs, order),
            unanswerable=task.name == "squad_v2",
        )
        return squad_scores(questions, found)

    return score
