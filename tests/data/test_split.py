"""Nothing that training asks is asked again of the held-out records."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqlora.data import answer, hold_out, parse_record, question, says, shared_questions
from jqlora.data.questions import normalize
from jqlora.errors import DataError


def make_records(questions):
    return [
        parse_record({"prompt": asked, "completion": f"answer {i}"}, f"f:{i}")
        for i, asked in enumerate(questions)
    ]


@settings(max_examples=80, deadline=None)
@given(
    picks=st.lists(st.integers(0, 12), min_size=2, max_size=50).filter(lambda p: len(set(p)) > 1),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_a_split_shares_no_question_and_loses_no_record(picks, share, seed):
    spellings = ("what is {}", "What is {}?", "  what's{} ".replace("'s", " is "))
    records = make_records([spellings[i % 3].format(n) for i, n in enumerate(picks)])
    train, held = hold_out(records, share, seed=seed)
    assert train
    assert held
    assert shared_questions(train, held) == []
    assert sorted((*train, *held), key=records.index) == records
    assert (train, held) == (sorted(train, key=records.index), sorted(held, key=records.index))


def test_the_share_is_met_where_questions_are_all_different():
    records = make_records([f"question {i}" for i in range(200)])
    train, held = hold_out(records, 0.1)
    assert (len(train), len(held)) == (180, 20)


def test_the_seed_decides_and_repeats():
    records = make_records([f"question {i}" for i in range(50)])
    assert hold_out(records, 0.2, seed=3) == hold_out(records, 0.2, seed=3)
    assert hold_out(records, 0.2, seed=3) != hold_out(records, 0.2, seed=4)


def test_what_cannot_be_split_is_an_error():
    with pytest.raises(DataError, match="2 records ask 1 different question"):
        hold_out(make_records(["Who?", " who"]), 0.5)
    with pytest.raises(DataError, match="between 0 and 1, not 1"):
        hold_out(make_records(["a", "b"]), 1)


def test_shared_questions_are_found_whatever_their_spelling():
    train, held = make_records(["What is LoRA?"]), make_records(["so?", "what  is LORA"])
    assert shared_questions(train, held) == ["f:1"]


@pytest.mark.parametrize(
    ("row", "asked", "answered"),
    [
        ({"prompt": "P", "completion": "C"}, "P\n", "C"),
        ({"instruction": "I", "input": "X", "output": "O"}, "I\nX", "O"),
        ({"text": "T"}, "T", ""),
        (
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "Q1"},
                    {"role": "assistant", "content": "A1"},
                    {"role": "user", "content": "Q2"},
                    {"role": "assistant", "content": "A2"},
                ]
            },
            "Q1",
            "A2",
        ),
        ({"messages": [{"role": "user", "content": "Q"}]}, "Q", ""),
    ],
)
def test_question_and_answer_of_every_format(row, asked, answered):
    record = parse_record(row, "f:1")
    assert (question(record), answer(record)) == (asked, answered)


def test_questions_are_compared_by_their_words():
    assert normalize("What's  NF4?!") == normalize("what s nf4") == "what s nf4"
    assert normalize("Größe") != normalize("Grosse Frage")
    assert normalize("?!") != normalize("...")  # nothing but punctuation stays apart


def test_a_short_answer_is_looked_for_as_whole_words():
    assert says("The capital of France is Paris.", "paris")
    assert says("Water freezes at 0°C.", "0")
    assert says("It was Leonardo da Vinci!", "Leonardo da Vinci")
    assert not says("Parisian food", "Paris")
    assert not says("100 degrees", "0")
