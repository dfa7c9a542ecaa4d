"""Multiple choice: the published layouts, the harness's prompts, and its scores."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.attach import bind
from jqlora.errors import DataError
from jqlora.io import load, load_tokenizer
from jqlora.tasks.choices import Choice, choice_scores, options, prompt, read_choices
from jqlora.tasks.likelihood import Asked, encode_asked, make_likelihood
from tests.toy_checkpoint import write_model

CSV = '''"What is 2, 3?",five,"a ""pair""",one,two,B
Why?,a,b,c,d,D
'''
HUB = [
    {
        "question": "What is 2, 3?",
        "subject": "number_theory",
        "choices": ["five", 'a "pair"', "one", "two"],
        "answer": 1,
    },
    {"question": "Why?", "subject": "number_theory", "choices": list("abcd"), "answer": 3},
]


def test_the_published_files_and_the_hubs_rows_are_the_same_questions(tmp_path):
    (tmp_path / "number_theory_test.csv").write_text(CSV)
    (tmp_path / "hub.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HUB))
    found = [
        [vars(one) | {"origin": ""} for one in read_choices(tmp_path / name)]
        for name in ("number_theory_test.csv", "hub.jsonl")
    ]
    assert found[0] == found[1]
    assert [one["answer"] for one in found[0]] == [1, 3]


@pytest.mark.parametrize("answer", ["E", 4, -1, "", None])
def test_an_answer_that_is_no_choice_is_named(answer, tmp_path):
    (tmp_path / "hub.jsonl").write_text(json.dumps(HUB[0] | {"answer": answer}) + "\n")
    with pytest.raises(DataError, match=r"hub\.jsonl:1: answer="):
        read_choices(tmp_path / "hub.jsonl")


FIRST = Choice("What is 1+1?", ("1", "2"), 1, "number_theory", "")
SECOND = Choice(" Why? ", ("so", "to be"), 0, "number_theory", "")


def test_prompts_are_those_of_the_harness():
    assert prompt(SECOND, [FIRST], "letters") == (
        "The following are multiple choice questions (with answers) about number theory.\n\n"
        "What is 1+1?\nA. 1\nB. 2\nAnswer: B\n\n"
        "Why?\nA. so\nB. to be\nAnswer:"
    )
    assert prompt(SECOND, [FIRST], "answers") == (
        "The following are questions (with answers) about number theory.\n\n"
        "Question: What is 1+1?\nAnswer: 2\n\nQuestion: Why?\nAnswer:"
    )
    assert options(SECOND, "letters") == ("A", "B")
    assert options(SECOND, "answers") == ("so", "to be")


def test_scores_are_divided_by_the_length_of_the_answers_in_characters_or_bytes():
    asked = [Choice("", ("ab", "abcd"), 1, "", ""), Choice("", ("xyz", "\u00e9\u00e9"), 0, "", "")]
    scores = [np.array([-3.0, -5.0]), np.array([-3.0, -1.9])]
    found = choice_scores(asked, scores, "answers")
    assert found == {
        "accuracy": 0.0,  # -3 > -5, and -1.9 > -3
        "accuracy_per_character": 0.5,  # -1.25 > -1.5, but -0.95 > -1
        "accuracy_per_byte": 0.5,  # -1.25 > -1.5, but -0.475 > -1
    }
    letters = choice_scores(asked, scores, "letters")
    assert len(set(letters.values())) == 1


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=1)
    model, params = load(str(folder), dtype="float32")
    return folder, bind(model), {"params": params}, load_tokenizer(str(folder))


def test_likelihoods_are_sums_over_the_continuations_tokens_one_by_one(opened):
    _, apply, variables, tokenizer = opened
    texts = [("two", ("A", "B", "C")), ("four and", ("a", "six")), ("one two three", ("be", "it"))]
    asked = [encode_asked(text, after, tokenizer) for text, after in texts]
    found = make_likelihood(apply, rows=2, length=64)(variables, asked)
    plain = jax.jit(apply)
    for (text, after), values in zip(texts, found, strict=True):
        for continuation, value in zip(after, values, strict=True):
            whole = tokenizer(f"{text} {continuation}")["input_ids"]
            padded = jnp.asarray([whole + [0] * (24 - len(whole))], jnp.int32)
            scores = jax.nn.log_softmax(plain(variables, padded).logits[0])
            at = range(len(tokenizer(text)["input_ids"]), len(whole))
            expected = sum(float(scores[i - 1, whole[i]]) for i in at)
            np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_letters_of_one_question_share_a_row():
    from jqlora.tasks.likelihood import _rows

    given = np.arange(5, dtype=np.int32)
    one = Asked(given, tuple(np.array([i], np.int32) for i in range(4)))
    assert len(_rows([one, one])) == 1
    two = Asked(given, (np.array([1, 2], np.int32), np.array([1, 3], np.int32)))
    assert len(_rows([two])) == 1
    assert two.longest == 6


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_likelihoods_are_those_of_transformers(opened):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, apply, variables, tokenizer = opened
    texts = ("four and", ("a", "six", "twenty"))
    found = make_likelihood(apply, rows=2, length=64)(variables, [encode_asked(*texts, tokenizer)])[
        0
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for continuation, value in zip(texts[1], found, strict=True):
        whole = torch.tensor(tokenizer([f"{texts[0]} {continuation}"])["input_ids"])
        labels = whole.clone()
        labels[:, : len(tokenizer(texts[0])["input_ids"])] = -100
        with torch.no_grad():
            loss = model(whole, labels=labels).loss
        np.testing.assert_allclose(value, -float(loss * (labels >= 0).sum()), rtol=1e-5)
