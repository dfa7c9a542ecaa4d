"""A checkpoint becomes parameters, or one sentence that says which file and tensor is wrong."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jqlora import tree
from jqlora.errors import CheckpointError, ConfigError
from jqlora.io import abstract_params, describe, load
from jqlora.models import loop_to_scan
from jqlora.quant import FP4, NF4, QTensor, is_qtensor, quantize_rows
from tests.io.toy_files import Q, leaf_of, write_checkpoint

pytestmark = pytest.mark.usefixtures("compile_quickly")


def shapes(params):
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), params)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [("float32", 10**9), ("bfloat16", 10**9), ("float16", 10**9), ("float32", 60_000)],
)
def test_every_tensor_arrives_with_its_bits_in_the_checkpoints_own_dtype(tmp_path, dtype, limit):
    tensors = write_checkpoint(tmp_path, dtype=jnp.dtype(dtype), max_shard_bytes=limit)
    model, params = load(tmp_path)
    assert jnp.dtype(model.dtype) == jnp.dtype(model.param_dtype) == jnp.dtype(dtype)
    assert model.config.dtype == dtype
    for name, array in tensors.items():
        np.testing.assert_array_equal(leaf_of(params, name), array)
        assert leaf_of(params, name).dtype == jnp.dtype(dtype)


def test_the_dtype_asked_for_rounds_as_numpy_does(tmp_path):
    tensors = write_checkpoint(tmp_path)
    model, params = load(tmp_path, dtype="bfloat16")
    assert model.dtype == jnp.bfloat16
    for name, array in tensors.items():
        np.testing.assert_array_equal(leaf_of(params, name), array.astype(ml_dtypes.bfloat16))


def test_a_config_that_names_no_dtype_leaves_that_of_the_matrices(tmp_path):
    write_checkpoint(tmp_path, lambda config, _: config.pop("torch_dtype"), dtype=jnp.bfloat16)
    assert load(tmp_path)[0].dtype == jnp.bfloat16


def test_double_precision_is_rounded_to_single(tmp_path):
    def widen(config, tensors):
        tensors[Q] = tensors[Q].astype(np.float64)

    tensors = write_checkpoint(tmp_path, widen)
    _, params = load(tmp_path)
    np.testing.assert_array_equal(leaf_of(params, Q), tensors[Q].astype(np.float32))


@pytest.mark.parametrize("spec", [None, NF4(double_quant=True)])
def test_the_looped_form_holds_the_same_as_the_scanned_one(tmp_path, spec):
    write_checkpoint(tmp_path)
    _, scanned = load(tmp_path, quantize=spec)
    model, looped = load(tmp_path, quantize=spec, scan=False)
    assert not model.scan
    equal(scanned["model"], loop_to_scan(looped["model"]))


@pytest.mark.parametrize("spec", [NF4(), NF4(double_quant=True), FP4(block=128)])
def test_quantized_leaves_are_those_of_each_matrix_after_rounding_to_the_dtype(tmp_path, spec):
    tensors = write_checkpoint(tmp_path)
    _, params = load(tmp_path, quantize=spec, dtype="bfloat16")
    stack = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    expected = quantize_rows(jnp.asarray(tensors[Q]).astype(jnp.bfloat16), spec)
    equal(jax.tree.map(lambda leaf: leaf[1], stack), expected)
    assert stack.dtype == jnp.bfloat16


def test_every_dense_kernel_is_quantized_but_the_skipped_ones(tmp_path):
    write_checkpoint(tmp_path)
    for skip, dense in (
        (("lm_head",), {"lm_head"}),
        (("o_proj", "mlp"), {"o_proj", "mlp"}),
        ((), ()),
    ):
        _, params = load(tmp_path, quantize=NF4(), skip=skip)
        for path, leaf in tree.flatten(params).items():
            quantized = path[-1] == "kernel" and not set(dense) & set(path)
            assert is_qtensor(leaf) == quantized, path


@pytest.mark.parametrize(
    ("spec", "scan"), [(None, True), (NF4(), False), (NF4(double_quant=True), True)]
)
def test_shapes_are_known_before_anything_is_allocated(tmp_path, spec, scan):
    write_checkpoint(tmp_path)
    model, params = load(tmp_path, quantize=spec, scan=scan)
    described, abstract = describe(tmp_path, quantize=spec, scan=scan)
    assert described == model
    assert shapes(abstract) == shapes(params)
    assert shapes(abstract_params(model, spec)) == shapes(params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))


def test_progress_is_told_of_every_tensor(tmp_path):
    tensors = write_checkpoint(tmp_path)
    seen = []
    load(tmp_path, progress=lambda done, total, name: seen.append((done, total, name)))
    assert [done for done, _, _ in seen] == list(range(1, len(tensors) + 1))
    assert {total for _, total, _ in seen} == {len(tensors)}
    assert {name for _, _, name in seen} == set(tensors)


def test_what_old_files_repeat_is_not_extra(tmp_path):
    def old(config, tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    write_checkpoint(tmp_path, old, tie_word_embeddings=True)
    _, params = load(tmp_path)
    assert set(params) == {"model"}


def spoil(**changes):
    """A change to config (upper level keys) for the table below."""
    return lambda config, tensors: config.update(changes)


def reshape(config, tensors):
    tensors[Q] = tensors[Q].reshape(32, 128)


def differing_head(config, tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    config["tie_word_embeddings"] = True


def misnamed(config, tensors):
    tensors[Q.replace("q_proj", "query")] = tensors.pop(Q)


MISFITS = {
    "missing": (lambda c, t: t.pop(Q), rf"tensor '{Q}' is missing"),
    "misnamed": (misnamed, r"q_proj\.weight' is missing; it has '.*query\.weight' instead"),
    "extra": (lambda c, t: t.update(x=np.ones(2)), r"model\.safetensors: tensor 'x' has no place"),
    "shape": (reshape, r"'.*q_proj\.weight' has the shape \[32, 128\], the config .* \[64, 64\]"),
    "deeper config": (spoil(num_hidden_layers=3), r"'model\.layers\.2\..*' is missing"),
    "shallower config": (spoil(num_hidden_layers=1), r"'model\.layers\.1\..*' has no place"),
    "other head": (differing_head, r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"),
    "unknown architecture": (spoil(model_type="mamba"), r"config\.json.*mamba.*known: llama"),
    "other task": (spoil(architectures=["LlamaForSequenceClassification"]), "SequenceClass"),
    "config of no sense": (spoil(num_attention_heads="four"), r"config\.json.*num_attention_heads"),
    **{
        method: (
            spoil(quantization_config={"quant_method": method}),
            f"quantized by '{method}'; bitsandbytes 4-bit .* GPTQ and AWQ can be loaded",
        )
        for method in ("hqq", "eetq")
    },
    "gptq of 3 bits": (
        spoil(quantization_config={"quant_method": "gptq", "bits": 3}),
        "is gptq of bits=3; accepted: 4 or 8",
    ),
    "gptq for marlin": (
        spoil(quantization_config={"quant_method": "gptq", "bits": 4, "format": "marlin"}),
        "is gptq in the format 'marlin'; accepted: gptq, gptq_v2",
    ),
    "awq for vectors": (
        spoil(quantization_config={"quant_method": "awq", "bits": 4, "version": "GEMV"}),
        "is awq in the format 'gemv'; accepted: gemm",
    ),
    "groups of no size": (
        spoil(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 12}),
        "has group_size=12; accepted: -1 or multiples of 8",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_one_sentence_naming_it(tmp_path, kind):
    change, message = MISFITS[kind]
    write_checkpoint(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object")]
)
def test_a_broken_config_is_named(tmp_path, content, message):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json " + message):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "float64", "half precision"])
def test_a_dtype_that_models_do_not_have_is_an_error_listing_those_they_have(tmp_path, dtype):
    write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="is not one of float32, bfloat16, float16"):
        load(tmp_path, dtype=dtype)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    write_checkpoint(
        tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    with pytest.raises(ConfigError, match=r"already quantized .*without quantize=NF4"):
        load(tmp_path, quantize=NF4())
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]


def test_qtensors_keep_their_kind_in_the_tree(tmp_path):
    write_checkpoint(tmp_path)
    _, params = load(tmp_path, quantize=NF4())
    leaves = [leaf for leaf in tree.flatten(params).values() if isinstance(leaf, QTensor)]
    assert {leaf.lead for leaf in leaves} == {(2,)}
    assert {leaf.scheme for leaf in leaves} == {"nf4"}
