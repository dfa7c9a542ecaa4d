"""What a finished run leaves behind."""

import json
import re

import numpy as np
import pytest

from jqlora.config import read_config
from jqlora.train.metrics import read_metrics
from tests.toy_checkpoint import GENERAL, PROMPT
from tests.train.compilations import STEP


def test_a_run_directory_holds_what_it_promises(finished):
    promised = {
        "config.yaml", "metrics.jsonl", "before_after.json", "summary.json", "report.html",
        "adapter", "checkpoints", "plots", ".lock",
    }  # fmt: skip
    assert {path.name for path in finished.iterdir()} == promised
    assert {path.name for path in (finished / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {path.name for path in (finished / "plots").iterdir()} == {
        "loss.png",
        "learning_rate.png",
        "grad_norm.png",
        "throughput.png",
    }
    for plot in (finished / "plots").iterdir():
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_step_is_compiled_once(toy, finished):
    """By a thread, as the base is loaded: the loop compiles no other."""
    assert (toy / "compiled.log").read_text().count(STEP) == 1


def test_the_written_config_is_resolved_and_absolute(finished, toy):
    config = read_config([finished / "config.yaml"])
    assert config.output.directory == str(finished)
    assert config.model.source == str(toy / "model")
    assert (config.train.optimizer, config.train.schedule) == ("adamw", "cosine")
    assert config.method.init == "kaiming"
    assert "schedule: cosine" in (finished / "config.yaml").read_text()


def test_the_summary_has_the_promised_numbers(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for kind in ("heldout", "general"):
        for when in ("before", "after"):
            found = summary[kind][when]
            np.testing.assert_allclose(found["perplexity"], np.exp(found["loss"]), rtol=1e-6)
    assert summary["heldout"]["after"]["loss"] < summary["heldout"]["before"]["loss"]
    assert summary["general_answers"]["asked"] == GENERAL
    assert 4.0 < summary["bits_per_quantized_parameter"] < 4.2
    assert summary["adapter_bytes"] >= 4 * summary["trainable_parameters"]
    for name in ("tokens_per_second", "train_seconds", "peak_host_bytes", "trainable_parameters"):
        assert summary[name] > 0, name
    assert {"jax", "flax", "jqlora", "python"} <= summary["versions"].keys()


def test_the_log_has_all_steps_and_the_evaluations_before_and_after(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    steps = read_config([finished / "config.yaml"]).train.steps
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, steps + 1))
    for kind in ("heldout", "general"):
        assert [row["step"] for row in rows if row["kind"] == kind] == [0, steps]


def test_the_report_stands_alone_and_says_what_it_must(finished):
    report = (finished / "report.html").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    measured = json.loads((finished / "before_after.json").read_text())
    assert not re.search(r'(src|href)="(?!data:)', report)
    assert report.count("data:image/png;base64,") == 4
    for when in ("before", "after"):
        assert f"{summary['heldout'][when]['loss']:.4f}" in report
        assert len(measured[when]["answers"]) == 1
    assert PROMPT in report
    assert "peak memory" in report
    assert "save_every" in report  # the config
    assert "General knowledge" in report


def test_the_report_escapes_what_models_and_users_write(finished, tmp_path):
    import shutil

    from jqlora.train.directory import RunDirectory
    from jqlora.train.report import write_report

    run = RunDirectory(shutil.copytree(finished, tmp_path / "run"))
    measured = run.read_before_after()
    measured["after"]["answers"][0]["answer"] = "<script>alert(1)</script>"
    run.before_after.write_text(json.dumps(measured))
    write_report(run, json.loads(run.summary.read_text()))
    assert "<script>" not in run.report.read_text()


@pytest.mark.parity
def test_peft_reads_the_adapter_of_a_run(finished):
    peft = pytest.importorskip("peft")
    config = peft.PeftConfig.from_pretrained(str(finished / "adapter"))
    assert (config.r, config.lora_alpha) == (4, 8)
