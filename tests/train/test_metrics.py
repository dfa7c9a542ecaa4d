"""metrics.jsonl: whole rows only, and none from after the checkpoint."""

import pytest

from jqlora.train.metrics import MetricsLog, read_metrics


def written(path, steps, through=None):
    log = MetricsLog(path, through=through)
    for step in steps:
        log.write({"step": step, "kind": "train", "loss": step / 2})
    log.close()
    return path.read_text()


def test_rows_come_back_as_they_were_written(tmp_path):
    written(tmp_path / "m.jsonl", [1, 2])
    assert read_metrics(tmp_path / "m.jsonl") == [
        {"step": 1, "kind": "train", "loss": 0.5},
        {"step": 2, "kind": "train", "loss": 1.0},
    ]


def test_a_rewound_and_continued_log_equals_an_uninterrupted_one(tmp_path):
    whole = written(tmp_path / "whole.jsonl", [1, 2, 3, 4, 5])
    cut = tmp_path / "cut.jsonl"
    written(cut, [1, 2, 3])
    with open(cut, "a") as file:
        file.write('{"step": 4, "kind": "tr')  # the kill
    assert written(cut, [3, 4, 5], through=2) == whole


def test_a_new_run_starts_an_empty_log(tmp_path):
    written(tmp_path / "m.jsonl", [1, 2])
    assert written(tmp_path / "m.jsonl", []) == ""


def test_rows_are_in_the_file_as_soon_as_they_are_written(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1, "kind": "train"})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "kind": "train"}]
    log.close()


def test_a_number_that_json_does_not_know_is_refused(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        log.write({"step": 1, "loss": float("nan")})
    log.close()
