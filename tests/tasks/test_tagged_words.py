"""Words with tags: both published layouts, tokens as transformers aligns them, CoNLL's scores."""

import json

import numpy as np
import pytest

from jqlora.errors import ConfigError, DataError
from jqlora.tasks import TASKS
from jqlora.tasks.batches import Collate, evaluation_batches
from jqlora.tasks.entities import entities, entity_scores
from jqlora.tasks.scoring import tag_scores
from jqlora.tasks.words import read_tagged, tag_features
from tests.toy_checkpoint import toy_tokenizer
from tests.toy_encoder import wordpiece_tokenizer

TASK = TASKS["conll2003"]
COLUMNS = """-DOCSTART- -X- -X- O

we PRP B-NP O
saw VBD B-VP O
warmly NNP B-NP B-PER
cold NNP I-NP I-PER

film\tNN\tB-NP\tB-ORG
"""
ROWS = [
    {"tokens": ["we", "saw", "warmly", "cold"], "ner_tags": [0, 0, 1, 2], "pos_tags": [1, 2, 3, 3]},
    {"tokens": ["film"], "ner_tags": [3]},
]


@pytest.fixture
def records(tmp_path):
    (tmp_path / "eng.conll").write_text(COLUMNS)
    return read_tagged(TASK, tmp_path / "eng.conll")


def test_columns_and_the_hubs_rows_are_the_same_records(records, tmp_path):
    (tmp_path / "hub.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    hub = read_tagged(TASK, tmp_path / "hub.jsonl")
    assert [(r.words, r.tags) for r in records] == [(r.words, r.tags) for r in hub]
    assert [r.origin.rsplit(":")[-1] for r in records] == ["3", "8"]


def test_the_first_token_of_a_word_has_its_tag_and_no_other(records):
    features, report = tag_features(records, wordpiece_tokenizer(), max_length=32, truncate=False)
    batch = Collate(rows=3, limit=32, pad=0)(features)
    assert batch["labels"].shape == batch["input_ids"].shape == (3, 16)
    # [CLS] we saw warm ##l ##y cold [SEP]
    assert batch["labels"][0].tolist() == [-100, 0, 0, 1, -100, -100, 2, *[-100] * 9]
    assert (batch["labels"][2] == -100).all()  # a row that fills the batch
    assert report.longest == 8
    with pytest.raises(DataError, match=r"eng\.conll:3: the sentence has 8 tokens"):
        tag_features(records, wordpiece_tokenizer(), max_length=5, truncate=False)
    cut, report = tag_features(records, wordpiece_tokenizer(), max_length=5, truncate=True)
    assert cut[0].targets["labels"].tolist() == [-100, 0, 0, 1, -100]
    assert len(report.shortened) == 1


def test_words_stand_apart_for_a_tokenizer_that_keeps_spaces(records):
    features, _ = tag_features(records, toy_tokenizer(), max_length=32, truncate=False)
    text = toy_tokenizer().decode(features[0].inputs["input_ids"])
    assert text == " we saw warmly cold"


def test_right_tags_have_the_best_score_whatever_the_models_numbering(records):
    numbering = tuple(reversed(range(9)))
    names = list(reversed(TASK.labels))
    options = {"max_length": 32, "truncate": False, "numbering": numbering}
    features, _ = tag_features(records, wordpiece_tokenizer(), **options)
    _, order = evaluation_batches(features, Collate(rows=1, limit=32, pad=0))
    right = [np.eye(9)[np.maximum(f.targets["labels"], 0)] for f in features]
    outputs = [{"logits": right[i]} for i in order]
    score = tag_scores(TASK, names, features, order)
    assert score(outputs) == dict.fromkeys(TASK.metrics, 1.0)
    wrong = score([{"logits": -row["logits"]} for row in outputs])
    assert wrong["f1"] == wrong["accuracy"] == 0.0
    parts = tag_scores(TASK, [f"N{i}" for i in range(9)], features, order)
    assert parts(outputs) == {"accuracy": 1.0}


# the same two entities, as each scheme writes them
SCHEMES = {
    "IOB1": "I-PER I-PER O I-LOC B-LOC",
    "IOB2": "B-PER I-PER O B-LOC B-LOC",
    "IOE2": "I-PER E-PER O E-LOC E-LOC",
    "IOBES": "B-PER E-PER O S-LOC S-LOC",
    "types alone": "I-PER I-PER O I-LOC S-LOC",
}


@pytest.mark.parametrize("tags", SCHEMES.values(), ids=SCHEMES.keys())
def test_every_scheme_names_the_same_entities(tags):
    assert entities(tags.split()) == {(0, 1, "PER"), (3, 3, "LOC"), (4, 4, "LOC")}


def test_an_entity_counts_only_if_it_is_found_whole():
    true = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert entity_scores(true, found) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert set(entity_scores(true, [["O"] * 7, ["O"] * 3]).values()) == {0.0}


BAD = {
    "other columns": ({"words": ["a"]}, "the columns tokens and ner_tags or tags"),
    "lengths": ({"tokens": ["a", "b"], "tags": [0]}, "lists of one length"),
    "an unknown tag": ({"tokens": ["a"], "tags": ["B-XYZ"]}, "tags='B-XYZ' is no label"),
}


@pytest.mark.parametrize(("row", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named(row, words, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: ") as error:
        read_tagged(TASK, tmp_path / "rows.jsonl")
    assert words in str(error.value)


def test_a_line_without_a_tag_and_tags_without_names_are_refused(tmp_path):
    (tmp_path / "a.conll").write_text("we O\nsaw\n")
    with pytest.raises(DataError, match=r"a\.conll:2: expected a word and its tag"):
        read_tagged(TASK, tmp_path / "a.conll")
    with pytest.raises(ConfigError, match=r"data\.labels"):
        read_tagged(TASKS["token_classification"], tmp_path / "a.conll")
