"""Checkpoints of one head, or none, loaded for another; and files as they were written long ago."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.errors import CheckpointError, ConfigError
from jqlora.io import fresh_head, load, save_pretrained
from jqlora.models import abstract_params, family_of
from jqlora.quant import NF4, QTensor
from jqlora.tree import flatten
from tests.io.toy_files import write_tensors

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
BART = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 24,
}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
KINDS = {"bert": CONFIG, "roberta": CONFIG, "deberta-v2": CONFIG, "bart": BART, "t5": T5}
WRITING = ("bart", "t5")
every_kind = pytest.mark.parametrize("kind", KINDS)


def write(folder, kind, task, change=lambda config, tensors: None):
    """A random checkpoint for ``task``, and its tensors; ``change`` may spoil it before."""
    config = {**KINDS[kind], "model_type": kind}
    family = family_of(config)
    model = family.build(family.parse(config), task=task)
    shapes = flatten(abstract_params(model))
    generator, tensors = np.random.default_rng(0), {}
    for item in family.hf_names(model):
        shape = shapes[item.path].shape[0 if item.index is None else 1 :]
        shape = shape[::-1] if item.transpose else shape
        tensors[item.hf] = generator.normal(0, 0.1, shape).astype(np.float32)
    config["architectures"] = [family.architecture(task)]
    change(config, tensors)
    folder.mkdir(exist_ok=True)
    write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def inside(path):
    """Where a leaf is in its base; a T5 that reads has that in a module ``transformer``."""
    return path[1:] if path[0] == "transformer" else path


@every_kind
def test_the_base_is_taken_and_the_new_head_drawn(kind, tmp_path, caplog):
    own = "seq2seq-lm" if kind in WRITING else "masked-lm"
    write(tmp_path / "a", kind, own)
    _, before = load(tmp_path / "a")
    asked = {"task": "sequence-classification", "num_labels": 5}
    with caplog.at_level(logging.WARNING):
        model, params = load(tmp_path / "a", **asked)
    assert model.task == "sequence-classification"
    assert model.config.num_labels == 5
    fresh = fresh_head(tmp_path / "a", **asked)
    assert fresh
    assert all(name in caplog.text for name in fresh)
    before, flat = flatten(before), flatten(params)
    taken = {path for path in flat if inside(path) in before}
    assert len(taken) > len(before) - 8  # all but the head
    for path in taken:
        np.testing.assert_array_equal(flat[path], before[inside(path)])
    drawn = {n.hf for n in family_of({"model_type": kind}).hf_names(model) if n.path not in taken}
    assert drawn == set(fresh)
    again = load(tmp_path / "a", seed=1, **asked)[1]
    same = load(tmp_path / "a", **asked)[1]
    kernels = [path for path in flatten(params) if path not in taken and path[-1] == "kernel"]
    for path in kernels:
        assert (flatten(again)[path] != flatten(params)[path]).any()
        np.testing.assert_array_equal(flatten(same)[path], flatten(params)[path])


def test_what_was_drawn_is_saved_as_a_checkpoint_of_its_own(tmp_path):
    write(tmp_path / "a", "roberta", "masked-lm")
    model, params = load(tmp_path / "a", task="token-classification", num_labels=3)
    save_pretrained(tmp_path / "b", model, params)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architectures"] == ["RobertaForTokenClassification"]
    assert not (tmp_path / "b" / "generation_config.json").exists()
    assert fresh_head(tmp_path / "b") == ()
    again, leaves = load(tmp_path / "b")
    assert again == model
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(leaves)[path], leaf)


def bare(config, tensors):
    """The base alone, without its name in front, as ``BertModel.save_pretrained`` writes it."""
    config["architectures"] = ["BertModel"]
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name.startswith("bert."):
            tensors[name.removeprefix("bert.")] = tensor


def test_a_bare_base_wants_a_task(tmp_path):
    written = write(tmp_path / "a", "bert", "sequence-classification", bare)
    with pytest.raises(CheckpointError, match=r"BertModel.*give task="):
        load(tmp_path / "a")
    model, params = load(tmp_path / "a", task="sequence-classification", quantize=NF4(block=32))
    assert fresh_head(tmp_path / "a", task=model.task) == ("classifier.bias", "classifier.weight")
    pooler = params["bert"]["pooler"]["dense"]["kernel"]
    assert isinstance(pooler, QTensor)
    assert not isinstance(params["classifier"]["kernel"], QTensor)
    np.testing.assert_allclose(pooler.dequantize().T, written["pooler.dense.weight"], atol=0.06)
    # its pooler goes with a head that is not asked for
    assert "pooler" not in load(tmp_path / "a", task="question-answering")[1]["bert"]


def test_a_classifier_of_another_size_is_drawn_anew(tmp_path):
    write(tmp_path / "a", "bert", "sequence-classification")
    assert fresh_head(tmp_path / "a", num_labels=2) == ()
    assert set(fresh_head(tmp_path / "a", num_labels=3)) == {
        "classifier.weight",
        "classifier.bias",
    }
    _, params = load(tmp_path / "a", num_labels=3)
    assert params["classifier"]["kernel"].shape == (32, 3)


def old_names(config, tensors):
    """As the first BERTs were saved: gamma and beta, the head's copies, the positions' buffer,
    and parts of the pretraining head."""
    for name in list(tensors):
        for new, old in (("LayerNorm.weight", "gamma"), ("LayerNorm.bias", "beta")):
            if name.endswith(new):
                tensors[f"{name.rsplit('.', 1)[0]}.{old}"] = tensors.pop(name)
    words = "bert.embeddings.word_embeddings.weight"
    tensors["cls.predictions.decoder.weight"] = tensors[words].copy()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].copy()
    tensors["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)
    tensors["bert.embeddings.position_ids"] = np.arange(24)[None]
    tensors["bert.pooler.dense.weight"] = np.zeros((32, 32), np.float32)


def test_names_of_old_files_are_understood(tmp_path):
    write(tmp_path / "new", "bert", "masked-lm")
    write(tmp_path / "old", "bert", "masked-lm", old_names)
    model, params = load(tmp_path / "old")
    expected, leaves = load(tmp_path / "new")
    assert model == expected
    for path, leaf in flatten(leaves).items():
        np.testing.assert_array_equal(flatten(params)[path], leaf)


def torn(config, tensors):
    tensors["cls.predictions.decoder.weight"] = np.ones((40, 32), np.float32)


def stripped(config, tensors):
    del tensors["cls.predictions.transform.dense.weight"]


def doubled(config, tensors):
    tensors["bert.embeddings.LayerNorm.gamma"] = tensors["bert.embeddings.LayerNorm.weight"]


def foreign(config, tensors):
    tensors["bert.encoder.extra.weight"] = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (torn, {}, r"decoder\.weight' differs from 'bert\.embeddings"),
        (stripped, {}, r"cls\.predictions\.transform\.dense\.weight' is missing"),
        (doubled, {}, r"gamma.*the same tensor"),
        (foreign, {"task": "token-classification"}, r"bert\.encoder\.extra\.weight.*no place"),
    ],
)
def test_all_else_must_fit(change, options, message, tmp_path):
    write(tmp_path / "a", "bert", "masked-lm", change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "a", **options)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("bert", {"task": "causal-lm"}, CheckpointError, r"causal-lm.*bert.*masked-lm"),
        ("bert", {"num_labels": 3}, ConfigError, r"num_labels=3.*masked-lm"),
        ("bart", {"task": "token-classification"}, CheckpointError, r"token-class.*bart.*seq2seq"),
    ],
)
def test_heads_that_there_are_not_are_refused(kind, options, error, message, tmp_path):
    write(tmp_path / "a", kind, "seq2seq-lm" if kind in WRITING else "masked-lm")
    with pytest.raises(error, match=message):
        load(tmp_path / "a", **options)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("bart", "BartForCausalLM"), ("t5", "T5ForMaskedLM"), ("bert", "BertForMultipleChoice")],
)
def test_a_checkpoint_of_a_head_that_is_not_known_is_refused_by_its_name(
    kind, architecture, tmp_path
):
    def rename(config, tensors):
        config["architectures"] = [architecture]

    write(tmp_path / "a", kind, "seq2seq-lm" if kind in WRITING else "masked-lm", rename)
    with pytest.raises(CheckpointError, match=rf"{architecture}.*not supported.*give task="):
        load(tmp_path / "a")


def test_a_classifier_that_reads_to_the_end_needs_one_end_token(tmp_path):
    def forget(config, tensors):
        config["eos_token_id"] = [1, 2]

    write(tmp_path / "a", "bart", "sequence-classification", forget)
    with pytest.raises(CheckpointError, match=r"eos_token_id=\[1, 2\].*one token"):
        load(tmp_path / "a")


def test_a_new_head_has_the_dtype_of_the_rest(tmp_path):
    write(tmp_path / "a", "roberta", "masked-lm")
    _, params = load(tmp_path / "a", task="sequence-classification", dtype="bfloat16")
    assert {leaf.dtype for leaf in flatten(params).values()} == {jnp.dtype(jnp.bfloat16)}
