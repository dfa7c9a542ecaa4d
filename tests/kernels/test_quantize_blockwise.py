"""Quantization to 8-bit codes with any table, as raw arrays; 4-bit codes are held to bitsandbytes'
bytes elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.quant import dynamic_map
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.quantize_blockwise import quantize_blockwise
from tests.draws import draws

TABLES = {
    "dynamic": dynamic_map(),
    "unsigned": np.linspace(0, 1, 256, dtype=np.float32) ** 3,
    "linear": np.linspace(-1, 1, 255, dtype=np.float32),
}


def decoded(codes, scales, table, count, **options):
    options = {"block": 256, "columns": count, "dtype": "float32"} | options
    return dequantize_blockwise(codes[None], scales[None], table, **options)[0]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("count", [1, 256, 600])
def test_every_value_takes_the_code_of_the_nearest_entry(name, count):
    table = TABLES[name]
    values = np.asarray(draws(count)((count,)))
    values = np.abs(values) if name == "unsigned" else values
    codes, scales = quantize_blockwise(jnp.asarray(values), jnp.asarray(table), block=256)
    assert codes.dtype == jnp.uint8
    assert codes.shape == (count,)
    assert scales.shape == (-(-count // 256),)
    per_value = np.repeat(np.asarray(scales), 256)[:count]
    distance = np.abs(table * per_value[:, None] - values[:, None])
    chosen = distance[np.arange(count), np.asarray(codes)]
    np.testing.assert_allclose(chosen, distance.min(-1), atol=1e-7)


def test_decoding_and_quantizing_again_gives_the_same_codes():
    table = jnp.asarray(dynamic_map())
    values = draws(0)((700,)) * 1e-12
    codes, scales = quantize_blockwise(values, table, block=256)
    again, _ = quantize_blockwise(decoded(codes, scales, table, 700), table, block=256)
    np.testing.assert_array_equal(codes, again)


def test_a_block_of_zeros_comes_back_as_zeros():
    table = jnp.asarray(dynamic_map())
    codes, scales = quantize_blockwise(jnp.zeros(300).at[:256].set(1.0), table, block=256)
    values = decoded(codes, scales, table, 300)
    np.testing.assert_array_equal(values[:256], 1)
    np.testing.assert_array_equal(values[256:], 0)


def test_more_levels_than_a_byte_can_tell_are_refused():
    with pytest.raises(ValueError, match="257"):
        quantize_blockwise(jnp.ones(8), jnp.arange(257.0), block=256)
