"""Formats are told apart by their keys; a bad record says where it is and what was expected."""

import pytest

from jqlora.data import Message, parse_record
from jqlora.errors import DataError

USER, ANSWER = Message(role="user", content="Q"), Message(role="assistant", content="A")
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": CHAT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, CHAT[1]]},
        {"messages": CHAT, "prompt": "Q", "text": "Q A", "id": 7},
    ],
)
def test_every_spelling_of_a_conversation_gives_the_same_turns(row):
    record = parse_record(row, "f:1")
    assert (record.kind, record.messages) == ("messages", (USER, ANSWER))


def test_a_system_field_beside_the_conversation_is_its_first_turn():
    record = parse_record({"system": "Be brief.", "messages": CHAT}, "f:1")
    assert record.messages == (Message(role="system", content="Be brief."), USER, ANSWER)


def test_a_turn_of_weight_zero_is_not_trained():
    turns = [CHAT[0], {**CHAT[1], "weight": 0}]
    assert [m.train for m in parse_record({"messages": turns}, "f:1").messages] == [True, False]


@pytest.mark.parametrize(
    ("row", "kind", "parts"),
    [
        ({"instruction": "I", "input": "X", "output": "O"}, "alpaca", ("I", "X", "O")),
        ({"instruction": "I", "input": None, "output": "O"}, "alpaca", ("I", "", "O")),
        ({"instruction": "I", "output": "O", "text": "I O"}, "alpaca", ("I", "", "O")),
        ({"instruction": "I", "context": "X", "response": "O"}, "alpaca", ("I", "X", "O")),
        ({"prompt": "P", "completion": "C"}, "prompt-completion", ("P", "", "C")),
        ({"question": "P", "answer": "C"}, "prompt-completion", ("P", "", "C")),
    ],
)
def test_instructions_and_pairs_are_recognized(row, kind, parts):
    record = parse_record(row, "f:1")
    assert (record.kind, (record.prompt, record.context, record.completion)) == (kind, parts)


def test_plain_text_is_recognized_last():
    record = parse_record({"text": "T", "messages": None, "meta": 3}, "f:1")
    assert (record.kind, record.text) == ("text", "T")


def test_what_a_right_answer_contains_may_stand_beside_any_format():
    assert parse_record({"prompt": "P", "completion": "C", "expect": "C"}, "f:1").expect == "C"
    assert parse_record({"messages": CHAT, "expect": "A"}, "f:1").expect == "A"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "Q", "reply": "A"}, r"no known format in the fields \['query', 'reply'\].*text"),
        ({}, "no known format"),
        (["Q", "A"], "expected an object with named fields, found list"),
        ({"messages": "Q"}, "messages: expected a list of turns, found str 'Q'"),
        ({"messages": []}, "messages: expected a list of turns"),
        ({"messages": ["Q"]}, r"messages\[0\]: expected \{role, content\}"),
        (
            {"messages": [{"role": "pirate", "content": "Q"}]},
            r"messages\[0\]: role 'pirate' is not one of system",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]: content must be text"),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [1]}]},
            r"messages\[1\]: tool calls are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\]: only text can be learned",
        ),
        ({"instruction": 3, "output": "O"}, "instruction must be text, found int 3"),
        ({"prompt": "P", "completion": ["C"]}, "completion must be text, found list"),
        ({"text": " \n"}, "text is empty"),
    ],
)
def test_a_bad_record_says_where_it_is_and_what_was_expected(row, message):
    with pytest.raises(DataError, match=rf"^rows.jsonl:12: {message}"):
        parse_record(row, "rows.jsonl:12")
