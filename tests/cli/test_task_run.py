"""Runs on tasks, from files in their published layouts to scores, an adapter and a report."""

import json
import os
import re
import signal

import numpy as np
import pytest

from jqlora.cli import main
from jqlora.config import read_config
from jqlora.data import Loader
from jqlora.run import head, plan_run, resume, train
from jqlora.train.metrics import WALL_CLOCK, read_metrics
from tests.toy_checkpoint import write_model
from tests.toy_encoder import (
    BAD,
    GOOD,
    reviews,
    write_encoder,
    write_squad,
    write_sst2,
    write_t5,
)

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_programs")

CONFIG = """
model: {{source: {folder}/model, remat: none}}
method: {{rank: 8, alpha: 8}}
data: {{task: sst2, train: {folder}/train.tsv, validation: {folder}/dev.tsv, length: 16}}
train: {{steps: 120, batch_size: 16, lr: 1.0e-2, warmup: 8, eval_every: 60, save_every: 0}}
output: {{directory: {folder}/run}}
"""
SILENT = {"say": lambda text: None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_encoder(folder / "model")
    write_sst2(folder / "train.tsv", 256, seed=0)
    write_sst2(folder / "dev.tsv", 75, seed=1)
    write_squad(folder / "squad.json", 8)
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A finished run of the config."""
    assert main(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


def rows(run):
    found = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in found]


def test_lora_and_a_fresh_head_learn_a_small_task(run):
    summary = json.loads((run / "summary.json").read_text())
    before, after = (summary["validation"][when] for when in ("before", "after"))
    assert after["tokens"] == 75
    assert after["loss"] < before["loss"]
    assert after["metrics"]["accuracy"] > 0.9 > 2 / 3  # the share of the larger class
    trained = [row["loss"] for row in rows(run) if row["kind"] == "train"]
    assert np.mean(trained[-10:]) < 0.5 * np.mean(trained[:10])


def test_scores_are_logged_while_training_drawn_and_reported(run):
    scored = [row for row in rows(run) if row["kind"] == "validation"]
    assert [row["step"] for row in scored] == [0, 60, 120]
    assert all(set(row["metrics"]) == {"accuracy"} for row in scored)
    assert (run / "plots" / "scores.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "Scores before and after" in page
    assert "perplexity" not in page.split("<h2>The run</h2>")[0]
    assert f"{scored[-1]['metrics']['accuracy']:.4f}" in page
    assert "jqlora eval" in page


def stop_at(number, monkeypatch):
    """A signal to this process when it asks for so many batches."""
    fetch, count = Loader.__next__, 0

    def stopping(self):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(self)

    monkeypatch.setattr(Loader, "__next__", stopping)


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(run, folder, tmp_path, monkeypatch):
    config = read_config([folder / "config.yaml"], [f"output.directory={tmp_path}/run"])
    stop_at(30, monkeypatch)
    assert train(config, **SILENT).signal == "SIGTERM"
    assert resume(tmp_path / "run", **SILENT).signal is None
    assert rows(tmp_path / "run") == rows(run)
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (run / file).read_bytes()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_the_adapter_with_its_head_and_predicts_alike(run, folder):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from jqlora.tasks import TASKS
    from jqlora.tasks.labelled import read_labelled
    from jqlora.tasks.metrics import accuracy

    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    assert model.peft_type == "LORA"
    records, _ = read_labelled(TASKS["sst2"], folder / "dev.tsv")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    inputs = tokenizer([r.texts[0] for r in records], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(-1).numpy()
    found = accuracy(np.asarray([r.label for r in records]), predicted)
    summary = json.loads((run / "summary.json").read_text())
    assert found == summary["validation"]["after"]["metrics"]["accuracy"]


def test_eval_gives_the_scores_of_the_summary(run, folder, tmp_path, capsys):
    words = ["eval", str(folder / "model"), "--adapter", str(run / "adapter"), "--task", "sst2"]
    words += ["--data", str(folder / "dev.tsv"), "--length", "16", "--batch-size", "16"]
    assert main([*words, "--json", str(tmp_path / "scores.json")]) == 0
    expected = json.loads((run / "summary.json").read_text())["validation"]["after"]
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["metrics"] == expected["metrics"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    accuracy, _, labels = capsys.readouterr().out.splitlines()
    assert accuracy == f"accuracy {expected['metrics']['accuracy']:.4f}"
    assert labels == "labels 75"


def test_a_model_without_the_head_is_not_scored(folder, complain):
    words = ["eval", folder / "model", "--data", folder / "dev.tsv"]
    assert "name an --adapter" in complain(*words, "--task", "sst2")
    assert "name its task by --task" in complain(*words)
    assert "nearest: sst2" in complain(*words, "--task", "sst")


def config_of(folder, *words):
    return read_config([folder / "config.yaml"], list(words))


def test_the_head_is_planned_whole_and_kept_from_quantization(folder):
    sizes = plan_run(config_of(folder, "model.quantize={}"))
    whole = [leaf.template for leaf in sizes.plan.full]
    assert {name.split(".")[-1] for name in whole} == {"classifier", "dense"}
    assert {name.split(".")[0] for name in whole if "pooler" not in name} == {"classifier"}
    # the pooler, which the masked-LM checkpoint lacks, is neither adapted nor stored as codes
    assert not any("pooler" in site.template for site in sizes.plan.sites)
    assert sizes.base.quantized_params == 4 * 32 * 32 + 2 * 32 * 48


def test_questions_of_several_windows_are_trained_on_and_scored(folder):
    squad = folder / "squad.json"
    data = f"data={{task: squad_v2, train: {squad}, validation: {{own: {squad}}}, length: 16}}"
    words = ["data.stride=4", "data.too_long=split", "train.steps=2", "train.warmup=0"]
    words += ["method.rank=2", "model.quantize={}"]
    config = folder / "squad.yaml"
    config.write_text((folder / "config.yaml").read_text().replace("task: sst2, ", ""))
    base = [line for line in config.read_text().splitlines() if not line.startswith("data")]
    config.write_text("\n".join(base))
    place = f"output.directory={folder}/squad"
    outcome = train(read_config([config], [data, *words, place, "train.eval_every=0"]), **SILENT)
    assert outcome.summary is not None
    scores = outcome.summary["validation_own"]["after"]["metrics"]
    names = {"exact_match", "f1"}
    kinds = ("", "answerable_", "unanswerable_")
    assert set(scores) == {kind + name for kind in kinds for name in names}
    saved = json.loads((folder / "squad" / "adapter" / "adapter_config.json").read_text())
    assert saved["task_type"] == "QUESTION_ANS"
    assert saved["modules_to_save"] == ["qa_outputs"]


def test_an_encoder_decoder_learns_to_write_and_is_scored_by_rouge(folder, tmp_path, capsys):
    write_t5(folder / "t5")
    rows = [{"document": f"the film was {word}.", "summary": word} for word in (*GOOD, *BAD)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = folder / "rows.jsonl"
    data = f"data={{task: summarization, train: {source}, validation: {source}, length: 16}}"
    config = folder / "t5.yaml"
    lines = (folder / "config.yaml").read_text().splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith("data")))
    words = [f"model.source={folder}/t5", "data.target_length=4", "method.targets=all-linear"]
    words += ["train.steps=60", "train.batch_size=8", "train.eval_every=0", "train.lr=3e-2"]
    outcome = train(
        read_config([config], [data, *words, f"output.directory={folder}/t5run"]), **SILENT
    )
    assert outcome.summary is not None
    before, after = (outcome.summary["validation"][when] for when in ("before", "after"))
    assert after["loss"] < before["loss"]
    assert after["metrics"]["rouge1"] > before["metrics"]["rouge1"] + 50

    run = ["eval", str(folder / "t5"), "--adapter", str(folder / "t5run" / "adapter")]
    run += ["--task", "summarization", "--data", str(source), "--max-new-tokens", "4"]
    assert main([*run, "--json", str(tmp_path / "rouge.json")]) == 0
    assert json.loads((tmp_path / "rouge.json").read_text())["metrics"] == after["metrics"]
    assert capsys.readouterr().out.startswith("rouge1 ")


def test_a_causal_model_learns_to_write_after_a_prompt(folder):
    write_model(folder / "llama")
    rows = [{"document": f"it was {word}.", "summary": word} for word in (*GOOD, *BAD)]
    source = folder / "causal.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.train={source}", f"data.validation={source}", "data.target_length=8"]
    words = ["data.task=summarization", *data, "data.length=32", "method.targets=all-linear"]
    words += [f"model.source={folder}/llama", "train.steps=40", "train.batch_size=8"]
    words += ["train.eval_every=0", "train.lr=3e-2", f"output.directory={folder}/causal"]
    outcome = train(config_of(folder, *words), **SILENT)
    assert outcome.summary is not None
    before, after = (outcome.summary["validation"][when] for when in ("before", "after"))
    assert after["loss"] < before["loss"]
    assert after["metrics"]["rouge1"] > before["metrics"]["rouge1"] + 50


def write_tags(path):
    """Sentences whose words are tagged as persons where they are good and as places where bad."""
    rows = []
    for text, _ in reviews(40, 0):
        tags = [3 * (word in GOOD) + 5 * (word in BAD) for word in text.split()]
        rows.append({"text": text, "tokens": text.split(), "ner_tags": tags})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.train={path}", f"data.validation={path}", "train.steps=9", "train.warmup=0"]
    return [*data, "train.eval_every=0", "train.batch_size=8"]


def test_tags_of_words_are_learnt_and_scored(folder, tmp_path):
    words = ["data.task=conll2003", *write_tags(tmp_path / "rows.jsonl")]
    outcome = train(config_of(folder, *words, f"output.directory={tmp_path}/run"), **SILENT)
    assert outcome.summary is not None
    before, after = (outcome.summary["validation"][when] for when in ("before", "after"))
    assert after["loss"] < before["loss"]
    assert list(after["metrics"]) == ["precision", "recall", "f1", "accuracy"]
    run = ["eval", folder / "model", "--adapter", tmp_path / "run" / "adapter", "--length", "16"]
    run += ["--task", "conll2003", "--data", tmp_path / "rows.jsonl", "--batch-size", "8"]
    assert main([*map(str, run), "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["metrics"] == after["metrics"]


def test_masked_texts_are_learnt_and_a_resumed_run_masks_the_same(folder, tmp_path, monkeypatch):
    words = ["data.task=masked_lm", *write_tags(tmp_path / "rows.jsonl")]
    whole, halved = (tmp_path / name for name in ("whole", "halved"))
    outcome = train(config_of(folder, *words, f"output.directory={whole}"), **SILENT)
    assert outcome.summary is not None
    before, after = (outcome.summary["validation"][when] for when in ("before", "after"))
    assert after["perplexity"] < before["perplexity"]
    stop_at(4, monkeypatch)
    assert train(config_of(folder, *words, f"output.directory={halved}"), **SILENT).signal
    assert resume(halved, **SILENT).signal is None
    file = "adapter/adapter_model.safetensors"
    assert (halved / file).read_bytes() == (whole / file).read_bytes()


def test_a_masked_head_that_is_not_there_is_not_drawn(folder, monkeypatch, complain):
    monkeypatch.setattr(head, "fresh_head", lambda *args, **kwargs: ("cls.predictions.bias",))
    words = ["data.task=masked_lm", f"output.directory={folder}/headless"]
    line = complain("train", folder / "config.yaml", *words)
    assert "no masked-LM head (cls.predictions.bias" in line


def test_a_text_without_the_token_at_which_its_class_is_read_is_named(folder, complain):
    write_t5(folder / "endless")
    file = folder / "endless" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 9}))
    words = [f"model.source={folder}/endless", f"output.directory={folder}/endless_run"]
    line = complain("train", folder / "config.yaml", *words)
    assert re.search(r"train\.tsv:2: the tokenizer ends the text in no token 9", line), line


MISTAKES = {
    "an unknown task": (["data.task=sst"], "data.task='sst' is not a task; nearest:"),
    "one only measured": (["data.task=mmlu"], "only measured"),
    "another head": (["model.task=question-answering"], "needs 'sequence-classification'"),
    "another number of labels": (["model.num_labels=3"], "has 2"),
    "unknown labels": (["data.task=classification"], "model.num_labels or data.labels"),
    "text's settings": (["data.general=x.jsonl"], "data.general is for text"),
    "questions": (["sample.prompts=[why?]"], "sample.prompts"),
    "tags without names": (["data.task=token_classification"], "num_labels or data.labels"),
    "packing": (["data.packing=true"], "data.packing=true"),
    "windows of labels": (["data.too_long=split"], "'error' or 'truncate'"),
    "text for an encoder": (["data.task=null", "data.validation=null"], "name a data.task"),
    "validation without a task": (["data.task=null"], "data.validation needs data.task"),
    "long rows": (["data.length=8"], "tokens, more than the 8 allowed"),
    "more positions than there are": (["data.length=65"], "exceeds the 64 positions"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(words, expected, folder, tmp_path, complain):
    line = complain("train", folder / "config.yaml", f"output.directory={tmp_path}/run", *words)
    assert re.search(re.escape(expected), line), line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
