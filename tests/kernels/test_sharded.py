"""A matrix in pieces on two devices is multiplied and decoded where it lies."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jqlora.quant import INT8, NF4, quantize
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.layouts import BITSANDBYTES, HOPPER, repack
from jqlora_kernels.quantized_matmul import quantized_matmul
from tests.draws import draws

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
NESTED = NF4(double_quant=True)
OUTPUTS, INPUTS = P(None, "model", None), P(None, None, "model")
CASES = {
    "outputs, scales cut inside a group": (NESTED, 256, 24, OUTPUTS, "reference"),
    "outputs, whole groups of scales": (NESTED, 256, 128, OUTPUTS, "triton_interpret"),
    "outputs, rows of x too": (INT8(), 256, 24, OUTPUTS, "reference"),
    "inputs": (NESTED, 256, 24, INPUTS, "triton_interpret"),
    "inputs, plain scales": (INT8(), 256, 24, INPUTS, "reference"),
}


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("model",))


def stored(mesh, spec, inputs, outputs, split):
    """A stack of two matrices on both devices, codes and scales split as told."""
    kernel = draws(0)((2, inputs, outputs), 1 / 10)
    codes, scales, *tables = quantize(kernel, spec).kernel_operands()
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, split))
    whole = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
    return place(codes), place(scales), *jax.tree.map(whole, tables)


def product_and_gradient(x, index, *operands, **static):
    y, pull = jax.vjp(lambda x: quantized_matmul(x, *operands, index, **static), x)
    return y, pull(jnp.cos(y))[0]


def gathered(compiled):
    """Dtypes of what the devices gather from each other."""
    return set(re.findall(r"= (\w+)\[[^\]]*\]\S* all-gather", compiled.as_text()))


@pytest.mark.parametrize("case", CASES)
def test_pieces_give_the_product_and_gradient_of_the_whole_and_no_code_travels(mesh, case):
    spec, inputs, outputs, split, backend = CASES[case]
    operands = stored(mesh, spec, inputs, outputs, split)
    rows = P("model") if "rows of x" in case else P()
    x = draws(1)((4, inputs))
    x = jax.device_put(x, NamedSharding(mesh, rows))
    static = {"block": spec.block, "features": outputs}
    pieces = jax.jit(functools.partial(product_and_gradient, **static, backend=backend))
    compiled = pieces.lower(x, jnp.int32(1), *operands).compile()
    assert gathered(compiled) <= ({"f32"} if rows != P() else set())
    actual = compiled(x, jnp.int32(1), *operands)
    assert actual[split == INPUTS].sharding.spec == P(None, "model")
    whole = jax.tree.map(np.asarray, (x, jnp.int32(1), *operands))
    expected = jax.jit(functools.partial(product_and_gradient, **static))(*whole)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("indexed", [False, True], ids=["stack", "one of it"])
@pytest.mark.parametrize("case", CASES)
def test_pieces_are_decoded_to_pieces_of_the_values(mesh, case, indexed):
    spec, inputs, outputs, split, backend = CASES[case]
    operands = (*stored(mesh, spec, inputs, outputs, split), jnp.int32(1) if indexed else None)
    decode = functools.partial(
        dequantize_blockwise, block=spec.block, columns=inputs, dtype=jnp.float32
    )
    compiled = jax.jit(functools.partial(decode, backend=backend)).lower(*operands).compile()
    assert "all-" not in compiled.as_text()
    values = compiled(*operands)
    expected = NamedSharding(mesh, P(*split[1:] if indexed else split))
    assert values.sharding.is_equivalent_to(expected, values.ndim)
    whole = jax.tree.map(np.asarray, operands)
    decode_whole = jax.jit(functools.partial(decode, backend="reference"))
    np.testing.assert_array_equal(values, decode_whole(*whole))


@pytest.mark.parametrize(("inputs", "pieces"), [(256, True), (384, False)])
def test_a_layout_of_spans_is_cut_between_them_or_gathered(mesh, inputs, pieces):
    codes, *others = stored(mesh, NESTED, inputs, 24, INPUTS)
    packed = jax.device_put(repack(np.asarray(codes), BITSANDBYTES, HOPPER, 2), codes.sharding)
    decode = functools.partial(dequantize_blockwise, block=64, columns=inputs, dtype=jnp.float32)
    static = {"layout": HOPPER, "backend": "reference"}
    compiled = jax.jit(functools.partial(decode, **static)).lower(packed, *others).compile()
    decode_whole = jax.jit(functools.partial(decode, backend="reference"))
    assert (gathered(compiled) == set()) == pieces
    whole = jax.tree.map(np.asarray, (codes, *others))
    np.testing.assert_array_equal(compiled(packed, *others), decode_whole(*whole))


def test_rows_of_x_stay_apart_where_the_matrix_is_whole(mesh):
    operands = stored(mesh, NESTED, 256, 24, P())
    x = jax.device_put(jnp.ones((4, 256)), NamedSharding(mesh, P("model")))
    static = {"block": 64, "features": 24, "backend": "triton_interpret"}
    pieces = jax.jit(functools.partial(product_and_gradient, **static))
    compiled = pieces.lower(x, jnp.int32(1), *operands).compile()
    assert "all-" not in compiled.as_text()
    assert [y.sharding.spec for y in compiled(x, jnp.int32(1), *operands)] == [P("model")] * 2


def test_blocks_that_run_on_from_row_to_row_have_no_pieces(mesh):
    operands = stored(mesh, NF4(), 100, 64, INPUTS)
    x = jax.device_put(jnp.ones((2, 100)), NamedSharding(mesh, P()))
    static = {"block": 64, "features": 64}
    multiply = jax.jit(functools.partial(product_and_gradient, **static))
    y, dx = multiply(x, jnp.int32(1), *operands)
    whole = jax.tree.map(np.asarray, (x, jnp.int32(1), *operands))
    expected = multiply(*whole)
    np.testing.assert_allclose(y, expected[0], atol=5e-6)
    np.testing.assert_allclose(dx, expected[1], atol=5e-6)
