"""Masked texts: BERT's shares, other tokens each time, and the same ones after a resume."""

import json

import numpy as np
import pytest

from jqlora.errors import ConfigError, DataError
from jqlora.tasks import TASKS
from jqlora.tasks.batches import Collate, training_batches
from jqlora.tasks.masking import Masking, text_features
from tests.toy_checkpoint import toy_tokenizer
from tests.toy_encoder import reviews, wordpiece_tokenizer

TASK = TASKS["masked_lm"]
TOKENIZER = wordpiece_tokenizer()
MASKING = Masking.of(TOKENIZER)


@pytest.fixture
def texts(tmp_path):
    lines = [json.dumps({"text": text}) for text, _ in reviews(20, 0)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return tmp_path / "texts.jsonl"


def features_of(source, max_length=64, too_long="error"):
    return text_features(TASK, source, TOKENIZER, max_length=max_length, too_long=too_long)


def test_so_many_are_asked_hidden_replaced_and_kept_as_in_bert():
    ids = np.full((400, 250), 7, np.int32)
    labels = ids.copy()
    labels[:, :50] = -100
    made = MASKING({"input_ids": ids, "labels": labels}, np.random.default_rng(0))
    asked = made["labels"] != -100
    assert not asked[:, :50].any()
    assert (made["input_ids"][~asked] == 7).all()
    assert (made["labels"][asked] == 7).all()
    found = made["input_ids"][asked]
    hidden, kept = found == MASKING.mask_id, found == 7
    shares = [asked[:, 50:].mean(), hidden.mean(), kept.mean(), (~hidden & ~kept).mean()]
    chance = 0.1 / len(TOKENIZER)  # that any token is this one
    expected = [0.15, 0.8 + chance, 0.1 + chance, 0.1 - 2 * chance]
    np.testing.assert_allclose(shares, expected, atol=0.01)


def test_special_tokens_are_never_asked_for(texts):
    features, _ = features_of(texts)
    for feature in features:
        ids, labels = feature.inputs["input_ids"], feature.targets["labels"]
        special = np.isin(ids, TOKENIZER.all_special_ids)
        assert special.any()
        np.testing.assert_array_equal(labels, np.where(special, -100, ids))


def loader(features, seed=3):
    collate = Collate(rows=8, limit=64, pad=0)
    return training_batches(features, collate, seed=seed, epochs=3, steps=None, draw=MASKING)


def test_each_epoch_asks_for_other_tokens_and_a_resumed_run_for_the_same(texts):
    features, _ = features_of(texts)
    first, again = loader(features), loader(features)
    batches = [next(first) for _ in range(4)]
    state = first.get_state()
    rest = list(first)
    again.set_state(state)
    for batch, resumed in zip(rest, list(again), strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(resumed[name], array)
    assert len(batches) + len(rest) == 9
    asked = [b["labels"] >= 0 for b in (*batches, *rest)]
    assert all(mask.any() for mask in asked)
    assert (batches[2]["labels"][4:] == -100).all()  # the rows that fill an epoch's last batch
    one = loader(features[:8])
    masks = [(b["labels"] >= 0).sum(1).tolist() for b in one]
    assert masks[0] != masks[1] != masks[2]


def test_what_is_measured_on_is_always_the_same(texts):
    features, _ = features_of(texts)
    for left, right in zip(MASKING.once(features), MASKING.once(features), strict=True):
        np.testing.assert_array_equal(left.inputs["input_ids"], right.inputs["input_ids"])
        np.testing.assert_array_equal(left.targets["labels"], right.targets["labels"])


def test_a_long_text_is_named_cut_or_split(texts):
    whole, _ = features_of(texts)
    with pytest.raises(DataError, match=r"tokens, more than the 6 allowed.*'split'"):
        features_of(texts, 6)
    cut, report = features_of(texts, 6, "truncate")
    split, _ = features_of(texts, 6, "split")
    assert len(cut) == len(whole) < len(split)
    assert report.shortened
    tokens = [np.concatenate([f.targets["labels"] for f in fs]) for fs in (whole, split)]
    np.testing.assert_array_equal(*(t[t >= 0] for t in tokens))  # none is lost


def test_a_row_without_text_and_a_tokenizer_without_a_mask_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"sentence": "a"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: masked_lm is read from the column text"):
        features_of(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="no mask token"):
        Masking.of(toy_tokenizer())
