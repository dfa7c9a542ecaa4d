"""Multiple choice as MMLU has it (Hendrycks et al. 2021): read, and asked of a language model.

Read from the published CSV files (question, four choices and the letter, without a header, a file
for each subject) or from rows with the hub's columns (``question``, ``choices``, ``answer``,
``subject``). Asked in the words of EleutherAI's evaluation harness: *letters* lists the choices and
scores their letters, as the paper does; *answers* only asks and scores the choices themselves,
where dividing by their length is of consequence.
"""

import collections
import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jqlora.data.sources import Row, Sources, read_rows, text_of
from jqlora.errors import DataError

Form = Literal["letters", "answers"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ABOUT = {
    "letters": "The following are multiple choice questions (with answers) about {}.\n\n",
    "answers": "The following are questions (with answers) about {}.\n\n",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question with its choices, and the number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    origin: str


def read_choices(source: Sources) -> list[Choice]:
    """All questions of a source. Raises SourceError and DataError as
    :func:`jqlora.data.read_records` does."""
    return [_choice(origin, row) for origin, row in read_rows(source, {".csv": read_csv})]


def read_csv(path: Path) -> Iterator[Row]:
    """Rows of a headless file in the hub's columns; the subject is the file's name."""
    subject = re.sub(r"_(dev|val|test|train)$", "", path.stem)
    reader = csv.reader(io.StringIO(text_of(path)), strict=True)
    try:
        for cells in reader:
            origin = f"{path}:{reader.line_num}"
            if len(cells) < 4:
                raise DataError(f"{origin}: expected a question, its choices and a letter")
            question, *choices, answer = cells
            yield (
                origin,
                {
                    "question": question,
                    "choices": choices,
                    "answer": answer.strip(),
                    "subject": subject,
                },
            )
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}") from error


def prompt(asked: Choice, shots: Sequence[Choice], form: Form) -> str:
    """What is put before the choices: the subject, answered questions, and this one's."""
    subject = asked.subject.replace("_", " ")
    about = _ABOUT[form].format(subject) if subject else ""
    told = (f"{_ask(shot, form)} {options(shot, form)[shot.answer]}\n\n" for shot in shots)
    return about + "".join(told) + _ask(asked, form)


def options(asked: Choice, form: Form) -> tuple[str, ...]:
    """What is scored after the prompt and a space."""
    return tuple(LETTERS[: len(asked.choices)]) if form == "letters" else asked.choices


def shots_by_subject(shots: Sequence[Choice], count: int) -> dict[str, list[Choice]]:
    """The first ``count`` of each subject."""
    found: dict[str, list[Choice]] = collections.defaultdict(list)
    for shot in shots:
        if len(found[shot.subject]) < count:
            found[shot.subject].append(shot)
    return found


def choice_scores(
    asked: Sequence[Choice], likelihoods: Sequence[np.ndarray], form: Form
) -> dict[str, float]:
    """The share of questions whose right choice is the likeliest: by the sum of its tokens'
    log-likelihoods (``accuracy``), and by that divided by its length in characters
    (``accuracy_per_character``, the harness's acc_norm) or in bytes."""
    rows = zip(asked, likelihoods, strict=True)
    right = [_right(one, np.asarray(scores, np.float64), form) for one, scores in rows]
    names = ("accuracy", "accuracy_per_character", "accuracy_per_byte")
    means = np.mean(right, axis=0)
    return {name: float(value) for name, value in zip(names, means, strict=True)}


def _right(asked: Choice, scores: np.ndarray, form: Form) -> tuple[bool, bool, bool]:
    texts = options(asked, form)
    characters = np.asarray([len(text) for text in texts])
    octets = np.asarray([len(text.encode()) for text in texts])
    divided = (scores, scores / characters, scores / octets)
    first, second, third = (int(np.argmax(by)) == asked.answer for by in divided)
    return first, second, third


def _ask(asked: Choice, form: Form) -> str:
    question = asked.question.strip()
    if form == "answers":
        return f"Question: {question}\nAnswer:"
    lines = (f"{letter}. {text}" for letter, text in zip(LETTERS, asked.choices, strict=False))
    return "\n".join([question, *lines, "Answer:"])


def _choice(origin: str, row: Any) -> Choice:
    needed = ("question", "choices", "answer")
    if not isinstance(row, Mapping) or not set(needed) <= set(row):
        raise DataError(f"{origin}: a choice is read from the columns {', '.join(needed)}")
    choices = tuple(map(str, row["choices"]))
    answer, count = row["answer"], len(row["choices"])
    letters = LETTERS[:count]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        number = letters.index(answer)
    else:
        number = int(answer) if str(answer).isdigit() else -1
    if not 0 <= number < count or not all(choices):
        raise DataError(
            f"{origin}: answer={answer!r} is none of the {count} choices, which are numbered from "
            "0 or have letters, and none of which is empty"
        )
    return Choice(str(row["question"]), choices, number, str(row.get("subject") or ""), origin)
