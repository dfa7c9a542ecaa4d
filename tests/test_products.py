"""Products in 16 bits: rounded once, differentiated, and never by way of an fp32 copy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.products import dot_general
from tests.absent_gpu import absent_gpu

M, K, N = 24, 40, 56
BY = {"in rows": 0, "in columns": 1}  # the axis of the matrix that is contracted


@pytest.fixture(params=BY.values(), ids=BY)
def axis(request):
    return request.param


def operands(axis, dtype=jnp.bfloat16):
    x, w = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in ((0, (2, M, K)), (1, (K, N)))
    )
    return x.astype(dtype), (w.T if axis else w).astype(dtype)


def product(x, w, axis):
    return dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_product_is_that_of_fp32_rounded_once(axis, dtype):
    x, w = operands(axis, dtype)
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(w, np.float64), axes=(-1, axis))
    found = product(x, w, axis)
    assert found.dtype == dtype
    ulp = jnp.finfo(dtype).eps * np.maximum(np.abs(exact), 1)
    assert (np.abs(np.asarray(found, np.float64) - exact) <= ulp).all()


def test_gradients_are_those_of_fp32_rounded_once(axis):
    x, w = operands(axis)
    g = jax.random.normal(jax.random.key(2), (2, M, N)).astype(x.dtype)

    def gradients(x, w):
        return jax.vjp(lambda x, w: product(x, w, axis), x, w)[1](g.astype(x.dtype))

    wide = gradients(x.astype(jnp.float32), w.astype(jnp.float32))
    for found, exact in zip(gradients(x, w), wide, strict=True):
        assert found.dtype == jnp.bfloat16
        assert found.shape == exact.shape
        np.testing.assert_allclose(
            found.astype(jnp.float32), exact, rtol=2**-8, atol=2**-8, strict=True
        )


def test_nothing_is_converted_to_fp32_on_the_way(axis):
    x, w = operands(axis)

    def gradient(x, w, g):
        return jax.vjp(lambda x: product(x, w, axis), x)[1](g)

    g = jnp.ones((2, M, N), x.dtype)
    for compiled in (
        jax.jit(lambda x, w: product(x, w, axis)).lower(x, w).compile(),
        jax.jit(gradient).lower(x, w, g).compile(),
    ):
        wide = {*re.findall(r"f32\[([\d,]+)\]", compiled.as_text())}
        sizes = {tuple(sorted(map(int, shape.split(",")))) for shape in wide}
        assert (K, N) not in sizes, "the matrix was copied into fp32"


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)], ids=["states", "matrix", "both"])
def test_an_operand_is_kept_only_for_the_gradient_of_the_other(axis, trained):
    both = operands(axis)
    both = both[0][0], both[1]

    def of(*given):
        every = dict(enumerate(both)) | dict(zip(trained, given, strict=True))
        return product(every[0], every[1], axis)

    def pull(*given):
        return jax.vjp(of, *given)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, *(both[i] for i in trained)))
    assert {leaf.shape for leaf in kept} == {both[1 - i].shape for i in trained}


def test_a_scan_of_checkpointed_layers_differentiates_as_a_loop_does():
    x, _ = operands(0)
    stack = jax.random.normal(jax.random.key(3), (3, K, K)).astype(x.dtype)

    def layer(x, w):
        return jnp.tanh(product(x, w, 0)), None

    def scanned(x, stack):
        return jax.lax.scan(jax.checkpoint(layer), x, stack)[0].astype(jnp.float32).sum()

    def looped(x, stack):
        return (
            jax.tree.reduce(lambda x, w: layer(x, w)[0], list(stack), x).astype(jnp.float32).sum()
        )

    ours, theirs = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, stack) for f in (scanned, looped))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_members_of_a_batch_are_each_as_alone(axis):
    x, w = operands(axis)
    together = jax.vmap(lambda x: product(x, w, axis))(x)
    np.testing.assert_array_equal(together, jnp.stack([product(one, w, axis) for one in x]))


def test_on_other_platforms_it_is_the_plain_product(axis):
    x, w = operands(axis)
    with absent_gpu():
        jaxpr = jax.make_jaxpr(product, static_argnums=2)(x, w, axis)
    primitives = [equation.primitive.name for equation in jaxpr.eqns]
    assert primitives == ["dot_general"]
