"""The kernels on a GPU against the definition on the host, which no emulator replaces.

    JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/kernels

Backends that refuse a device (wgmma is sm_90's alone) or that are not installed are skipped with
their reason; a wrong number is not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.errors import ConfigError
from jqlora.quant import FP4, INT8, NF4, quantize, with_layout
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.layouts import BITSANDBYTES, HOPPER
from jqlora_kernels.quantized_matmul import quantized_matmul
from jqlora_kernels.shapes import MODEL_LAYERS, RAGGED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.skipif(
        jax.default_backend() != "gpu", reason="no GPU: JAX_PLATFORMS=cuda,cpu pytest -m gpu"
    ),
]
BUDGET = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}
SPECS = [NF4(double_quant=True), NF4(block=128), FP4(double_quant=True, block=32), INT8()]
LAYERS = {name: s for name, s in MODEL_LAYERS.items() if s[0] * s[1] <= 4096 * 4096}
CASES = [
    *((rows, *LAYERS[name]) for name in ("llama3-8b k/v", "qwen2-0.5b up") for rows in (1, 16)),
    *((rows, 1024, 512) for rows in (3, 64, 200, 1000)),
    *RAGGED,
]


def on_host(function, *operands):
    """``function`` of the same operands on the CPU, as fp32."""
    with jax.default_device(jax.devices("cpu")[0]):
        local = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), operands)
        return jax.tree.map(lambda a: np.asarray(a, np.float32), jax.jit(function)(*local))


def on_device(function, *operands):
    """``function`` on the GPU, or the refusal as the reason for a skip."""
    try:
        return jax.tree.map(lambda a: np.asarray(a, np.float32), jax.jit(function)(*operands))
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))


BACKENDS = [("triton", BITSANDBYTES), ("jax_triton", BITSANDBYTES), ("mosaic", HOPPER)]


def laid_out(q, layout):
    """The operands of ``q`` in a layout, or a skip where it has none such."""
    try:
        return with_layout(q, layout).kernel_operands()
    except ConfigError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize(("backend", "layout"), BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decoding_is_bit_for_bit_the_definitions(backend, layout, name, spec):
    inputs, outputs = LAYERS[name]
    q = quantize(jax.random.normal(jax.random.key(0), (2, inputs, outputs)) / 10, spec)
    columns = inputs if inputs % spec.block == 0 else inputs * outputs

    def decode(operands, **options):
        options |= {"block": spec.block, "columns": columns, "dtype": "bfloat16"}
        return dequantize_blockwise(*operands, jnp.int32(1), **options)

    expected = on_host(lambda o: decode(o, backend="reference"), q.kernel_operands())
    operands = laid_out(q, layout)
    actual = on_device(lambda o: decode(o, backend=backend, layout=layout), operands)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("backend", "layout"), BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_products_and_gradients_agree_with_the_definition(backend, layout, spec, dtype, shape):
    rows, inputs, outputs = shape
    q = quantize(jax.random.normal(jax.random.key(0), (2, inputs, outputs)) / 10, spec)
    x = (jax.random.normal(jax.random.key(1), (rows, inputs)) / 10).astype(dtype)

    def product_and_gradient(x, operands, **options):
        def product(x):
            options_ = {"block": spec.block, "features": outputs} | options
            return quantized_matmul(x, *operands, jnp.int32(1), **options_)

        y, pull = jax.vjp(product, x)
        return y, *pull(y)

    def reference(x, operands):
        return product_and_gradient(x, operands, backend="reference")

    def kernel(x, operands):
        return product_and_gradient(x, operands, backend=backend, layout=layout)

    expected = on_host(reference, x, q.kernel_operands())
    actual = on_device(kernel, x, laid_out(q, layout))
    for e, a in zip(expected, actual, strict=True):
        assert np.abs(a - e).max() <= BUDGET[dtype] * np.abs(e).max()
