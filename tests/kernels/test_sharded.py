"""A matrix in pieces on two devices is multiplied where it lies."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jqlora.quant import INT8, NF4, quantize
from jqlora_kernels.quantized_matmul import quantized_matmul, sharded_matmul

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
SPECS = {"plain": NF4(), "nested": NF4(double_quant=True), "int8": INT8(double_quant=True)}


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("model",))


def stored(spec, mesh, over, outputs):
    """A stack of two matrices on both devices, split as ``over`` says."""
    kernel = jax.random.normal(jax.random.key(0), (2, 256, outputs)) / 10
    codes, scales, book, nested = quantize(kernel, spec).kernel_operands()
    split = P(None, "model", None) if over == "outputs" else P(None, None, "model")
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, split))
    return place(codes), place(scales), book, nested


CASES = [
    *((name, "outputs", 24, "reference") for name in SPECS),
    *((name, "inputs", 24, "reference") for name in SPECS),
    ("nested", "outputs", 128, "triton_interpret"),  # pieces of one whole group of scales
    ("nested", "inputs", 24, "triton_interpret"),
]


@pytest.mark.parametrize(("name", "over", "outputs", "backend"), CASES)
def test_pieces_give_the_product_and_gradient_of_the_whole(mesh, name, over, outputs, backend):
    spec = SPECS[name]
    operands = stored(spec, mesh, over, outputs)
    x = jax.random.normal(jax.random.key(1), (3, 256))
    static = {"block": spec.block, "features": outputs}

    @jax.jit
    def pieces(x, index, *operands):
        y, pull = jax.vjp(
            lambda x: sharded_matmul(
                x, *operands, index, **static, mesh=mesh, axis="model", over=over, backend=backend
            ),
            x,
        )
        return y, pull(jnp.cos(y))[0]

    compiled = pieces.lower(x, jnp.int32(1), *operands).compile()
    gathers = re.findall(r"= (\w+)\[[^\]]*\]\S* all-gather", compiled.as_text())
    assert "u8" not in gathers
    y, pull = jax.vjp(lambda x: quantized_matmul(x, *operands, jnp.int32(1), **static), x)
    actual = compiled(x, jnp.int32(1), *operands)
    for one, whole in zip(actual, (y, pull(jnp.cos(y))[0]), strict=True):
        np.testing.assert_allclose(one, whole, atol=5e-6)


@pytest.mark.parametrize("over", ["outputs", "inputs"])
def test_the_compiler_splits_the_definition_without_gathering_codes(mesh, over):
    operands = stored(NF4(), mesh, over, 24)
    x = jnp.ones((3, 256))
    product = jax.jit(
        lambda x, i, *o: quantized_matmul(x, *o, i, block=64, features=24, backend="reference")
    )
    text = product.lower(x, jnp.int32(1), *operands).compile().as_text()
    assert "u8" not in re.findall(r"= (\w+)\[[^\]]*\]\S* all-gather", text)


def test_pieces_that_end_inside_a_block_are_refused(mesh):
    operands = stored(NF4(), mesh, "outputs", 24)
    split = functools.partial(sharded_matmul, block=64, mesh=mesh, axis="model")
    odd = [operands[0][:, :23], operands[1][:, :23], operands[2]]
    with pytest.raises(ValueError, match=r"23 rows of 4 blocks .* 2 pieces over outputs"):
        split(jnp.ones((3, 256)), *odd, None, jnp.int32(0), features=23, over="outputs")
