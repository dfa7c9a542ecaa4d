"""Windows, spans and scores of SQuAD against their published definitions."""

import itertools
import json

import numpy as np
import pytest

from jqlora.errors import DataError
from jqlora.tasks import TASKS
from jqlora.tasks.batches import Collate, evaluation_batches, in_order
from jqlora.tasks.scoring import span_scores
from jqlora.tasks.spans import best_spans, window_features
from jqlora.tasks.squad import Question, exact_match, read_questions, squad_scores, word_f1
from tests.toy_encoder import wordpiece_tokenizer, write_squad

CONTEXT = "  we saw a film and it was good. the actor was bad, " * 4 + "and the plot was cold."
LONG = Question("q", "  the plot?", CONTEXT, (("cold", CONTEXT.index("cold")),), "file: q")


def windows(questions, length=32, stride=8):
    return window_features(questions, wordpiece_tokenizer(), max_length=length, stride=stride)


def test_the_published_files_and_the_hubs_rows_are_the_same_questions(tmp_path):
    task = TASKS["squad_v2"]
    questions = read_questions(task, write_squad(tmp_path / "dev-v2.0.json", 2))
    assert [q.ident for q in questions] == ["q0", "n0", "q1", "n1"]
    assert [bool(q.answers) for q in questions] == [True, False, True, False]
    rows = [
        {
            "id": q.ident,
            "title": "films",
            "question": q.question,
            "context": q.context,
            "answers": {
                "text": [text for text, _ in q.answers],
                "answer_start": [start for _, start in q.answers],
            },
        }
        for q in questions
    ]
    (tmp_path / "hub.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = read_questions(task, tmp_path / "hub.jsonl")
    assert [vars(q) | {"origin": ""} for q in again] == [
        vars(q) | {"origin": ""} for q in questions
    ]
    with pytest.raises(DataError, match="only squad_v2 has"):
        read_questions(TASKS["squad"], tmp_path / "hub.jsonl")
    rows[0]["answers"]["answer_start"] = [3]
    (tmp_path / "hub.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="does not stand at character 3"):
        read_questions(task, tmp_path / "hub.jsonl")


def test_windows_cover_the_context_and_share_the_stride():
    found, report = windows([LONG])
    assert report.features == len(found) > 2
    assert report.longest == 32
    spans = [w.offsets[w.offsets[:, 0] >= 0] for w in found]
    covered = {tuple(offset) for span in spans for offset in span.tolist()}
    whole = wordpiece_tokenizer()(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)
    assert covered == set(whole["offset_mapping"])
    for before, after in itertools.pairwise(spans):
        np.testing.assert_array_equal(before[-8:], after[:8])


def test_a_window_with_the_whole_answer_has_its_ends_and_others_the_first_token():
    found, _ = windows([LONG])
    text, begin = LONG.answers[0]
    for window in found:
        inside = window.offsets[window.offsets[:, 0] >= 0]
        whole = inside[0, 0] <= begin and begin + len(text) <= inside[-1, 1]
        first, last = window.targets["start_positions"], window.targets["end_positions"]
        if whole:
            assert CONTEXT[window.offsets[first, 0] : window.offsets[last, 1]] == text
        assert (first > 0) == (last > 0) == whole
    assert sum(window.targets["start_positions"] > 0 for window in found) >= 1


def right_logits(window):
    scores = np.zeros((2, len(window)), np.float32)
    scores[0, window.targets["start_positions"]] = 5
    scores[1, window.targets["end_positions"]] = 5
    return {"start_logits": scores[0], "end_logits": scores[1]}


def test_right_logits_give_every_answer_back_through_the_batches(tmp_path):
    questions = read_questions(TASKS["squad_v2"], write_squad(tmp_path / "dev.json", 5))
    questions.append(LONG)
    found, _ = windows(questions)
    batches, order = evaluation_batches(found, Collate(rows=4, limit=32, pad=0))
    rows = [right_logits(found[i]) for i in order]
    scores = span_scores(TASKS["squad_v2"], questions, found, order)(rows)
    assert set(scores.values()) == {100.0}
    assert len(scores) == 6
    assert len(batches) == -(-len(found) // 4)
    answers = best_spans(questions, found, in_order(rows, order), unanswerable=True)
    assert answers == {q.ident: q.answers[0][0] if q.answers else "" for q in questions}


def test_the_best_span_is_that_of_an_exhaustive_search():
    questions = [LONG]
    found, _ = windows(questions)
    generator = np.random.default_rng(0)
    for _ in range(10):
        logits = [
            {f"{end}_logits": generator.normal(size=len(w)) for end in ("start", "end")}
            for w in found
        ]
        best = max(
            (rows["start_logits"][i] + rows["end_logits"][j], w.offsets[i, 0], w.offsets[j, 1])
            for w, rows in zip(found, logits, strict=True)
            for i in np.flatnonzero(w.offsets[:, 0] >= 0)
            for j in range(i, min(i + 5, len(w)))
            if w.offsets[j, 0] >= 0
        )
        answer = best_spans(questions, found, logits, unanswerable=False, longest=5, beam=40)
        assert answer == {"q": CONTEXT[best[1] : best[2]]}


# What the published script gives: articles, case, punctuation and spaces do not count
SCORES = [
    ("The Cat!", ["cat"], 1, 1),
    ("a  black cat", ["black", "the cat"], 0, 2 / 3),
    ("dog", ["cat"], 0, 0),
    ("", [], 1, 1),
    ("cat", [], 0, 0),
    ("the", ["a"], 1, 1),
]


@pytest.mark.parametrize(("prediction", "answers", "exact", "f1"), SCORES)
def test_scores_are_those_of_the_published_script(prediction, answers, exact, f1):
    assert exact_match(prediction, answers) == exact
    assert word_f1(prediction, answers) == pytest.approx(f1)


def test_questions_with_and_without_an_answer_are_told_apart():
    questions = [
        Question("a", "", "cat", (("cat", 0),), ""),
        Question("b", "", "cat", (), ""),
        Question("c", "", "cat", (), ""),
    ]
    scores = squad_scores(questions, {"a": "cat", "b": "", "c": "cat"})
    assert scores["exact_match"] == pytest.approx(200 / 3)
    assert (scores["answerable_f1"], scores["unanswerable_f1"]) == (100, 50)


def test_what_leaves_no_room_is_named():
    with pytest.raises(DataError, match="file: q: the question leaves room for"):
        windows([LONG], length=16, stride=15)
    with pytest.raises(DataError, match="more than the 32 tokens"):
        window_features([LONG], wordpiece_tokenizer(), max_length=32, stride=8, split=False)
