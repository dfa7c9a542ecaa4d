"""Every kernel against its definition, interpreted on a CPU.

Decoding must agree bit for bit. Products may differ by the order of summation, and by one rounding
of the result.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.quant import FP4, INT8, NF4, quantize
from jqlora.quant.spec import BLOCKS
from jqlora_kernels import tuning
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.quantized_matmul import quantized_matmul
from jqlora_kernels.shapes import FLAT, MODEL_LAYERS, RAGGED
from tests.draws import draws
from tests.storages import STORAGES, stored

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
quickly = pytest.mark.usefixtures("compile_quickly")  # where no bit is compared
BUDGET = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}
SPECS = [kind(double_quant=nested) for kind in (NF4, FP4, INT8) for nested in (False, True)]
KINDS = [SPECS[2 * i + (i + j) % 2] for i in range(3) for j in range(3)]
"""Every scheme three times, for three dtypes, its scales plain and nested in turn."""
TILED = [*zip((32, 128, 256, 4096), (3, 17) * 2, (NF4, INT8) * 2, strict=True)]
"""Blocks below, at and above every tile's width; decoding tries all of them."""
# Interpreting a kernel copies whole operands at every step: the widest layers take minutes each.
LAYERS = {name: shape for name, shape in MODEL_LAYERS.items() if shape[0] * shape[1] <= 2**19}


def layer(inputs, outputs, spec, dtype, *lead):
    """(kernel operands, static options of decoding) of a random matrix, seeded by its shape."""
    q = quantize(draws(inputs * outputs)((*lead, inputs, outputs), 1 / 10), spec)
    columns = inputs if inputs % spec.block == 0 else inputs * outputs
    return q.kernel_operands(), {"block": spec.block, "columns": columns, "dtype": dtype}


def both(function, *operands, **static):
    """What the definition and the interpreted kernel make of the same operands."""
    return [
        jax.jit(lambda *o, name=name: function(*o, **static, backend=name))(*operands)
        for name in ("reference", "triton_interpret")
    ]


def assert_decodes_alike(operands, static, index=None):
    expected, actual = both(dequantize_blockwise, *operands, index, **static)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def assert_multiplies_alike(x, operands, block, features, index=None):
    def product_and_gradient(x, *operands, backend):
        def product(x):
            return quantized_matmul(
                x, *operands, index, block=block, features=features, backend=backend
            )

        y, pull = jax.vjp(product, x)
        return y, *pull(jnp.cos(y))

    for expected, actual in zip(*both(product_and_gradient, x, *operands), strict=True):
        assert actual.dtype == expected.dtype
        expected, actual = (np.asarray(a, np.float32) for a in (expected, actual))
        limit = BUDGET[x.dtype.name] * max(np.abs(expected).max(), 1)
        assert np.abs(actual - expected).max() <= limit


def rows_of(count, inputs, dtype):
    return draws(count)((count, inputs), 1 / 10, dtype=dtype)


@pytest.mark.parametrize(("spec", "dtype"), [*zip(SPECS, itertools.cycle(BUDGET))])
def test_decoding_agrees_bit_for_bit_in_every_dtype(spec, dtype):
    assert_decodes_alike(*layer(192, 20, spec, dtype))


@pytest.mark.parametrize("storage", ["gptq", "llm.int8"])
def test_codes_that_come_with_checkpoints_agree(storage):
    q = stored(draws(0)((256, 20), 1 / 10), STORAGES[storage])
    static = {"block": q.block, "columns": 256, "dtype": "float32"}
    assert_decodes_alike(q.kernel_operands(), static)
    assert_multiplies_alike(rows_of(3, 256, "float32"), q.kernel_operands(), q.block, 20)


@pytest.mark.parametrize("block", BLOCKS)
def test_decoding_agrees_for_every_block(block):
    assert_decodes_alike(*layer(4096, 3, NF4(block=block, double_quant=True), "bfloat16"))


@pytest.mark.parametrize(("_", "inputs", "outputs"), FLAT)
def test_decoding_agrees_where_blocks_cross_rows(_, inputs, outputs):
    assert_decodes_alike(*layer(inputs, outputs, NF4(double_quant=True), "float32"))


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_agrees_for_layers_of_real_models(name):
    assert_decodes_alike(*layer(*LAYERS[name], NF4(double_quant=True), "bfloat16"))


def test_decoding_agrees_for_stacks_and_for_one_of_a_stack():
    operands, static = layer(128, 20, NF4(double_quant=True), "float32", 3)
    assert_decodes_alike(operands, static)
    assert_decodes_alike(operands, static, jnp.int32(2))


@quickly
@pytest.mark.parametrize(
    ("shape", "spec", "dtype"), [*zip(RAGGED, itertools.cycle(SPECS), itertools.cycle(BUDGET))]
)
def test_products_agree_for_ragged_shapes(shape, spec, dtype):
    rows, inputs, outputs = shape
    operands, _ = layer(inputs, outputs, spec, dtype)
    assert_multiplies_alike(rows_of(rows, inputs, dtype), operands, spec.block, outputs)


@quickly
@pytest.mark.parametrize(("spec", "dtype"), [*zip(KINDS, itertools.cycle(BUDGET))])
def test_products_agree_in_every_dtype(spec, dtype):
    operands, _ = layer(192, 70, spec, dtype)
    assert_multiplies_alike(rows_of(5, 192, dtype), operands, 64, 70)


@quickly
@pytest.mark.parametrize(("block", "count", "kind"), TILED)
def test_products_agree_for_blocks_of_every_width(block, count, kind):
    inputs = max(block, 256)
    operands, _ = layer(inputs, 20, kind(block=block, double_quant=True), "float32")
    assert_multiplies_alike(rows_of(count, inputs, "float32"), operands, block, 20)


@quickly
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(("inputs", "spec"), [(192, NF4(double_quant=True)), (96, INT8(block=32))])
def test_few_rows_agree_with_and_without_tensor_cores(count, inputs, spec, monkeypatch):
    operands, _ = layer(inputs, 6, spec, "bfloat16")
    for vector_rows in (0, 16):
        limits = tuning.Tuning(vector_rows, 256, 256, measured=False)
        monkeypatch.setattr(tuning, "here", lambda limits=limits: limits)
        x = rows_of(count, inputs, "bfloat16")
        assert_multiplies_alike(x, operands, spec.block, 6)


@quickly
def test_products_agree_for_one_matrix_of_a_stack():
    operands, _ = layer(128, 70, NF4(double_quant=True), "float32", 3)
    assert_multiplies_alike(rows_of(5, 128, "float32"), operands, 64, 70, jnp.int32(1))


@quickly
def test_many_rows_are_multiplied_by_the_matrix_decoded_once():
    operands, _ = layer(64, 20, NF4(double_quant=True), "float32")
    x = rows_of(tuning.here().fused_rows + 1, 64, "float32")
    assert_multiplies_alike(x, operands, 64, 20)


def test_what_the_kernels_cannot_do_they_refuse_with_the_limit():
    operands, static = layer(100, 12, NF4(), "float32")
    x = rows_of(3, 100, "float32")
    with pytest.raises(NotImplementedError, match="K=100"):
        quantized_matmul(x, *operands, block=64, features=12, backend="triton")
    with pytest.raises(NotImplementedError, match="int16"):
        dequantize_blockwise(*operands, **static | {"dtype": "int16"}, backend="triton")
