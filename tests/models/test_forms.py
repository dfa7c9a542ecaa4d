"""One model in several forms: scanned or looped, with or without remat, grafted upon."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.errors import ConfigError
from jqlora.models import (
    abstract_params,
    family_for,
    family_of,
    loop_to_scan,
    scan_to_loop,
)
from jqlora.tree import flatten, unflatten
from tests.models.variants import ROWS, TINY

pytestmark = pytest.mark.usefixtures("compile_quickly")

every_variant = pytest.mark.parametrize("name", ROWS)
# biases with an output matrix; tied embeddings with windows in some layers only
FORMS = ["llama_biases_gelu", "qwen2_layer_types", "gpt2_scaled_by_layer"]
some_variants = pytest.mark.parametrize("name", FORMS)
IDS = np.random.default_rng(0).integers(3, 60, (2, 9)).astype(np.int32)


def build(name: str, **options):
    row = TINY | ROWS[name]
    return family_of(row).build(family_of(row).parse(row), **options)


def init(model):
    """Parameters that are nowhere zero, drawn by numpy: JAX would compile a program for each."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        center = 1.0 if path[-1] == "scale" else 0.0
        return jnp.asarray(generator.normal(center, 0.15, leaf.shape).astype(leaf.dtype))

    abstract = flatten(abstract_params(model))
    return unflatten({path: draw(path, leaf) for path, leaf in abstract.items()})


@functools.cache
def applied(model, **static):
    return jax.jit(
        lambda params, ids, cache: model.apply({"params": params}, ids, cache=cache, **static)
    )


def run(model, params, ids, cache=None, **static):
    return applied(model, **static)(params, jnp.asarray(ids), cache)


@functools.cache
def compiled(model):
    """Loss with its gradients, and the hidden states beside: one program for each form."""

    def loss(params):
        out = model.apply({"params": params}, jnp.asarray(IDS), output_hidden_states=True)
        return jnp.sum(jnp.square(out.logits)), out.hidden_states

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_close(ours, theirs, limit=1e-5):
    for path, leaf in flatten(theirs).items():
        difference = np.abs(np.asarray(flatten(ours)[path]) - np.asarray(leaf)).max()
        assert difference <= limit * max(np.abs(leaf).max(), 1e-30), path


@some_variants
def test_scanned_and_looped_layers_agree_in_values_and_gradients(name):
    scanned, looped = build(name), build(name, scan=False)
    params = init(scanned)
    (value, hidden), grads = compiled(scanned)(params)
    (loop_value, loop_hidden), loop_grads = compiled(looped)(scan_to_loop(params))
    np.testing.assert_allclose(loop_value, value, rtol=1e-5)
    np.testing.assert_allclose(loop_hidden, hidden, atol=1e-5)
    assert_close(loop_to_scan(loop_grads), grads)


@pytest.mark.parametrize(
    ("remat", "scan", "dtype"),
    [
        ("full", True, jnp.float32),
        ("full", False, jnp.float32),
        ("full", True, jnp.bfloat16),
        ("dots", True, jnp.float32),
        ("offload", True, jnp.float32),
        ("offload", False, jnp.float32),
    ],
)
def test_remat_changes_neither_values_nor_gradients(remat, scan, dtype):
    plain = build("qwen2_layer_types", scan=scan, dtype=dtype, param_dtype=dtype)
    params = init(plain)
    (value, _), grads = compiled(plain)(params)
    (remat_value, _), remat_grads = compiled(plain.clone(remat=remat))(params)
    # recomputation may be fused anew: one rounding of the dtype
    limit = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(float(remat_value), float(value), rtol=limit)
    as_float = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)  # noqa: E731
    assert_close(as_float(remat_grads), as_float(grads), limit=10 * limit)


def test_remat_keeps_less_for_the_backward_pass():
    plain = build("llama2_mha")
    params = init(plain)

    def temporary_bytes(model):
        def loss(params):
            ids = jnp.zeros((8, 64), jnp.int32)
            return jnp.sum(jnp.square(model.apply({"params": params}, ids).logits))

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = (temporary_bytes(plain.clone(remat=r)) for r in ("none", "dots", "full"))
    assert full < dots < none


def test_the_last_logits_alone_are_those_of_all():
    model = build("llama2_mha")
    params = init(model)
    last = run(model, params, IDS, logits_to_keep=2).logits
    np.testing.assert_allclose(last, run(model, params, IDS).logits[:, -2:], rtol=1e-5, atol=1e-6)


@some_variants
def test_cached_decoding_agrees_in_the_looped_form(name):
    scanned, looped = build(name), build(name, scan=False)
    params = init(scanned)
    logits = []
    for model, tree in ((scanned, params), (looped, scan_to_loop(params))):
        cache = run(model, tree, IDS[:, :4], model.init_cache(2, 12)).cache
        logits.append(run(model, tree, IDS[:, 4:8], cache).logits)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_leaves_grafted_beside_kernels_are_ignored_and_sliced():
    model = build("llama_biases_gelu")
    params = init(model)
    plain = run(model, params, IDS).logits
    flat = flatten(params)
    for path, leaf in list(flat.items()):
        if path[-1] == "kernel" and "layers" in path:
            flat[(*path[:-1], "grafted")] = jnp.arange(leaf.shape[0])
    grafted = run(model, unflatten(flat), IDS).logits
    np.testing.assert_array_equal(grafted, plain)


@every_variant
@pytest.mark.parametrize("scan", [True, False])
def test_the_names_of_a_checkpoint_fill_every_parameter_once(name, scan):
    model = build(name, scan=scan, param_dtype=jnp.bfloat16)
    abstract = flatten(abstract_params(model))
    assert {leaf.dtype for leaf in abstract.values()} == {jnp.dtype(jnp.bfloat16)}
    names = family_for(model).hf_names(model)
    filled = {(n.path, n.index) for n in names}
    assert len(filled) == len(names) == len({n.hf for n in names})
    depth = model.config.num_hidden_layers
    expected = {
        (path, i)
        for path in abstract
        for i in (range(depth) if scan and {"layers", "h"} & set(path) else [None])
    }
    assert filled == expected


def test_the_jitted_model_is_traced_once_for_one_shape():
    model = build("mistral_window")
    params, traces = init(model), []

    @jax.jit
    def apply(params, ids, mask):
        traces.append(None)
        return model.apply({"params": params}, ids, attention_mask=mask).logits

    for seed in range(3):
        apply(params, jnp.asarray(IDS), jnp.asarray(IDS % (seed + 2) > 0))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "named"), [({"remat": "some"}, "remat='some'"), ({"attention": "flash"}, "'flash'")]
)
def test_unknown_options_name_the_accepted_ones(options, named):
    with pytest.raises(ConfigError, match=named + ".*accepted"):
        init(build("llama2_mha", **options))


def test_segments_with_a_cache_need_positions():
    model = build("llama2_mha")
    params, ids = init(model), jnp.asarray(IDS)
    with pytest.raises(ValueError, match="explicit positions"):
        model.apply({"params": params}, ids, segment_ids=ids, cache=model.init_cache(2, 9))


def test_layers_with_gaps_cannot_be_stacked():
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        loop_to_scan({"model": {"layers_0": {"a": jnp.ones(1)}, "layers_2": {"a": jnp.ones(1)}}})
