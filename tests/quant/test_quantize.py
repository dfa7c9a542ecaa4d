"""Quantization against its own definition: nearest levels, packed two to a byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqlora.errors import ConfigError
from jqlora.quant import FP4, INT8, NF4, GroupInt, dynamic_map, empty, quantize, quantize_rows
from jqlora_kernels.packing import pack, unpack
from jqlora_kernels.quantize_blockwise import quantize_scales
from tests.draws import draws

# one program each, where every operation by itself would be compiled for every shape
packed, unpacked = jax.jit(pack), jax.jit(unpack)
decoded = jax.jit(lambda q: q.dequantize_rows())


@given(st.lists(st.integers(0, 15), max_size=40).filter(lambda codes: len(codes) % 2 == 0))
@settings(deadline=None, max_examples=30)
def test_packed_nibbles_unpack_to_what_they_were(codes):
    nibbles = packed(np.asarray(codes, np.uint8))
    assert nibbles.shape == (len(codes) // 2,)
    np.testing.assert_array_equal(np.asarray(nibbles) >> 4, codes[::2])
    np.testing.assert_array_equal(unpacked(nibbles), codes)


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([32, 64]), st.booleans())
@settings(deadline=None, max_examples=12)
def test_decoding_and_quantizing_again_gives_the_same_codes(rows, columns, block, nested):
    weight = draws(rows * columns)((rows, columns))
    spec = NF4(block=block, double_quant=nested)
    once = quantize_rows(weight, spec)
    again = quantize_rows(decoded(once), spec)
    np.testing.assert_array_equal(once.codes, again.codes)


@pytest.mark.parametrize("spec", [NF4(), FP4(), NF4(block=128), INT8()])
def test_every_weight_becomes_the_nearest_level_of_its_block(spec, draw):
    weight = draw((8, 128))
    q = quantize_rows(weight, spec)
    scales = np.repeat(np.asarray(q.scales), spec.block, axis=1)
    choices = scales[..., None] * q.codebook
    best = np.abs(choices - np.asarray(weight)[..., None]).min(-1)
    error = np.abs(np.asarray(decoded(q)) - np.asarray(weight))
    np.testing.assert_allclose(error, best, atol=1e-6)


@pytest.mark.parametrize("spec", [NF4(), FP4(), NF4(double_quant=True), INT8()])
@pytest.mark.parametrize("columns", [64, 100])
def test_a_block_of_zeros_decodes_to_zeros(spec, columns):
    weight = np.zeros((3, columns), np.float32)
    weight[0] = 0.5
    values = np.asarray(decoded(quantize_rows(jnp.asarray(weight), spec)))
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[2], 0 * values[2])
    if not spec.double_quant:
        np.testing.assert_array_equal(values[2], 0)
        np.testing.assert_array_equal(values[0], 0.5)


def test_second_level_codes_are_the_nearest_entries_of_the_dynamic_map(getkey):
    scales = jax.random.uniform(getkey(), (600,))
    codes, absmax, offset = quantize_scales(scales, jnp.asarray(dynamic_map()))
    assert codes.dtype == jnp.uint8
    assert absmax.shape == (3,)
    per_value = np.repeat(np.asarray(absmax), 256)[:600]
    distance = np.abs(
        dynamic_map() * per_value[:, None] - (np.asarray(scales) - float(offset))[:, None]
    )
    chosen = distance[np.arange(600), np.asarray(codes)]
    np.testing.assert_allclose(chosen, distance.min(-1), atol=1e-7)


def test_each_matrix_of_a_stack_is_quantized_by_itself(draw):
    kernels = draw((2, 3, 64, 20))
    stack = jax.tree.map(np.asarray, quantize(kernels, NF4(double_quant=True)))
    for i in range(2):
        for j in range(3):
            one = quantize(kernels[i, j], NF4(double_quant=True))
            leaves = zip(jax.tree.leaves(stack), jax.tree.leaves(one), strict=True)
            for many, single in leaves:
                np.testing.assert_array_equal(many[i, j], single)


def test_a_stack_filled_layer_by_layer_equals_one_quantized_whole(draw):
    kernels = draw((3, 64, 20), dtype=jnp.bfloat16)
    spec = NF4(double_quant=True)
    stack = empty((64, 20), (3,), spec, jnp.bfloat16)
    for i in range(3):
        item = quantize(kernels[i], spec)
        stack = jax.tree.map(lambda s, t, i=i: s.at[i].set(t), stack, item)
    whole = quantize(kernels, spec)
    assert jax.tree.structure(stack) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(stack), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_block_of_another_size_is_refused_with_the_sizes_there_are():
    with pytest.raises(ConfigError, match=r"block=48.*32, 64"):
        NF4(block=48)


def test_integers_vectors_and_foreign_specs_are_refused():
    with pytest.raises(TypeError, match="int32"):
        quantize(jnp.ones((64, 64), jnp.int32), NF4())
    with pytest.raises(ValueError, match="matrix"):
        quantize_rows(jnp.ones(64), NF4())
    with pytest.raises(ConfigError, match="NF4, FP4, INT8"):
        quantize(jnp.ones((64, 64)), "nf4")  # pyright: ignore


def test_codes_that_come_out_of_a_calibration_are_not_made_here():
    with pytest.raises(ConfigError, match=r"cannot quantize to GroupInt.*instance of NF4, FP4"):
        quantize(jnp.ones((64, 32)), GroupInt(format="awq"))
