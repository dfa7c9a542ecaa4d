"""The kernels lower for a GPU that is not there, which the interpreter alone does not prove."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jqlora.quant import FP4, INT8, NF4, quantize
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.quantized_matmul import quantized_matmul

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


SPECS = [NF4(), NF4(double_quant=True, block=32), FP4(double_quant=True, block=4096), INT8()]


def stack_of(spec):
    shape = jax.ShapeDtypeStruct((3, 4096, 96), jnp.float32)
    q = jax.eval_shape(lambda kernel: quantize(kernel, spec), shape)
    return jax.eval_shape(lambda q: q.kernel_operands(), q)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decoding_lowers_to_a_triton_kernel(spec, cuda_text):
    decode = functools.partial(
        dequantize_blockwise, block=spec.block, columns=4096, dtype="bfloat16", backend="triton"
    )
    assert "triton" in cuda_text(decode, *stack_of(spec))
    assert "triton" in cuda_text(decode, *stack_of(spec), jax.ShapeDtypeStruct((), jnp.int32))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rows", [3, 5, 1000])
def test_products_and_gradients_lower_without_a_copy_of_the_layer(spec, rows, cuda_text):
    def loss(x, operands, index):
        y = quantized_matmul(x, *operands, index, block=spec.block, features=96, backend="triton")
        return (y.astype(jnp.float32) ** 2).sum()

    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    text = cuda_text(jax.grad(loss), x, stack_of(spec), index)
    assert text.count("xla.gpu.triton") == 2
    assert "dynamic_slice" not in text
