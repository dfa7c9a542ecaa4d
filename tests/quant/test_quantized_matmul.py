"""``quantized_matmul`` against the dense product with the decoded kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.quant import NF4, quantize, quantized_matmul
from tests.storages import STORAGES, fits, stored

# Largest difference over largest value: K = 128 products, summed in another order, then rounded.
BUDGET = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}


def dense(x, kernel):
    """``x @ kernel`` accumulated in fp32."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def assert_close(actual, expected, dtype="float32"):
    assert actual.dtype == expected.dtype
    actual, expected = (np.asarray(a, np.float32) for a in (actual, expected))
    assert np.abs(actual - expected).max() <= BUDGET[dtype] * np.abs(expected).max()


# every storage once, and each dtype and both shapes of blocks with storages that differ in them
PRODUCTS = [(name, "float32", 128) for name in STORAGES]
PRODUCTS += [
    (name, dtype, inputs)
    for name in ("nf4 twice", "int8", "llm.int8", "gptq in order")
    for dtype in BUDGET
    for inputs in (128, 100)
    if fits(STORAGES[name], inputs) and (dtype, inputs) != ("float32", 128)
]


@pytest.mark.parametrize(("storage", "dtype", "inputs"), PRODUCTS)
def test_product_and_gradient_equal_those_of_the_decoded_kernel(storage, dtype, inputs, draw):
    q = stored(draw((inputs, 20), 1 / 10), STORAGES[storage])
    x = draw((2, 3, inputs), dtype=dtype)
    g = draw((2, 3, 20), dtype=dtype)

    @jax.jit
    def product_and_gradient(x, q, g):
        y, pull = jax.vjp(lambda x: quantized_matmul(x, q), x)
        expected, expected_pull = jax.vjp(lambda x: dense(x, q.dequantize(dtype)), x)
        return (y, *pull(g)), (expected, *expected_pull(g))

    for actual, expected in zip(*product_and_gradient(x, q, g), strict=True):
        assert_close(actual, expected, dtype)


def test_the_stored_matrix_gets_no_gradient(draw):
    q = quantize(draw((64, 20)), NF4(double_quant=True))
    x = draw((3, 64))
    grads = jax.grad(lambda q: quantized_matmul(x, q).sum(), allow_int=True)(q)
    assert grads.codes.dtype == jax.dtypes.float0
    assert grads.scales.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(grads.nested.absmax, 0)
    np.testing.assert_array_equal(grads.nested.offset, 0)


def layers(q, x, index):
    return jnp.tanh(quantized_matmul(x, q, index))


@pytest.fixture(params=["nf4 twice", "gptq in order"])
def stack(request, draw):
    return stored(draw((4, 64, 64), 1 / 8), STORAGES[request.param])


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layer_numbers_equals_the_loop(stack, remat, draw):
    x = draw((3, 64))
    layer = jax.checkpoint(layers) if remat else layers

    def scanned(x):
        return jax.lax.scan(lambda x, i: (layer(stack, x, i), None), x, jnp.arange(4))[0]

    def looped(x):
        kernels = stack.dequantize()
        for i in range(4):
            x = jnp.tanh(dense(x, kernels[i]))
        return x

    def value_and_gradient(through):
        y, pull = jax.vjp(through, x)
        return y, *pull(2 * y)

    both = (jax.jit(value_and_gradient, static_argnums=0)(through) for through in (scanned, looped))
    for actual, expected in zip(*both, strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_it_maps_over_inputs_and_over_experts(stack, draw):
    x = draw((4, 3, 64))

    @jax.jit
    def mapped(x, stack):
        one = jax.tree.map(lambda leaf: leaf[0], stack)
        return {
            "experts": jax.vmap(quantized_matmul)(x, stack),
            "layer numbers": jax.vmap(lambda x, i: quantized_matmul(x, stack, i))(x, jnp.arange(4)),
            "inputs": jax.vmap(lambda x: quantized_matmul(x, one))(x),
            "gradients": jax.vmap(jax.grad(lambda x, q: quantized_matmul(x, q).sum()))(x, stack),
        }

    @jax.jit
    def one_by_one(x, stack):
        kernels = stack.dequantize()
        return {
            "experts": dense(x, kernels),
            "layer numbers": dense(x, kernels),
            "inputs": dense(x, kernels[0]),
            "gradients": jnp.broadcast_to(kernels.sum(2)[:, None], x.shape),
        }

    actual, expected = mapped(x, stack), one_by_one(x, stack)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(actual[name], expected[name])


def float_shapes(jaxpr):
    """Shapes of all floating outputs of a jaxpr's own equations, and of jaxprs inside."""
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            if jnp.issubdtype(value.aval.dtype, jnp.floating):
                yield equation.primitive.name, value.aval.shape
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from float_shapes(inner)


@pytest.mark.parametrize("inputs", [128, 100])
def test_no_decoded_weight_is_kept_for_the_backward_pass(inputs, draw):
    q = quantize(draw((inputs, 96)), NF4(double_quant=True))
    x = draw((3, inputs))

    def kept(product):
        _, pull = jax.eval_shape(lambda x, q: jax.vjp(lambda x: product(x, q), x), x, q)
        return [a.size for a in jax.tree.leaves(pull) if jnp.issubdtype(a.dtype, jnp.floating)]

    assert sum(kept(quantized_matmul)) < inputs * 96 // 4
    assert max(kept(lambda x, q: dense(x, q.dequantize()))) >= inputs * 96


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_stacks_no_decoded_weights(stack, remat, draw):
    x = draw((3, 64))
    layer = jax.checkpoint(layers) if remat else layers

    def loss(x):
        return jax.lax.scan(lambda x, i: (layer(stack, x, i), None), x, jnp.arange(4))[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(x).jaxpr
    scans = [shape for name, shape in float_shapes(jaxpr) if name == "scan"]
    assert scans
    assert all(np.prod(shape) < 4 * 64 * 32 for shape in scans), scans


def test_memory_for_a_gradient_does_not_grow_by_decoded_layers():
    def temporary_bytes(count):
        kernels = jax.ShapeDtypeStruct((count, 256, 256), jnp.float32)
        q = jax.eval_shape(lambda kernels: quantize(kernels, NF4(double_quant=True)), kernels)

        def loss(x, q):
            return jax.lax.scan(lambda x, i: (layers(q, x, i), None), x, jnp.arange(count))[0].sum()

        x = jax.ShapeDtypeStruct((2, 256), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(x, q).compile().memory_analysis().temp_size_in_bytes

    four_decoded_layers = 4 * 256 * 256 * 4
    assert temporary_bytes(8) - temporary_bytes(4) < four_decoded_layers / 16


def test_shapes_that_do_not_fit_are_refused(stack, draw):
    x = draw((3, 63))
    with pytest.raises(ValueError, match="63 features"):
        quantized_matmul(x, stack, jnp.int32(0))
    with pytest.raises(ValueError, match="needs an index"):
        quantized_matmul(jnp.ones((3, 64)), stack)
    with pytest.raises(ValueError, match="needs no index"):
        quantized_matmul(jnp.ones((3, 64)), jax.tree.map(lambda a: a[0], stack), jnp.int32(0))
