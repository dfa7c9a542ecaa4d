"""The data set of the demo: what it teaches, and that its measurements are fair."""

from collections import Counter
from pathlib import Path

import pytest

from jqlora.data import answer, encode_all, question, read_records, says, shared_questions
from jqlora.data.questions import normalize

DEMO = Path(__file__).parents[2] / "configs" / "data" / "demo"
TRAIN, HELD_OUT, GENERAL = (
    read_records(DEMO / f"{name}.jsonl") for name in ("train", "heldout", "general")
)


def words(record):
    return set(normalize(question(record)).split())


def test_the_three_files_have_their_sizes():
    assert len(TRAIN) >= 200
    assert len(HELD_OUT) >= 40
    assert len(GENERAL) >= 40


@pytest.mark.parametrize("measured", [HELD_OUT, GENERAL], ids=["held-out", "general"])
def test_no_measured_question_is_trained_on(measured):
    assert shared_questions(TRAIN, measured) == []


@pytest.mark.parametrize(
    "records", [TRAIN, HELD_OUT, GENERAL], ids=["train", "held-out", "general"]
)
def test_no_question_comes_twice(records):
    assert max(Counter(normalize(question(record)) for record in records).values()) == 1


def test_no_held_out_question_nearly_repeats_a_trained_one():
    for held in HELD_OUT:
        for trained in TRAIN:
            common, all_words = words(held) & words(trained), words(held) | words(trained)
            assert len(common) <= 0.7 * len(all_words), (question(held), question(trained))


def test_every_held_out_answer_is_taught_in_many_other_wordings():
    taught = Counter(answer(record) for record in TRAIN)
    assert {answer(record) for record in HELD_OUT} == {a for a, n in taught.items() if n > 1}
    assert min(taught[answer(record)] for record in HELD_OUT) >= 8


def test_a_quarter_of_the_training_rows_rehearse_general_knowledge():
    taught = Counter(answer(record) for record in TRAIN)
    assert 0.2 < sum(n == 1 for n in taught.values()) / len(TRAIN) < 0.3


def test_general_answers_can_be_looked_for():
    for record in GENERAL:
        assert says(answer(record), record.expect)
        assert not says(question(record), record.expect), "the question gives the answer away"


@pytest.mark.weights
def test_the_rows_are_short_for_the_demos_model(smollm2):
    for records in (TRAIN, HELD_OUT):
        _, report = encode_all(records, smollm2, max_length=96)
        assert report.examples == len(records)
        assert report.tokens / report.examples <= 70
