"""Merging from files to files gives what merging in memory does, quantized sources included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.attach import init, plan
from jqlora.errors import ConfigError, MergeError
from jqlora.io import load
from jqlora.io.merge_files import merge_checkpoint
from jqlora.io.peft import save_adapter
from jqlora.io.save import save_pretrained
from jqlora.merging import merge
from jqlora.methods import LoRA
from jqlora.quant import NF4, QTensor, quantize_params
from jqlora.tree import flatten
from tests import toy_models

pytestmark = pytest.mark.usefixtures("compile_quickly")


def write(folder, spec, *, storage=None, tied=False):
    """A checkpoint and an adapter on it; returns what is needed to merge them in memory."""
    model = toy_models.llama(tied=tied)
    params = toy_models.params_of(model)
    if storage is not None:
        params = quantize_params(params, storage)
    save_pretrained(folder / "model", model, params)
    ours = plan(model, params, spec)
    shapes = jax.eval_shape(lambda p: init(jax.random.key(0), ours, p), params)
    generator = np.random.default_rng(2)
    adapters = jax.tree.map(
        lambda s: jnp.asarray(generator.normal(0, 0.1, s.shape), jnp.float32), shapes
    )
    save_adapter(folder / "adapter", ours, adapters, model=model)
    return ours, params, adapters


@pytest.mark.parametrize("storage", [None, NF4(double_quant=True)], ids=["dense", "nf4"])
def test_files_merge_to_what_memory_does(storage, tmp_path):
    spec = LoRA(rank=2, exclude=["layers.0.mlp.up_proj"], modules_to_save=["norm", "lm_head"])
    ours, params, adapters = write(tmp_path, spec, storage=storage)
    merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 10
    _, found = load(tmp_path / "out")
    expected = flatten(jax.jit(functools.partial(merge, ours))(params, adapters))
    for path, leaf in flatten(found).items():
        assert not isinstance(leaf, QTensor)
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-6, err_msg=str(path))


def test_nothing_is_written_where_merging_is_impossible(tmp_path):
    write(tmp_path, LoRA(rank=2, targets=["embed_tokens"]), tied=True)
    with pytest.raises(MergeError, match="tied"):
        merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_an_input_is_never_overwritten(name, tmp_path):
    write(tmp_path, LoRA(rank=2))
    with pytest.raises(ConfigError, match="write the merged model elsewhere"):
        merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / name)
