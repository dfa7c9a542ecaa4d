"""The kernels in Triton's own language: interpreted on a CPU, and compiled for an absent GPU.

``jax_triton`` can be imported only beside JAX's CUDA plugin, Triton itself anywhere on Linux.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jqlora.quant import INT8, NF4, quantize
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.quantized_matmul import quantized_matmul

# Triton reads the variable when it is imported, and its interpreter works on torch's arrays.
INTERPRETED = """
import jax, jax.numpy as jnp, numpy as np, torch
from jqlora.quant import INT8, NF4, quantize
from jqlora_kernels import triton_language as T
from jqlora_kernels.dequantize_blockwise import reference as D
from jqlora_kernels.quantized_matmul import reference as R
from tests.draws import draws

def array(a):
    return torch.from_numpy(np.array(a))

for spec in (NF4(double_quant=True), INT8(block=32)):
    inputs, outputs, rows, layer = 64, 20, 5, jnp.int32(1)
    parts = 1 if isinstance(spec, INT8) else 2
    kernel = draws(0)((2, inputs, outputs))
    operands = quantize(kernel, spec).kernel_operands()
    codes, scales, codebook, nested = operands
    levels = nested or (codebook, codebook, codebook)
    flat = [array(a) for a in (layer.reshape(1), codes.reshape(2, -1), scales.reshape(2, -1))]
    flat += [array(a) for a in (codebook, *levels)]
    options = {"NESTED": nested is not None, "GROUPS": levels[0].shape[-1] if nested else 1}
    options |= {"GROUP": 256, "BLOCK": spec.block, "BLOCKS": flat[2].shape[1], "PARTS": parts}

    count, octets = inputs * outputs, flat[1].shape[1]
    values = torch.zeros(1, count)
    grid = (1, -(-octets // 512))
    T.decode_tile[grid](*flat, values, BYTES=octets, COUNT=count, TILE=512, **options)
    static = {"block": spec.block, "columns": inputs, "dtype": "float32"}
    expected = D.dequantize_blockwise(*operands, layer, **static)
    np.testing.assert_array_equal(values.numpy()[0], np.asarray(expected).ravel())

    options |= {"COUNT": rows, "N": outputs, "WIDTH": inputs // parts, "ROWS": 64, "FEATURES": 64}
    options["BYTES"] = bytes_ = min(spec.block // parts, 32)
    for name, tile, wide, narrow, tiles in (
        ("quantized_matmul", T.forward_tile, inputs, outputs, 1),
        ("transposed", T.transposed_tile, outputs, inputs, inputs // parts // bytes_),
    ):
        x = np.random.default_rng(0).standard_normal((rows, wide)).astype(np.float32)
        y = torch.zeros(rows, narrow)
        tile[(1, tiles)](array(x), *flat, y, **options)
        expected = getattr(R, name)(x, *operands, layer, block=spec.block, features=narrow)
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)
print("agree")
"""


def test_the_interpreted_kernels_agree_with_the_definition():
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "agree", done.stderr


@pytest.mark.parametrize("rows", [4, 1000])
def test_products_and_gradients_compile_for_an_absent_gpu(rows, cuda_text):
    module = pytest.importorskip("jqlora_kernels.quantized_matmul.jax_triton", exc_type=ImportError)
    shape = jax.ShapeDtypeStruct((3, 1024, 96), jnp.float32)
    q = jax.eval_shape(lambda kernel: quantize(kernel, NF4(double_quant=True)), shape)
    operands = jax.eval_shape(lambda q: q.kernel_operands(), q)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    for name, wide, narrow in (("quantized_matmul", 1024, 96), ("transposed", 96, 1024)):

        def product(x, operands, index, name=name, narrow=narrow):
            options = {"block": 64, "features": narrow, "compute_capability": 90}
            return getattr(module, name)(x, *operands, index, **options)

        x = jax.ShapeDtypeStruct((rows, wide), jnp.bfloat16)
        text = cuda_text(product, x, operands, index)
        assert text.count("triton_kernel_call") == 1
        assert "dynamic_slice" not in text


@pytest.fixture
def without_the_package(monkeypatch):
    for name in [name for name in sys.modules if name.endswith("jax_triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax_triton", None)


@pytest.mark.usefixtures("without_the_package")
def test_without_the_package_it_refuses_and_names_it():
    q = quantize(jnp.ones((64, 8)), INT8())
    with pytest.raises(NotImplementedError, match="jax_triton cannot be imported"):
        quantized_matmul(
            jnp.ones((2, 64)), *q.kernel_operands(), block=64, features=8, backend="jax_triton"
        )
    with pytest.raises(NotImplementedError, match="jax_triton cannot be imported"):
        dequantize_blockwise(
            *q.kernel_operands(), block=64, columns=64, dtype="float32", backend="jax_triton"
        )
