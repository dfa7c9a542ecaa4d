"""A QTensor is a leaf of the parameter tree and a pytree of arrays at once."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.quant import (
    FP4,
    INT8,
    NF4,
    GroupInt,
    QTensor,
    RowInt8,
    empty,
    is_qtensor,
    leaf_shapes,
    quantize_rows,
)
from tests.storages import STORAGES, fits, stored

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(params=STORAGES)
def spec(request):
    return STORAGES[request.param]


@pytest.mark.parametrize("matrix", [(128, 20), (100, 20), (9, 7)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_shapes_follow_the_invariants(spec, matrix, lead):
    if not fits(spec, matrix[0]):
        return
    q = jax.eval_shape(lambda: empty(matrix, lead, spec, jnp.bfloat16))
    assert q.shape == (*lead, *matrix)
    assert q.lead == lead
    assert q.ndim == len(lead) + 2
    assert q.size == np.prod(q.shape)
    assert q.spec == spec
    assert q.dtype == jnp.bfloat16
    shapes = leaf_shapes(matrix, spec)
    assert q.codes.shape == (*lead, *shapes["codes"])
    assert q.scales.shape == (*lead, *shapes["scales"])
    if spec.double_quant:
        assert q.nested.absmax.shape == (*lead, *shapes["absmax"])
        assert q.nested.offset.shape == lead
    assert (q.zeros is None) == (not spec.zeros)
    assert q.zeros is None or q.zeros.shape == q.scales.shape
    assert (q.order is None) == (not spec.ordered)
    assert q.order is None or q.order.shape == (*lead, matrix[0])
    for dtype in (None, jnp.float32):
        decoded = jax.eval_shape(lambda q, dtype=dtype: q.dequantize(dtype), q)
        assert (decoded.shape, decoded.dtype) == (q.shape, dtype or jnp.bfloat16)


def test_kernel_and_rows_are_each_others_transpose(spec, draw):
    kernel = draw((2, 64, 20))
    q = stored(kernel, spec)
    np.testing.assert_array_equal(q.dequantize(), jnp.swapaxes(q.dequantize_rows(), -1, -2))
    coarse = 2 * jnp.abs(kernel).max() / (15 if q.spec.codes_per_byte == 2 else 127)
    assert jnp.abs(q.dequantize() - kernel).max() < 1.5 * coarse
    if not isinstance(spec, GroupInt):
        rows = quantize_rows(jnp.swapaxes(kernel, -1, -2), spec)
        np.testing.assert_array_equal(q.codes, rows.codes)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (NF4(), 4.5),
        (NF4(double_quant=True), 4.127),
        (FP4(block=32), 5.0),
        (INT8(), 8.5),
        (RowInt8(), 8.031),
        (GroupInt(format="gptq", symmetric=True), 4.25),
        (GroupInt(format="awq"), 4.375),
    ],
)
def test_bits_per_parameter_are_the_bytes_on_the_device(spec, bits):
    q = empty((1024, 1024), (), spec, jnp.float32)
    on_device = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(q))
    assert q.nbytes == on_device
    assert round(8 * on_device / 1024**2, 3) == bits
    assert q.bits_per_param == pytest.approx(bits, abs=5e-4)


def test_it_survives_every_way_a_tree_is_taken_apart(spec, draw):
    q = stored(draw((2, 64, 20)), spec)
    leaves, structure = jax.tree.flatten(q)
    copies = {
        "flatten": jax.tree.unflatten(structure, leaves),
        "map": jax.tree.map(lambda leaf: leaf, q),
        "jit": jax.jit(lambda q: q)(q),
        "device_put": jax.device_put(q, jax.devices()[1]),
        "state dict": flax.serialization.from_state_dict(q, flax.serialization.to_state_dict(q)),
    }
    for how, copy in copies.items():
        assert isinstance(copy, QTensor), how
        assert jax.tree.structure(copy) == structure, how
        for a, b in zip(leaves, jax.tree.leaves(copy), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=how)


def test_it_may_hold_shapes_instead_of_arrays(spec):
    q = jax.eval_shape(lambda: empty((64, 20), (3,), spec, jnp.bfloat16))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(q))
    assert q.shape == (3, 64, 20)
    assert q.spec == spec
    assert q.nbytes == stored(jnp.ones((3, 64, 20)), spec).nbytes
    decoded = jax.eval_shape(lambda q: q.dequantize(), q)
    assert decoded == jax.ShapeDtypeStruct((3, 64, 20), jnp.bfloat16)
    assert is_qtensor(q)


@pytest.mark.parametrize("storage", ["nf4 twice", "gptq in order"])
def test_slices_of_a_stack_are_its_matrices(storage, draw):
    q = stored(draw((2, 3, 64, 20)), STORAGES[storage])
    expected = q.dequantize()
    one = jax.tree.map(lambda leaf: leaf[1, 2], q)
    np.testing.assert_array_equal(one.dequantize(), expected[1, 2])
    mapped = jax.vmap(jax.vmap(lambda q: q.dequantize()))(q)
    np.testing.assert_array_equal(mapped, expected)
    _, scanned = jax.lax.scan(lambda c, q: (c, q.dequantize()), None, q)
    np.testing.assert_array_equal(scanned, expected)
    flat = q.flat_lead()
    assert flat.lead == (6,)
    np.testing.assert_array_equal(flat.dequantize(), expected.reshape(6, 64, 20))
