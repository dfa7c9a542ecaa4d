"""What the model must write is what generation would leave to it, under any template."""

import pytest

from jqlora.data import Template, parse_record
from jqlora.data.template import AUTO, render, render_prompt
from jqlora.errors import DataError, SourceError

TURNS = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
CONVERSATION = parse_record({"messages": TURNS}, "f:1")
QUESTION_AND_ANSWER = parse_record({"messages": TURNS[:2]}, "f:1")
ALPACA_RECORD = parse_record({"instruction": "Add", "input": "1 {x}", "output": "2"}, "f:1")
PAIR = parse_record({"prompt": "P", "completion": "C"}, "f:1")
TEXT = parse_record({"text": "T"}, "f:1")

# In the manner of published templates: with a header and without, default system turn, merged one.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}<|im_end|>"
    "{% else %}{{ raise_exception('system turns are not supported') }}{% endif %}{% endfor %}"
)
ROLES_IN_WORDS = (
    "A chat.\n{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
# Keeps the reasoning header of the last answer only, so that earlier turns change when one is added
LAST_TURN_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("jinja", "learned"),
    [
        (CHATML, ["A1<|im_end|>\n", "A2<|im_end|>\n"]),
        (BRACKETS, [" A1<|im_end|>", " A2<|im_end|>"]),
        (ROLES_IN_WORDS, ["A1<|im_end|>\n", "A2<|im_end|>\n"]),
    ],
)
def test_the_answers_and_nothing_else_are_learned(make_tokenizer, jinja, learned):
    tokenizer = make_tokenizer(jinja)
    pieces = render(CONVERSATION, tokenizer, AUTO).pieces
    assert [piece.text for piece in pieces if piece.learn] == learned
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert "".join(piece.text for piece in pieces) == whole


@pytest.mark.parametrize("jinja", [CHATML, BRACKETS, ROLES_IN_WORDS, LAST_TURN_THINKS])
def test_training_begins_an_answer_where_generation_would(make_tokenizer, jinja):
    tokenizer = make_tokenizer(jinja)
    first = render(QUESTION_AND_ANSWER, tokenizer, AUTO).pieces[0]
    assert first.text == render_prompt(QUESTION_AND_ANSWER, tokenizer, AUTO).pieces[0].text
    asked = parse_record({"messages": TURNS[:1]}, "f:1")
    assert first.text == render_prompt(asked, tokenizer, AUTO).pieces[0].text


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    with pytest.raises(DataError, match=r"f:1: the chat template rewrites earlier text when turn"):
        render(CONVERSATION, make_tokenizer(LAST_TURN_THINKS), AUTO)


def test_an_answer_of_weight_zero_is_not_learned(chatml):
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    pieces = render(parse_record({"messages": turns}, "f:1"), chatml, AUTO).pieces
    assert [piece.text for piece in pieces if piece.learn] == ["A2<|im_end|>\n"]


def test_a_conversation_that_begins_with_an_answer_is_refused(chatml):
    with pytest.raises(DataError, match="f:1: the first turn is the assistant's"):
        render(parse_record({"messages": TURNS[1:]}, "f:1"), chatml, AUTO)


def test_what_a_template_refuses_is_reported_with_the_record(make_tokenizer):
    turns = [{"role": "system", "content": "S"}, *TURNS[:2]]
    with pytest.raises(DataError, match=r"f:1: the chat template refuses.*system turns are not"):
        render(parse_record({"messages": turns}, "f:1"), make_tokenizer(BRACKETS), AUTO)


def test_a_tokenizer_without_a_chat_template_says_what_to_do(make_tokenizer):
    with pytest.raises(DataError, match=r"f:1: the tokenizer has no chat template.*data\.template"):
        render(CONVERSATION, make_tokenizer(None), AUTO)


def test_a_template_file_stands_in_for_the_tokenizers(make_tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    template = Template.parse(f"{tmp_path}/chat.jinja")
    ours = render(CONVERSATION, make_tokenizer(None), template)
    assert ours == render(CONVERSATION, make_tokenizer(CHATML), AUTO)


def test_unknown_template_names_and_missing_files_are_errors():
    with pytest.raises(DataError, match="'alpacca' is not one of auto, chat, alpaca, plain"):
        Template.parse("alpacca")
    with pytest.raises(SourceError, match=r"absent\.jinja: No such file"):
        Template.parse("absent.jinja")


def texts(record, tokenizer, style):
    return [piece.text for piece in render(record, tokenizer, Template(style=style)).pieces]


def test_alpaca_records_take_the_chat_template_where_there_is_one(make_tokenizer):
    prompt, answer = texts(ALPACA_RECORD, make_tokenizer(CHATML), "auto")
    assert prompt == "<|im_start|>user\nAdd\n\n1 {x}<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "2<|im_end|>\n"
    without = texts(ALPACA_RECORD, make_tokenizer(None), "auto")
    assert without == texts(ALPACA_RECORD, make_tokenizer(CHATML), "alpaca")
    assert without[0].endswith("### Instruction:\nAdd\n\n### Input:\n1 {x}\n\n### Response:\n")
    assert without[1] == "2"


def test_the_alpaca_prompt_serves_one_question_and_answer(make_tokenizer):
    tokenizer = make_tokenizer(None)
    prompt, answer = texts(QUESTION_AND_ANSWER, tokenizer, "alpaca")
    assert "### Instruction:\nQ1\n\n### Response:\n" in prompt
    assert "Input" not in prompt
    assert answer == "A1"
    asked = parse_record({"messages": TURNS[:1]}, "f:1")
    assert render_prompt(asked, tokenizer, Template(style="alpaca")).pieces[0].text == prompt
    with pytest.raises(DataError, match="has the turns user, assistant, user, assistant"):
        texts(CONVERSATION, tokenizer, "alpaca")


def test_pairs_are_joined_plainly_unless_chat_is_asked_for(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    assert texts(PAIR, tokenizer, "auto") == texts(PAIR, tokenizer, "plain") == ["P", "C"]
    assert texts(PAIR, tokenizer, "chat")[1] == "C<|im_end|>\n"
    assert texts(ALPACA_RECORD, tokenizer, "plain") == ["Add\n1 {x}", "2"]


def test_a_style_that_does_not_fit_the_record_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    for style in ("chat", "alpaca"):
        with pytest.raises(DataError, match="plain text has no turns"):
            texts(TEXT, tokenizer, style)
    with pytest.raises(DataError, match="'plain' joins a prompt and a completion"):
        texts(CONVERSATION, tokenizer, "plain")
