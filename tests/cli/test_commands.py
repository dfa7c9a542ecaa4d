"""The commands: their help, their results, and one line for every mistake."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jqlora
from jqlora.cli import COMMANDS, main

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_programs")


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_explains_itself_with_examples(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"] if name else ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert (f"jqlora {name}" if name else "train") in text
    assert name is None or "examples:" in text


def test_help_and_version_do_not_wait_for_jax():
    code = (
        "import sys, jqlora.cli\n"
        "try: jqlora.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'jax', 'flax', 'orbax', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "COMMAND" in done.stdout
    assert time.perf_counter() - begin < 10  # under a second when nothing else runs


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"jqlora {jqlora.__version__}"


def test_plan_prints_the_table_and_allocates_nothing(toy, capsys):
    before = len(jax.live_arrays())
    assert main(["plan", str(toy / "config.yaml")]) == 0
    assert len(jax.live_arrays()) <= before
    out = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in out
    assert "8,192 of 90,944 parameters" in out
    assert "optimizer" in out
    assert "kernels    reference" in out
    assert not (toy / "planned").exists()


def test_plan_follows_overrides(toy, capsys):
    main(["plan", str(toy / "config.yaml"), "method.targets=[q_proj]", "method.rank=2"])
    out = capsys.readouterr().out
    assert "512 of" in out
    assert "k_proj" not in out


def test_eval_gives_the_loss_of_the_summary(finished, toy, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    words = ["eval", str(toy / "model"), "--quantize", "nf4-dq", "--length", "64"]
    words += ["--data", str(toy / "heldout.jsonl")]
    for adapter, when in (([], "before"), (["--adapter", str(finished / "adapter")], "after")):
        assert main([*words, *adapter]) == 0
        found = float(capsys.readouterr().out.split()[1])
        np.testing.assert_allclose(found, summary["heldout"][when]["loss"], rtol=1e-4)


def test_eval_of_documents_and_choices_prints_and_writes_numbers(toy, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("one two three. " * 10)
    words = ["eval", str(toy / "model"), "--json", str(tmp_path / "found.json")]
    documents = ["--task", "perplexity", "--data", str(tmp_path / "notes.txt"), "--length", "64"]
    assert main([*words, *documents, "--stride", "16"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens"] == 149  # a token a byte, and nothing predicts the first
    bits = found["loss"] * found["tokens"] / np.log(2) / 150
    np.testing.assert_allclose(found["bits_per_byte"], bits)
    assert f"perplexity {found['perplexity']:.3f}" in capsys.readouterr().out

    for name in ("dev", "test"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / f"sums_{name}.csv"
        file.write_text("".join(f"{n}+1?,{n},{n + 1},B\n" for n in range(6)))
    data = ["--task", "mmlu", "--data", str(tmp_path / "test")]
    shots = ["--shots-data", str(tmp_path / "dev")]
    assert main([*words, *data, *shots, "--form", "answers", "--length", "200"]) == 0
    assert "accuracy_per_character" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["subjects"]["sums"]["questions"] == found["questions"] == 6

    (tmp_path / "long.jsonl").write_text('{"text": "one two", "summary": "one"}\n' * 2)
    texts = ["--task", "summarization", "--data", str(tmp_path / "long.jsonl")]
    assert main([*words, *texts, "--max-new-tokens", "4", "--length", "32"]) == 0
    assert "texts 2" in capsys.readouterr().out
    assert 0 <= found["metrics"]["accuracy"] <= 1


def test_eval_of_choices_without_enough_shots_is_one_line(toy, tmp_path, complain):
    (tmp_path / "sums_test.csv").write_text("1+1?,1,2,B\n")
    words = ["eval", toy / "model", "--task", "mmlu", "--data", tmp_path / "sums_test.csv"]
    assert "'sums' has 0 of 5" in complain(*words)
    assert "more than 16 tokens" in complain(*words, "--shots", 0, "--length", 16)


def test_generate_streams_what_the_report_shows(finished, toy, capsys):
    measured = json.loads((finished / "before_after.json").read_text())
    answer = measured["after"]["answers"][0]
    words = ["generate", str(toy / "model"), "--quantize", "nf4-dq", "--max-new-tokens", "4"]
    words += ["--adapter", str(finished / "adapter"), "--prompt", answer["prompt"]]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == answer["answer"]


def test_generate_continues_plain_text(toy, capsys):
    words = ["generate", str(toy / "model"), "--plain", "--prompt", "once", "--temperature", "1"]
    assert main([*words, "--max-new-tokens", "4", "--seed", "3"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_quantize_writes_what_eval_reads_alike(toy, tmp_path, capsys):
    assert main(["quantize", str(toy / "model"), str(tmp_path / "nf4"), "--scheme", "nf4-dq"]) == 0
    tail = ["--data", str(toy / "heldout.jsonl"), "--length", "64"]
    capsys.readouterr()
    main(["eval", str(tmp_path / "nf4"), *tail])
    stored = capsys.readouterr().out
    main(["eval", str(toy / "model"), "--quantize", "nf4-dq", *tail])
    assert capsys.readouterr().out == stored


def test_merge_writes_a_model_with_the_adapter_inside(finished, toy, tmp_path, capsys):
    adapter = ["--adapter", str(finished / "adapter")]
    assert main(["merge", str(toy / "model"), *adapter, str(tmp_path / "merged")]) == 0
    tail = ["--data", str(toy / "heldout.jsonl"), "--length", "64"]
    capsys.readouterr()
    main(["eval", str(tmp_path / "merged"), *tail])
    merged = float(capsys.readouterr().out.split()[1])
    main(["eval", str(toy / "model"), *adapter, *tail])
    np.testing.assert_allclose(float(capsys.readouterr().out.split()[1]), merged, rtol=1e-4)


def test_a_second_run_in_the_same_place_is_refused_with_the_ways_out(finished, toy, complain):
    line = complain("train", toy / "config.yaml")
    assert "jqlora resume" in line
    assert "output.overwrite=true" in line
    assert (finished / "summary.json").exists()


def test_a_complete_run_is_not_resumed(finished, complain):
    assert "complete" in complain("resume", finished)


def test_overwriting_needs_a_valid_config_first(finished, toy, complain):
    before = (finished / "summary.json").read_text()
    complain("train", toy / "config.yaml", "output.overwrite=true", "data.train=nowhere.jsonl")
    assert (finished / "summary.json").read_text() == before


MISTAKES = {
    "unknown key": (["train.lrr=1"], "train.lr"),
    "wrong type": (["train.lr=fast"], "valid number"),
    "no such data": (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "no such model": (["model.source=./nowhere"], "nowhere"),
    "no site": (["method.targets=[q_prj]"], "q_proj"),
    "rank too large": (["method.rank=100"], "rank 100"),
    "rows longer than the model": (["data.length=512"], "256 positions"),
    "record longer than a row": (["data.length=16"], "train.jsonl:1"),
    "warm-up longer than the epochs": (
        ["train.steps=null", "train.epochs=1", "train.warmup=50"],
        "train.warmup=50",
    ),
    "dtype": (["model.dtype=int8"], "model.dtype='int8'"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_leaves_no_results(words, expected, toy, tmp_path, complain):
    place = tmp_path / "fresh"
    line = complain("train", toy / "config.yaml", f"output.directory={place}", *words)
    assert expected in line
    assert not (place / "metrics.jsonl").exists()


def test_a_directory_in_which_nothing_began_can_be_used_again(toy, tmp_path, complain):
    words = ["train", toy / "config.yaml", f"output.directory={tmp_path}/fresh"]
    complain(*words, "data.train=nowhere.jsonl")
    assert "nowhere" in complain(*words, "data.train=nowhere.jsonl")


def test_an_empty_data_set_is_named(toy, tmp_path, complain):
    (tmp_path / "empty.jsonl").write_text("")
    words = [f"output.directory={tmp_path}/run", f"data.train={tmp_path}/empty.jsonl"]
    assert "empty.jsonl" in complain("train", toy / "config.yaml", *words)


def test_places_that_cannot_be_written_are_one_line(toy, tmp_path, complain):
    (tmp_path / "file").write_text("")
    config = toy / "config.yaml"
    assert "cannot write" in complain("train", config, f"output.directory={tmp_path}/file/run")
    assert "is a file" in complain("train", config, f"output.directory={tmp_path}/file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert "thesis.txt" in complain("train", config, f"output.directory={tmp_path}/mine")


def test_resuming_nothing_says_how_to_start(tmp_path, complain):
    assert "jqlora train" in complain("resume", tmp_path)


def test_a_config_is_needed(complain):
    assert "no config file" in complain("train", "train.lr=1")


def test_an_unknown_option_is_argparse_and_status_two(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "model", "--promt", "x"])
    assert stop.value.code == 2
    assert "--prompt" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(monkeypatch, toy):
    import jqlora.run.sizes

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(jqlora.run.sizes, "describe_model", broken)
    with pytest.raises(ZeroDivisionError):
        main(["plan", str(toy / "config.yaml")])
