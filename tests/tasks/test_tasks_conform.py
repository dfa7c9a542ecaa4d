"""Every task of the table: its published layouts read alike, and its scores are those of papers."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jqlora.errors import ConfigError, DataError
from jqlora.tasks import TASKS, task_named
from jqlora.tasks.batches import Collate, evaluation_batches
from jqlora.tasks.features import label_features
from jqlora.tasks.labelled import read_labelled
from jqlora.tasks.scoring import label_scores
from tests.toy_encoder import wordpiece_tokenizer

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Of each task: a file as GLUE's site has it, and the same rows in the hub's columns. In every one
# a quotation mark is not closed.
LAYOUTS = {
    "cola": (
        'gj04\t1\t\tThey drank the "pub.\ngj04\t0\t*\tThem drank.\n',
        {"sentence": ['They drank the "pub.', "Them drank."], "label": [1, 0]},
    ),
    "sst2": (
        'sentence\tlabel\na "gem \t1\nunflinchingly bleak \t0\n',
        {"sentence": ['a "gem ', "unflinchingly bleak "], "label": [1, 0]},
    ),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t7\t8\tHe said "no.\tNo, he said.\r\n0\t9\t10\tRain fell.\tShares fell.\r\n',
        {
            "sentence1": ['He said "no.', "Rain fell."],
            "sentence2": ["No, he said.", "Shares fell."],
            "label": [1, 0],
        },
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        '1\t2\t3\tWhat is "x?\tWhat is y?\t0\n4\t5\t6\tWhy?\tWhat for?\t1\n7\t8\tcut off\n',
        {
            "question1": ['What is "x?', "Why?"],
            "question2": ["What is y?", "What for?"],
            "label": [0, 1],
        },
    ),
    "qnli": (
        'index\tquestion\tsentence\tlabel\n0\tWho "ran?\tHe ran.\tentailment\n'
        "1\tWho ran?\tRain.\tnot_entailment\n",
        {
            "question": ['Who "ran?', "Who ran?"],
            "sentence": ["He ran.", "Rain."],
            "label": [0, 1],
        },
    ),
    "rte": (
        'index\tsentence1\tsentence2\tlabel\n0\tA "b.\tC.\tnot_entailment\n1\tA.\tA.\tentailment\n',
        {"sentence1": ['A "b.', "A."], "sentence2": ["C.", "A."], "label": [1, 0]},
    ),
    "wnli": (
        'index\tsentence1\tsentence2\tlabel\n0\tA "b.\tC.\t1\n1\tA.\tA.\t0\n',
        {"sentence1": ['A "b.', "A."], "sentence2": ["C.", "A."], "label": [1, 0]},
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        '0\t1\t1n\tfiction\t(\t(\t(\t(\tIt "rains.\tIt is wet.\tneutral\tentailment\n'
        "1\t2\t2c\tfiction\t(\t(\t(\t(\tIt rains.\tIt is dry.\tneutral\tcontradiction\n",
        {
            "premise": ['It "rains.', "It rains."],
            "hypothesis": ["It is wet.", "It is dry."],
            "label": [0, 2],
        },
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        '0\tnews\tx\t2012\t1\tnone\tnone\tA "plane.\tA jet.\t4.750\n'
        "1\tnews\tx\t2012\t2\tnone\tnone\tA plane.\tA cow.\t0.000\n",
        {
            "sentence1": ['A "plane.', "A plane."],
            "sentence2": ["A jet.", "A cow."],
            "label": [4.75, 0.0],
        },
    ),
    "classification": (
        'text\tlabel\nall "well\t1\nnot well\t0\n',
        {"text": ['all "well', "not well"], "label": [1, 0]},
    ),
    "regression": (
        'text\tscore\nall "well\t1.5\nnot well\t-2\n',
        {"text": ['all "well', "not well"], "label": [1.5, -2.0]},
    ),
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def write_layout(name, folder):
    """The rows as the site's file, and in each format that the hub's rows come in."""
    site, columns = LAYOUTS[name]
    (folder / "train.tsv").write_text(site)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "hub.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table(columns), folder / "hub.parquet")
    return [folder / "train.tsv", folder / "hub.jsonl", folder / "hub.parquet"]


def test_every_task_with_labels_has_a_layout_here():
    assert set(LAYOUTS) == {name for name, task in TASKS.items() if task.kind == "labels"}


@every_layout
def test_the_sites_files_and_the_hubs_rows_are_the_same_records(name, tmp_path):
    found = []
    for path in write_layout(name, tmp_path):
        records, broken = read_labelled(TASKS[name], path)
        found.append([(record.texts, record.label) for record in records])
        assert len(broken) == (name == "qqp" and path.suffix == ".tsv")
    assert found[0] == found[1] == found[2]
    columns = list(LAYOUTS[name][1].values())
    assert found[0] == [(tuple(texts), label) for *texts, label in zip(*columns, strict=True)]


@every_layout
def test_right_predictions_have_the_best_score_and_wrong_ones_a_lower(name, tmp_path):
    task = TASKS[name]
    records, _ = read_labelled(task, write_layout(name, tmp_path)[1])
    classes = 1 if task.number else task.num_labels or 2
    true = np.asarray([record.label for record in records])
    right = true[:, None] if task.number else np.eye(classes)[true]
    score = label_scores(task, records, order=[1, 0])

    def rows(logits):
        return [{"logits": row} for row in logits[::-1]]  # in the batches' order

    assert score(rows(right)) == pytest.approx(dict.fromkeys(task.metrics, 1.0))
    assert all(value < 1 for value in score(rows(-right)).values())
    assert all(math.isfinite(value) for value in score(rows(0 * right)).values())


@every_layout
def test_features_are_those_of_transformers(name, tmp_path):
    task, tokenizer = TASKS[name], wordpiece_tokenizer()
    records, _ = read_labelled(task, write_layout(name, tmp_path)[1])
    for length in (64, 12):
        features, report = label_features(records, tokenizer, max_length=length, truncate=True)
        batch = Collate(rows=3, limit=64, pad=0)(features)
        texts = zip(*(record.texts for record in records), strict=True)
        expected = tokenizer(
            *map(list, texts), truncation=True, max_length=length, padding=True, return_tensors="np"
        )
        width = expected["input_ids"].shape[1]
        for key, array in expected.items():
            np.testing.assert_array_equal(batch[key][:2, :width], array)
            assert not batch[key][:2, width:].any()
        assert report.longest == width
    assert batch["labels"].dtype == (np.float32 if task.number else np.int32)
    filling = batch["labels"][2]
    assert np.isnan(filling) if task.number else filling == -100


def test_batches_have_few_lengths_and_every_row_once():
    tokenizer = wordpiece_tokenizer()
    generator = np.random.default_rng(0)
    sentences = [" ".join(["film"] * n) for n in generator.integers(1, 58, 50)]
    records = [read_one(sentence) for sentence in sentences]
    features, _ = label_features(records, tokenizer, max_length=60, truncate=False)
    batches, order = evaluation_batches(features, Collate(rows=8, limit=60, pad=0))
    assert {batch["input_ids"].shape for batch in batches} <= {(8, t) for t in (16, 32, 60)}
    assert sorted(order) == list(range(50))
    rows = [(row, mask) for b in batches for row, mask in zip(*map(b.get, IDS), strict=True)]
    for i, (row, mask) in zip(order, rows, strict=False):
        np.testing.assert_array_equal(row[mask > 0], features[i].inputs["input_ids"])


IDS = ("input_ids", "attention_mask")


def read_one(sentence):
    from jqlora.tasks.labelled import Labelled

    return Labelled((sentence,), 0, "row")


BAD = {
    "a label that is none": (
        "sst2",
        {"sentence": "a", "label": 2},
        "negative, positive, or 0 to 1",
    ),
    "a test set's label": ("sst2", {"sentence": "a", "label": -1}, "label=-1"),
    "a test set without labels": ("sst2", {"sentence": "a"}, "test sets"),
    "no consensus": ("mnli", {"premise": "a", "hypothesis": "b", "label": "-"}, "entailment"),
    "other columns": ("qnli", {"sentence1": "a", "label": 1}, "question, sentence"),
    "no number": ("stsb", {"sentence1": "a", "sentence2": "b", "label": "x"}, "no number"),
    "no text": ("sst2", {"sentence": 3, "label": 1}, "must be text"),
}


@pytest.mark.parametrize(("name", "row", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named_with_what_is_accepted(name, row, words, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1") as error:
        read_labelled(TASKS[name], tmp_path / "rows.jsonl")
    assert words in str(error.value)


def test_labels_may_be_named_where_a_task_has_no_names(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "up"}\n')
    task = TASKS["classification"]
    assert read_labelled(task, tmp_path / "rows.jsonl", ("down", "up"))[0][0].label == 1
    with pytest.raises(DataError, match="a number from 0 up"):
        read_labelled(task, tmp_path / "rows.jsonl")


def test_a_long_record_is_named_unless_it_may_be_cut():
    records = [read_one("film " * 20)]
    with pytest.raises(DataError, match=r"row: the record has 22 tokens, more than the 8 allowed"):
        label_features(records, wordpiece_tokenizer(), max_length=8, truncate=False)
    _, report = label_features(records, wordpiece_tokenizer(), max_length=8, truncate=True)
    assert report.lines() == ["1 records; the longest has 8 tokens", "1 cut to fit: row"]


def test_the_models_own_numbering_of_classes_is_followed(tmp_path):
    task = TASKS["mnli"]
    records, _ = read_labelled(task, write_layout("mnli", tmp_path)[1])
    numbering = (2, 1, 0)  # as in the published RoBERTa for MNLI
    features, _ = label_features(
        records, wordpiece_tokenizer(), max_length=64, truncate=False, numbering=numbering
    )
    labels = [int(feature.targets["labels"]) for feature in features]
    assert labels == [2, 0]
    rows = [{"logits": row} for row in np.eye(3)[labels]]
    assert label_scores(task, records, [0, 1], numbering)(rows) == {"accuracy": 1.0}


def test_an_unknown_task_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'sst' is not a task; nearest: .*sst2"):
        task_named("sst")
