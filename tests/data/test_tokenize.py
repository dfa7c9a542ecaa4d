"""The target mask marks the answer's tokens with the one that ends it, and no other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqlora.data import Template, encode_prompt, parse_record
from jqlora.data.tokenize import tokenize
from jqlora.errors import DataError
from tests.data.toy_tokenizers import CHATML, byte_tokenizer, metaspace_tokenizer

LINE = "\u010a"  # a line break as byte-level tokenizers write it
MERGING = byte_tokenizer(CHATML, merges=[(LINE, LINE), ("a", "b")])


def learned(example, tokenizer):
    return tokenizer.decode(example.input_ids[example.loss_mask])


def chat(*contents, origin="f:1"):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return parse_record({"messages": turns}, origin)


def test_the_end_of_turn_is_learned_although_padding_has_the_same_id(chatml):
    assert chatml.pad_token_id == chatml.eos_token_id
    example = tokenize(chat("Q1", "A1", "Q2", "A2"), chatml)
    assert learned(example, chatml) == "A1<|im_end|>A2<|im_end|>"
    # while those that end the user's turns are not
    assert (example.input_ids == chatml.eos_token_id).sum() == 4


def test_the_ids_are_those_of_the_whole_rendered_text(chatml):
    record = chat("Q1", "A1")
    text = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    ids = chatml.encode(text, add_special_tokens=False)
    assert tokenize(record, chatml).input_ids.tolist() == ids


def test_prompt_and_targets_make_the_whole_example(chatml):
    record = chat("Q1", "A1", "Q2", "A2")
    example, prompt = tokenize(record, chatml), encode_prompt(record, chatml)
    np.testing.assert_array_equal(example.input_ids[: len(prompt)], prompt)
    assert learned(example, chatml).endswith(
        chatml.decode(example.input_ids[len(prompt) :]).rstrip("\n")
    )


def test_an_answer_that_would_melt_into_its_prompt_is_tokenized_apart(chatml):
    record = chat("Q", "\nA")
    example, prompt = tokenize(record, MERGING), encode_prompt(record, MERGING)
    assert learned(example, MERGING) == "\nA<|im_end|>"
    np.testing.assert_array_equal(example.input_ids[: len(prompt)], prompt)
    assert MERGING.decode(example.input_ids) == chatml.decode(tokenize(record, chatml).input_ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=2, max_size=6))
def test_every_answer_is_learned_whatever_it_says(contents):
    example = tokenize(chat(*contents), MERGING)
    answers = "".join(f"{text}<|im_end|>" for text in contents[1::2])
    assert learned(example, MERGING) == answers


def test_a_tokenizer_that_marks_the_beginnings_of_words_keeps_them_apart():
    tokenizer = metaspace_tokenizer("ab:", merges=[("\u2581", "b")])
    record = parse_record({"prompt": "a:", "completion": " bb"}, "f:1")
    example = tokenize(record, tokenizer)
    assert tokenizer.decode(example.input_ids) == "a: bb</s>"
    targets = tokenizer.convert_ids_to_tokens(example.input_ids[example.loss_mask])
    assert targets == ["\u2581b", "b", "</s>"]


def test_a_space_that_belongs_to_the_answers_first_token_is_asked_for():
    tokenizer = metaspace_tokenizer("ab:", merges=[("\u2581", "b")])
    with pytest.raises(
        DataError, match=r"f:1: the tokenizer joins.*let the space .* begin the ans"
    ):
        tokenize(parse_record({"prompt": "a: ", "completion": "bb"}, "f:1"), tokenizer)


@pytest.mark.parametrize("bos", [False, True])
def test_pairs_begin_and_end_as_the_tokenizer_wants(make_tokenizer, bos):
    tokenizer = make_tokenizer(bos=bos)
    record = parse_record({"prompt": "P:", "completion": " C"}, "f:1")
    example = tokenize(record, tokenizer)
    begin = "<s>" if bos else ""
    assert tokenizer.decode(example.input_ids) == f"{begin}P: C<|im_end|>"
    assert learned(example, tokenizer) == " C<|im_end|>"
    assert tokenizer.decode(encode_prompt(record, tokenizer)) == f"{begin}P:"


@pytest.mark.parametrize("bos", [False, True])
def test_all_of_a_text_is_learned_but_the_token_that_nothing_predicts(make_tokenizer, bos):
    tokenizer = make_tokenizer(bos=bos)
    example = tokenize(parse_record({"text": "abc"}, "f:1"), tokenizer)
    assert learned(example, tokenizer) == ("abc" if bos else "bc") + "<|im_end|>"


def test_training_on_all_tokens_learns_the_prompt_too(chatml):
    example = tokenize(chat("Q", "A"), chatml, train_on="all")
    assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 1)


def test_an_empty_answer_still_teaches_to_stop(chatml):
    assert learned(tokenize(chat("Q", ""), chatml), chatml) == "<|im_end|>"


def test_a_tokenizer_without_an_end_token_is_an_error(make_tokenizer):
    with pytest.raises(DataError, match="f:1: the tokenizer has no end-of-sequence token"):
        tokenize(parse_record({"text": "abc"}, "f:1"), make_tokenizer(eos=False))


def test_ids_and_masks_have_the_promised_dtypes(chatml):
    example = tokenize(chat("Q", "A"), chatml)
    assert (example.input_ids.dtype, example.loss_mask.dtype) == (np.int32, np.bool_)


@pytest.mark.weights
@pytest.mark.parametrize(
    "answer", ["Paris.", " Paris", "\nParis\n", "<b>é</b> 東京 🙂", "12 34\n\n"]
)
def test_smollm2_learns_the_answer_and_its_end(smollm2, answer):
    record = chat("What is the capital of France?", "?", "Please say it.", answer)
    example, prompt = tokenize(record, smollm2), encode_prompt(record, smollm2)
    assert learned(example, smollm2) == f"?<|im_end|>{answer}<|im_end|>"
    np.testing.assert_array_equal(example.input_ids[: len(prompt)], prompt)
    assert smollm2.decode(prompt).endswith("say it.<|im_end|>\n<|im_start|>assistant\n")
    assert "named SmolLM" in smollm2.decode(prompt)  # the template's own system turn


@pytest.mark.weights
def test_smollm2_puts_no_begin_token_before_plain_text(smollm2):
    example = tokenize(parse_record({"text": "Once upon"}, "f:1"), smollm2)
    assert smollm2.decode(example.input_ids) == "Once upon<|im_end|>"


@pytest.mark.weights
def test_alpaca_style_overrules_smollm2s_template(smollm2):
    record = parse_record({"instruction": "Say hi", "output": "hi"}, "f:1")
    assert learned(tokenize(record, smollm2), smollm2) == "hi<|im_end|>"
    plain = tokenize(record, smollm2, template=Template(style="alpaca"))
    assert smollm2.decode(plain.input_ids).startswith("Below is an instruction")
    assert learned(plain, smollm2) == "hi<|im_end|>"
