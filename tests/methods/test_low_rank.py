"""The low-rank product against its definition, differentiated automatically."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.methods.low_rank import low_rank


def definition(x, a, b, scale):
    wide = (leaf.astype(jnp.float32) for leaf in (x, a, b))
    x, a, b = wide
    return scale * ((x @ a) @ b)


@pytest.mark.parametrize(
    ("dtype", "stored", "limit"),
    [
        (jnp.float32, jnp.float32, 1e-5),
        (jnp.bfloat16, jnp.float32, 3e-2),
        (jnp.bfloat16, jnp.bfloat16, 3e-2),
    ],
)
def test_values_and_gradients_are_those_of_the_definition(dtype, stored, limit, getkey):
    x = jax.random.normal(getkey(), (12, 40), dtype)
    a = jax.random.normal(getkey(), (40, 3), stored)
    b = jax.random.normal(getkey(), (3, 24), stored)
    scale = jnp.float32(0.7)
    weights = jax.random.normal(getkey(), (12, 24))

    def total(product):
        return lambda x, a, b: (product(x, a, b, scale).astype(jnp.float32) * weights).sum()

    y = low_rank(x, a, b, scale)
    assert y.dtype == dtype
    wanted = definition(x, a, b, scale)
    np.testing.assert_allclose(
        y.astype(jnp.float32), wanted, atol=limit * float(jnp.abs(wanted).max())
    )
    ours = jax.grad(total(low_rank), (0, 1, 2))(x, a, b)
    theirs = jax.grad(total(definition), (0, 1, 2))(x, a, b)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == reference.dtype
        reference = reference.astype(jnp.float32)
        error = jnp.abs(mine.astype(jnp.float32) - reference).max()
        assert float(error) <= limit * float(jnp.abs(reference).max())


def test_gradients_of_fp32_adapters_are_not_rounded_to_the_dtype_of_the_products(getkey):
    x = jax.random.normal(getkey(), (12, 40), jnp.bfloat16)
    a, b = jax.random.normal(getkey(), (40, 3)), jax.random.normal(getkey(), (3, 24))

    def total(a, b):
        return low_rank(x, a, b, jnp.float32(1.0)).astype(jnp.float32).sum()

    for gradient in jax.grad(total, (0, 1))(a, b):
        assert (gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32)).any()


def test_no_activation_is_transposed_in_the_gradient(getkey):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 576), (576, 8), (8, 576), ())]
    gradient = jax.grad(lambda x, a, b, s: jnp.square(low_rank(x, a, b, s)).sum(), (0, 1, 2))
    text = jax.jit(gradient).lower(*shapes).compile().as_text()
    assert "f32[576,512]" not in text
