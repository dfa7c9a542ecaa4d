"""Questions whose answer is a span of a text: SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018).

Read from the published JSON (``data`` of ``paragraphs`` of ``qas``) or from rows with the hub's
columns (``question``, ``context``, ``answers: {text, answer_start}``, ``id``). Scores are those of
the published evaluation script of 2.0, which for 1.1 gives what its own gives.
"""

import collections
import dataclasses
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jqlora.data.sources import READERS, Row, Sources, read_rows, text_of
from jqlora.errors import DataError
from jqlora.tasks.table import Task


@dataclasses.dataclass(frozen=True)
class Question:
    """``answers`` are texts with where they begin in the context, in characters; none where the
    context does not tell."""

    ident: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    origin: str


def read_questions(task: Task, source: Sources) -> list[Question]:
    """All questions of a source. Raises SourceError and DataError as
    :func:`jqlora.data.read_records` does, and DataError where SQuAD 1.1 lacks an answer."""
    found = [_question(origin, row) for origin, row in read_rows(source, {".json": read_json})]
    for question in found:
        if task.name == "squad" and not question.answers:
            raise DataError(f"{question.origin}: no answer, which only squad_v2 has")
        for text, start in question.answers:
            if question.context[start : start + len(text)] != text:
                raise DataError(
                    f"{question.origin}: the answer {text!r} does not stand at character {start}"
                )
    return found


def read_json(path: Path) -> Iterator[Row]:
    """A row of the hub's columns for each question of a SQuAD file; other JSON as it is."""
    try:
        tree = json.loads(text_of(path))
    except json.JSONDecodeError:
        tree = None  # perhaps an object a line
    if not isinstance(tree, dict) or "data" not in tree:
        yield from READERS[".json"](path)
        return
    for article in tree["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = asked.get("answers") or []
                if asked.get("is_impossible"):
                    answers = []
                yield (
                    f"{path}: {asked['id']}",
                    {
                        "id": asked["id"],
                        "question": asked["question"],
                        "context": paragraph["context"],
                        "answers": {
                            "text": [a["text"] for a in answers],
                            "answer_start": [a["answer_start"] for a in answers],
                        },
                    },
                )


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers, articles and punctuation aside; else 0."""
    return float(max(_normal(prediction) == _normal(answer) for answer in answers or ("",)))


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of the words that the prediction and an answer have in common."""
    return max(_f1(_normal(prediction).split(), _normal(a).split()) for a in answers or ("",))


def squad_scores(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
    """``exact_match`` and ``f1`` in per cent; where some questions have no answer, also of those
    that have one (``answerable_...``) and of those that have none (``unanswerable_...``)."""
    rows = [
        (
            bool(q.answers),
            exact_match(predictions[q.ident], [text for text, _ in q.answers]),
            word_f1(predictions[q.ident], [text for text, _ in q.answers]),
        )
        for q in questions
    ]
    scores = _means(rows, "")
    kinds = {True: "answerable_", False: "unanswerable_"}
    if any(not answered for answered, *_ in rows):
        for kind, prefix in kinds.items():
            scores |= _means([row for row in rows if row[0] is kind], prefix)
    return scores


def _means(rows: Sequence[tuple[bool, float, float]], prefix: str) -> dict[str, float]:
    if not rows:
        return {}
    names = ("exact_match", "f1")
    return {
        prefix + name: 100 * sum(row[1 + i] for row in rows) / len(rows)
        for i, name in enumerate(names)
    }


def _f1(predicted: list[str], true: list[str]) -> float:
    if not predicted or not true:
        return float(predicted == true)
    common = (collections.Counter(predicted) & collections.Counter(true)).total()
    return 2 * common / (len(predicted) + len(true))


def _normal(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _question(origin: str, row: Any) -> Question:
    needed = ("id", "question", "context", "answers")
    if not isinstance(row, Mapping) or not set(needed) <= set(row):
        raise DataError(f"{origin}: a question is read from the columns {', '.join(needed)}")
    answers = row["answers"]
    pairs = zip(answers["text"], answers["answer_start"], strict=True)
    return Question(str(row["id"]), row["question"], row["context"], tuple(pairs), origin)
