"""Long texts in overlapping windows, and the best span of all of a question's windows.

As BERT does it for SQuAD (Devlin et al. 2019): each window is question and a part of the context,
``stride`` tokens of which it shares with the next. The target of a window that has not the whole
answer is its first token, which also stands for "no answer". Decoding joins the best starts and
ends of a window, and takes the best pair of all windows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jqlora.errors import DataError
from jqlora.tasks.features import Feature, Report, inputs_of
from jqlora.tasks.squad import Question


@dataclasses.dataclass(frozen=True)
class Window(Feature):
    """``offsets`` int [n, 2]: each token's characters in the context, -1 at tokens outside of it.
    ``question`` counts the questions."""

    offsets: np.ndarray
    question: int


def window_features(
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    max_length: int,
    stride: int,
    split: bool = True,
) -> tuple[list[Window], Report]:
    """Windows of at most ``max_length`` tokens, with the ends of the first answer as targets.

    Without ``split`` a question that needs several is an error. Raises DataError also where the
    question leaves no room for ``stride`` and a token more, or the tokenizer tells no offsets.
    """
    if not tokenizer.is_fast:
        raise DataError("question answering needs a tokenizer that tells offsets (tokenizer.json)")
    windows: list[Window] = []
    for number, asked in enumerate(questions):
        made = _windows(asked, number, tokenizer, max_length, stride)
        if len(made) > 1 and not split:
            raise DataError(
                f"{asked.origin}: question and context have more than the {max_length} tokens "
                "allowed; raise data.length, or set data.too_long to 'split'"
            )
        windows += made
    return windows, Report(len(questions), len(windows), max(map(len, windows)))


def best_spans(
    questions: Sequence[Question],
    windows: Sequence[Window],
    logits: Sequence[Mapping[str, np.ndarray]],
    *,
    unanswerable: bool,
    longest: int = 30,
    beam: int = 20,
) -> dict[str, str]:
    """The answer to each question by its ident, empty where none is the likeliest answer.

    ``logits`` hold each window's ``start_logits`` and ``end_logits`` [T]. Spans have at most
    ``longest`` tokens, and ends among the best ``beam`` of their window. "No answer" is considered
    only if ``unanswerable``; its score is that of the window in which it is least likely.
    """
    best: list[tuple[float, str]] = [(-np.inf, "") for _ in questions]
    none = [np.inf] * len(questions)
    for window, scores in zip(windows, logits, strict=True):
        start, end = (np.asarray(scores[f"{w}_logits"], np.float64) for w in ("start", "end"))
        asked = window.question
        none[asked] = min(none[asked], start[0] + end[0])
        found = _best_span(window, start[: len(window)], end[: len(window)], longest, beam)
        if found is not None and found[0] > best[asked][0]:
            text = questions[asked].context[found[1] : found[2]]
            best[asked] = (found[0], text)
    return {
        question.ident: "" if unanswerable and none[i] > best[i][0] else best[i][1]
        for i, question in enumerate(questions)
    }


def _best_span(
    window: Window, start: np.ndarray, end: np.ndarray, longest: int, beam: int
) -> tuple[float, int, int] | None:
    """Score, first character and end of the best span inside the context, if there is one."""
    inside = window.offsets[:, 0] >= 0
    firsts, lasts = (np.argsort(-scores, kind="stable")[:beam] for scores in (start, end))
    allowed = (
        inside[firsts][:, None]
        & inside[lasts][None, :]
        & (lasts[None, :] >= firsts[:, None])
        & (lasts[None, :] - firsts[:, None] < longest)
    )
    if not allowed.any():
        return None
    scores = np.where(allowed, start[firsts][:, None] + end[lasts][None, :], -np.inf)
    i, j = np.unravel_index(np.argmax(scores), scores.shape)
    first, last = window.offsets[firsts[i], 0], window.offsets[lasts[j], 1]
    return float(scores[i, j]), int(first), int(last)


def _windows(
    asked: Question, number: int, tokenizer: Any, max_length: int, stride: int
) -> list[Window]:
    question = asked.question.lstrip()  # a run of spaces would leave no room for the context
    room = max_length - len(tokenizer(question, "")["input_ids"])
    if room <= stride:
        raise DataError(
            f"{asked.origin}: the question leaves room for {max(room, 0)} of {max_length} tokens, "
            f"too few for windows that share {stride}: raise data.length or lower data.stride"
        )
    encoded = tokenizer(
        question,
        asked.context,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for row in range(len(encoded["input_ids"])):
        context = np.asarray([part == 1 for part in encoded.sequence_ids(row)])
        offsets = np.where(context[:, None], np.asarray(encoded["offset_mapping"][row]), -1)
        first, last = _target(asked, offsets)
        windows.append(
            Window(
                inputs_of(encoded, row),
                {"start_positions": np.int32(first), "end_positions": np.int32(last)},
                asked.origin,
                offsets,
                number,
            )
        )
    return windows


def _target(asked: Question, offsets: np.ndarray) -> tuple[int, int]:
    """The tokens with the answer's first and last character; the first token, twice, where the
    window has not both."""
    if not asked.answers:
        return 0, 0
    text, begin = asked.answers[0]
    end = begin + len(text)
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside) or offsets[inside[0], 0] > begin or offsets[inside[-1], 1] < end:
        return 0, 0
    first = inside[offsets[inside, 0] <= begin][-1]
    last = inside[offsets[inside, 1] >= end][0]
    return int(first), int(last)
