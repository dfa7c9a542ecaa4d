"""The policy for long records, and the report of what it did."""

import numpy as np
import pytest

from jqlora.data import encode, encode_all, parse_record
from jqlora.errors import DataError


def text(length, origin="f:1"):
    """A record of ``length`` tokens: one a byte, and the end."""
    return parse_record({"text": "x" * (length - 1)}, origin)


def pair(prompt, completion, origin):
    return parse_record({"prompt": "p" * prompt, "completion": "c" * completion}, origin)


def test_a_long_record_is_an_error_with_both_lengths(chatml):
    with pytest.raises(DataError, match=r"f:1: the record has 9 tokens, more than the 8 allowed"):
        encode(text(9), chatml, max_length=8)
    with pytest.raises(DataError, match=r"f:2: the record has 9 tokens"):
        encode_all([text(8), text(9, "f:2")], chatml, max_length=8)


def test_a_record_that_just_fits_is_whole(chatml):
    assert len(encode(text(8), chatml, max_length=8)) == 8


def test_truncation_keeps_the_beginning(chatml):
    whole = encode(pair(3, 9, "f:1"), chatml, max_length=None)
    cut = encode(pair(3, 9, "f:1"), chatml, max_length=8, too_long="truncate")
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:8])
    np.testing.assert_array_equal(cut.loss_mask, whole.loss_mask[:8])


@pytest.mark.parametrize("length", [2, 7, 8, 9, 15, 16, 40])
def test_windows_predict_every_token_of_the_whole_once(chatml, length):
    whole = encode(text(length), chatml, max_length=None)
    windows, _ = encode_all([text(length)], chatml, max_length=8, too_long="split")
    assert all(2 <= len(window) <= 8 for window in windows)
    predicted = np.concatenate([window.input_ids[window.loss_mask] for window in windows])
    np.testing.assert_array_equal(predicted, whole.input_ids[whole.loss_mask])


def test_the_report_names_what_was_cut_and_what_was_dropped(chatml):
    records = [pair(2, 2, "f:1"), pair(9, 2, "f:2"), pair(2, 9, "f:3")]
    examples, report = encode_all(records, chatml, max_length=8, too_long="truncate")
    assert [example.origin for example in examples] == ["f:1", "f:3"]
    assert (report.shortened, report.without_target) == (("f:2", "f:3"), ("f:2",))
    assert (report.records, report.examples, report.longest) == (3, 2, 8)
    assert (report.tokens, report.targets) == (5 + 8, 3 + 6)
    said = "; ".join(report.lines())
    assert "2 cut to fit: f:2, f:3" in said
    assert "1 left out, having nothing to learn: f:2" in said


def test_a_conversation_without_an_answer_is_reported(chatml):
    question = parse_record({"messages": [{"role": "user", "content": "Q"}]}, "f:2")
    _, report = encode_all([pair(1, 1, "f:1"), question], chatml, max_length=None)
    assert report.without_target == ("f:2",)


def test_records_with_nothing_to_learn_at_all_are_an_error(chatml):
    with pytest.raises(DataError, match="none of the 1 records has a token to learn"):
        encode_all([pair(9, 2, "f:2")], chatml, max_length=8, too_long="truncate")


def test_a_length_that_leaves_nothing_to_predict_is_an_error(chatml):
    with pytest.raises(DataError, match="a maximal length of 1 leaves no token"):
        encode(text(4), chatml, max_length=1, too_long="truncate")
