"""GPT-2's checkpoints: weights stored (in, out), and the names of older files."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jqlora.attach import init, plan
from jqlora.errors import CheckpointError
from jqlora.io import load
from jqlora.io.merge_files import merge_checkpoint
from jqlora.io.peft import save_adapter
from jqlora.io.quantize_files import quantize_checkpoint
from jqlora.io.save import save_pretrained
from jqlora.merging import merge
from jqlora.methods import LoRA
from jqlora.quant import NF4, QTensor, quantize
from jqlora.tree import flatten
from tests.io.toy_files import tensors_of, write_tensors

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 40,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "torch_dtype": "float32",
}
BASE = "transformer."


def write(folder, tensors):
    folder.mkdir()
    write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def tensors():
    return tensors_of(CONFIG)


@pytest.fixture(scope="module")
def loaded(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "new"
    write(folder, tensors)
    return load(folder)


def test_the_weights_of_conv1d_are_kernels_as_they_are(tensors, loaded):
    _, params = loaded
    block = params["transformer"]["h"]
    assert block["attn"]["c_attn"]["kernel"].shape == (2, 64, 192)
    for layer in range(2):
        stored = tensors[f"transformer.h.{layer}.mlp.c_fc.weight"]
        np.testing.assert_array_equal(block["mlp"]["c_fc"]["kernel"][layer], stored)


def drop_base(tensors):
    return {name.removeprefix(BASE): value for name, value in tensors.items()}


def add_buffers(tensors):
    base = BASE if next(iter(tensors)).startswith(BASE) else ""
    masks = {f"{base}h.{i}.attn.bias": np.tri(16, dtype=np.float32)[None, None] for i in range(2)}
    ends = {f"{base}h.{i}.attn.masked_bias": np.float32([-1e4]) for i in range(2)}
    return {**tensors, **masks, **ends}


def repeat_head(tensors):
    return {**tensors, "lm_head.weight": tensors[f"{BASE}wte.weight"]}


@pytest.mark.parametrize(
    "changes",
    [[drop_base], [add_buffers], [drop_base, add_buffers], [repeat_head]],
    ids=lambda changes: " and ".join(change.__name__ for change in changes),
)
def test_older_files_hold_the_same(changes, tensors, loaded, tmp_path):
    old = tensors
    for change in changes:
        old = change(old)
    write(tmp_path / "old", old)
    _, params = load(tmp_path / "old")
    expected = flatten(loaded[1])
    assert flatten(params).keys() == expected.keys()
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, expected[path])


def test_another_buffer_is_still_refused(tensors, tmp_path):
    write(tmp_path / "odd", {**tensors, "transformer.h.0.attn.rotation": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"h\.0\.attn\.rotation.*no place"):
        load(tmp_path / "odd")


def test_what_is_saved_is_what_was_read(tensors, loaded, tmp_path):
    save_pretrained(tmp_path / "again", *loaded)
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value)


def test_merging_file_by_file_equals_merging_in_memory(loaded, tmp_path):
    save_pretrained(tmp_path / "dense", *loaded)
    base = tmp_path / "base"
    quantize_checkpoint(tmp_path / "dense", base, NF4())
    model, params = load(base)
    ours = plan(model, params, LoRA(rank=2, alpha=4, targets=["c_attn", "mlp.c_proj"]))
    adapters = init(jax.random.key(0), ours)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    save_adapter(tmp_path / "adapter", ours, adapters, model=model)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["fan_in_fan_out"] is True
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    expected = flatten(jax.jit(functools.partial(merge, ours))(params, adapters))
    for path, leaf in flatten(load(tmp_path / "merged")[1]).items():
        expected_leaf = expected[path]
        if isinstance(expected_leaf, QTensor):  # no adapter, so no reason to decode in memory
            expected_leaf = expected_leaf.dequantize()
        np.testing.assert_allclose(leaf, expected_leaf, atol=1e-6)


def test_codes_are_those_of_the_transposed_weight_and_survive_a_file(tensors, tmp_path):
    write(tmp_path / "dense", tensors)
    model, params = load(tmp_path / "dense", quantize=NF4())
    kernel = params["transformer"]["h"]["attn"]["c_proj"]["kernel"]
    expected = quantize(tensors["transformer.h.1.attn.c_proj.weight"], NF4())
    np.testing.assert_array_equal(kernel.codes[1], expected.codes)
    save_pretrained(tmp_path / "codes", model, params)
    _, again = load(tmp_path / "codes")
    kept = again["transformer"]["h"]["attn"]["c_proj"]["kernel"]
    assert kept.matrix_shape == kernel.matrix_shape
    np.testing.assert_array_equal(kept.codes, kernel.codes)
    np.testing.assert_array_equal(kept.scales, kernel.scales)
