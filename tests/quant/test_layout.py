"""Codes in another layout decode to the same bits, and leave in bitsandbytes' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.errors import ConfigError
from jqlora.io import bnb
from jqlora.merging import requantize
from jqlora.quant import (
    FP4,
    INT8,
    NF4,
    params_with_layout,
    quantize,
    quantized_matmul,
    with_layout,
)
from jqlora_kernels.layouts import BITSANDBYTES, HOPPER

SPECS = [NF4(double_quant=True), FP4(block=128), NF4(block=32)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_path_decodes_both_layouts_to_the_same_bits(spec, draw):
    q = quantize(draw((3, 256, 20)), spec)
    packed = with_layout(q, HOPPER)
    assert packed.layout == HOPPER
    assert not np.array_equal(packed.codes, q.codes)
    np.testing.assert_array_equal(packed.dequantize(), q.dequantize())
    x = draw((5, 256))

    def product_and_gradient(q):
        y, pull = jax.vjp(lambda x: quantized_matmul(x, q, jnp.int32(1)), x)
        return y, *pull(y)

    for a, b in zip(product_and_gradient(q), product_and_gradient(packed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_files_get_bitsandbytes_bytes_whatever_the_layout(spec, draw):
    q = quantize(draw((256, 20)), spec)
    parts, expected = (bnb.encode("w", x) for x in (with_layout(q, HOPPER), q))
    assert parts.keys() == expected.keys()
    for name in parts:
        np.testing.assert_array_equal(parts[name], expected[name])


def test_a_tree_is_converted_where_the_shape_allows_and_goes_back(draw):
    params = {
        "wide": {"kernel": quantize(draw((128, 8)), NF4())},
        "odd": {"kernel": quantize(draw((64, 8)), NF4())},
        "norm": {"scale": jnp.ones(3)},
    }
    packed = params_with_layout(params, HOPPER)
    assert packed["wide"]["kernel"].layout == HOPPER
    assert packed["odd"]["kernel"].layout == BITSANDBYTES
    back = params_with_layout(packed, BITSANDBYTES)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_requantizing_keeps_the_layout(draw):
    kernel = draw((128, 8))
    like = {"m": {"kernel": with_layout(quantize(kernel, NF4()), HOPPER)}}
    again, _ = requantize({"m": {"kernel": kernel}}, like)
    jax.tree.map(np.testing.assert_array_equal, again, like)


def test_shapes_alone_can_be_converted():
    shape = jax.ShapeDtypeStruct((128, 8), jnp.float32)
    q = jax.eval_shape(lambda kernel: quantize(kernel, NF4()), shape)
    assert with_layout(q, HOPPER).layout == HOPPER


@pytest.mark.parametrize(
    ("shape", "block", "layout", "said"),
    [
        ((64, 8), 64, HOPPER, "not 64"),
        ((128, 8), 256, HOPPER, "block of 256"),
        ((128, 8), 64, "marlin", "marlin"),
    ],
)
def test_a_matrix_that_cannot_have_the_layout_is_refused(shape, block, layout, said):
    q = quantize(jnp.ones(shape), NF4(block=block))
    with pytest.raises(ConfigError, match=said):
        with_layout(q, layout)


def test_codes_of_eight_bits_move_and_stand_for_the_same_values(draw):
    q = quantize(draw((256, 8)), INT8())
    packed = with_layout(q, HOPPER)
    assert (packed.codes != q.codes).any()
    np.testing.assert_array_equal(packed.dequantize(), q.dequantize())
    jax.tree.map(np.testing.assert_array_equal, with_layout(packed, BITSANDBYTES), q)
