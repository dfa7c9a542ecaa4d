"""Texts written to texts: rows, features as transformers has them, ROUGE by its library."""

import json

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from jqlora.errors import DataError
from jqlora.tasks import TASKS
from jqlora.tasks.batches import Collate
from jqlora.tasks.prompted import CUE, prompted_examples, prompts_in
from jqlora.tasks.summaries import read_summaries, rouge, summary_features
from tests.toy_checkpoint import toy_tokenizer
from tests.toy_encoder import wordpiece_tokenizer

TASK = TASKS["summarization"]
ROWS = [
    ("we saw a film and it was good. the actor was bad.", "a good film"),
    ("the plot was cold and the film was dull.", "dull plot. the film was dull."),
]


@pytest.fixture
def records(tmp_path):
    lines = [json.dumps({"article": text, "highlights": told, "id": "x"}) for text, told in ROWS]
    (tmp_path / "cnn.jsonl").write_text("\n".join(lines) + "\n")
    return read_summaries(TASK, tmp_path / "cnn.jsonl")


@pytest.mark.parametrize("columns", TASK.texts, ids="-".join)
def test_each_pair_of_columns_is_read(columns, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(zip(columns, "ab", strict=True))) + "\n")
    (found,) = read_summaries(TASK, tmp_path / "rows.jsonl")
    assert (found.document, found.summary) == ("a", "b")


@pytest.mark.parametrize("row", [{"document": "a"}, {"document": "a", "summary": " "}])
def test_a_bad_row_is_named(row, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        read_summaries(TASK, tmp_path / "rows.jsonl")


def test_features_are_those_of_transformers(records):
    tokenizer = wordpiece_tokenizer()
    lengths = {"max_length": 10, "target_length": 6}
    with pytest.raises(DataError, match=r"cnn\.jsonl:1: 17 tokens.*data\.length"):
        summary_features(records, tokenizer, prefix="a ", truncate=False, **lengths)
    features, report = summary_features(records, tokenizer, prefix="a ", truncate=True, **lengths)
    assert len(report.shortened) == 2
    batch = Collate(rows=3, limit=10, pad=0, target_limit=6)(features)
    texts = [f"a {text}" for text, _ in ROWS]
    inputs = tokenizer(texts, max_length=10, truncation=True, padding=True, return_tensors="np")
    targets = tokenizer(text_target=[told for _, told in ROWS], max_length=6, truncation=True)
    np.testing.assert_array_equal(batch["input_ids"][:2], inputs["input_ids"])
    for row, expected in zip(batch["labels"], [*targets["input_ids"], []], strict=True):
        np.testing.assert_array_equal(row, [*expected, *[-100] * (6 - len(expected))])


def test_rouge_is_the_librarys_with_a_sentence_on_each_line(records):
    written = ["The film was good.", "The film was dull. Cold plot."]
    found = rouge(TASK, written, [record.summary for record in records])
    scorer = RougeScorer(list(TASK.metrics), use_stemmer=True)
    expected = [
        scorer.score("a good film", written[0]),
        scorer.score("dull plot.\nthe film was dull.", "The film was dull.\nCold plot."),
    ]
    for name in TASK.metrics:
        mean = 100 * np.mean([row[name].fmeasure for row in expected])
        assert found[name] == pytest.approx(mean)
    assert found["rougeLsum"] > found["rougeL"]
    best = rouge(TASK, [told for _, told in ROWS], [told for _, told in ROWS])
    assert best == pytest.approx(dict.fromkeys(TASK.metrics, 100.0))


def test_a_causal_model_learns_what_follows_the_cue_and_nothing_before(records):
    tokenizer = toy_tokenizer()
    options = {"prefix": "a ", "max_length": 40, "target_length": 12}
    with pytest.raises(DataError, match=r"cnn\.jsonl:1: 59 tokens.*data\.length"):
        prompted_examples(records, tokenizer, truncate=False, **options)
    examples, report = prompted_examples(records, tokenizer, truncate=True, **options)
    assert len(report.shortened) == 2
    for record, example, prompt in zip(records, examples, prompts_in(examples), strict=True):
        whole = tokenizer.encode(f"a {record.document}")
        cue = tokenizer.encode(CUE)
        assert prompt.tolist() == [*whole[: 40 - len(cue)], *cue]
        learnt = example.input_ids[example.loss_mask]
        expected = [*tokenizer.encode(f" {record.summary}"), tokenizer.eos_token_id]
        assert learnt.tolist() == expected[:12]
        assert len(prompt) + len(learnt) == len(example)
