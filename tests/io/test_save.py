"""Saving writes what loading reads, wholly or not at all."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.errors import CheckpointError, ConfigError, SaveError
from jqlora.io import atomic, load, quantize_checkpoint, save_pretrained
from jqlora.io.readers import open_directory
from jqlora.quant import FP4, INT8, NF4
from tests.io.toy_files import Q, write_checkpoint
from tests.toy_checkpoint import toy_tokenizer

pytestmark = pytest.mark.usefixtures("compile_quickly")


def tensors_in(folder):
    reader = open_directory(folder)
    return {name: reader.read(name) for name in reader.names()}


def same_files(a, b):
    """Every tensor has the same bits in both directories."""
    first, second = tensors_in(a), tensors_in(b)
    assert set(first) == set(second)
    for name, array in first.items():
        assert array.dtype == second[name].dtype, name
        assert array.shape == second[name].shape, name
        assert array.tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [("float32", 10**9), ("bfloat16", 10**9), ("float16", 10**9), ("float32", 60_000)],
)
def test_a_model_loaded_and_saved_has_the_same_bits(tmp_path, dtype, limit):
    write_checkpoint(tmp_path / "a", dtype=jnp.dtype(dtype))
    model, params = load(tmp_path / "a")
    save_pretrained(tmp_path / "b", model, params, max_shard_bytes=limit)
    same_files(tmp_path / "a", tmp_path / "b")
    files = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors*"))
    assert (len(files) > 2) == (limit < 10**9)
    assert load(tmp_path / "b")[0] == model


@pytest.mark.parametrize("scan", [True, False])
def test_quantized_leaves_keep_every_byte_through_files(tmp_path, scan):
    write_checkpoint(tmp_path / "a")
    model, params = load(tmp_path / "a", quantize=NF4(double_quant=True), scan=scan)
    save_pretrained(tmp_path / "b", model, params)
    again, reloaded = load(tmp_path / "b", scan=scan)
    assert again == model
    assert jax.tree.structure(reloaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
    save_pretrained(tmp_path / "c", again, reloaded)
    same_files(tmp_path / "b", tmp_path / "c")


@pytest.mark.parametrize("spec", [NF4(), FP4(double_quant=True)])
def test_quantizing_files_writes_what_loading_and_saving_would(tmp_path, spec):
    write_checkpoint(tmp_path / "a", torch_dtype="bfloat16")
    (tmp_path / "a" / "generation_config.json").write_text('{"temperature": 0.7}')
    toy_tokenizer().save_pretrained(tmp_path / "a")
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", spec, max_shard_bytes=40_000)
    model, params = load(tmp_path / "a", quantize=spec)
    save_pretrained(tmp_path / "c", model, params)
    same_files(tmp_path / "b", tmp_path / "c")
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in "bc"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert (tmp_path / "b" / "generation_config.json").read_text() == '{"temperature": 0.7}'
    assert (tmp_path / "b" / "tokenizer.json").exists()


def test_a_group_stays_in_one_shard(tmp_path):
    write_checkpoint(tmp_path / "a")
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", NF4(), max_shard_bytes=10_000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    files = {file for name, file in index["weight_map"].items() if name.startswith(Q)}
    assert len(files) == 1
    assert len(set(index["weight_map"].values())) > 3


def test_the_config_names_what_is_not_quantized(tmp_path):
    write_checkpoint(tmp_path / "a", tie_word_embeddings=True)
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", NF4(), skip=("lm_head", "o_proj"))
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    kept = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert config["llm_int8_skip_modules"] == [*kept, "lm_head"]


def test_a_tokenizer_and_generation_config_come_along(tmp_path):
    write_checkpoint(tmp_path / "a")
    model, params = load(tmp_path / "a")
    save_pretrained(tmp_path / "b", model, params, tokenizer=toy_tokenizer())
    names = {p.name for p in (tmp_path / "b").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_params_of_another_model_are_refused(tmp_path):
    write_checkpoint(tmp_path / "a")
    model, params = load(tmp_path / "a")
    cases = [
        ({"model": params["model"]}, r"lack the leaf lm_head\.kernel"),
        ({**params, "extra": {"bias": jnp.zeros(2)}}, r"the model has not: extra\.bias"),
        ({**params, "lm_head": {"kernel": jnp.zeros((2, 2))}}, r"lm_head\.kernel has the shape"),
    ]
    for wrong, message in cases:
        with pytest.raises(CheckpointError, match=message):
            save_pretrained(tmp_path / "b", model, wrong)
    assert not (tmp_path / "b").exists()


def test_an_interrupted_save_leaves_the_earlier_model(tmp_path):
    write_checkpoint(tmp_path / "a")
    model, params = load(tmp_path / "a")
    save_pretrained(tmp_path / "b", model, params)

    def interrupt(done, total, name):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path / "b", model, params, progress=interrupt)
    same_files(tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_model(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a")
    model, params = load(tmp_path / "a")
    save_pretrained(tmp_path / "b", model, params)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(SaveError, match=r"cannot write .*/b/config\.json: No space left"):
        save_pretrained(tmp_path / "b", model, params)
    same_files(tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_quantizing_refuses_what_makes_no_sense(tmp_path):
    write_checkpoint(tmp_path / "a")
    with pytest.raises(ConfigError, match="is where the model is"):
        quantize_checkpoint(tmp_path / "a", tmp_path / "a", NF4())
    with pytest.raises(ConfigError, match="leaves no matrix to quantize"):
        quantize_checkpoint(tmp_path / "a", tmp_path / "b", NF4(), skip=("model", "lm_head"))
    with pytest.raises(CheckpointError, match=r"int8 .*memory alone.*nf4 or fp4"):
        quantize_checkpoint(tmp_path / "a", tmp_path / "b", INT8())
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", NF4())
    with pytest.raises(ConfigError, match="already quantized"):
        quantize_checkpoint(tmp_path / "b", tmp_path / "c", NF4())
    assert not (tmp_path / "c").exists()
