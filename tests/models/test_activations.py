"""Activations in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.models.activations import ACTIVATIONS


@pytest.fixture(scope="module")
def inputs():
    return jnp.linspace(-12, 12, 4001).astype(jnp.bfloat16)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives_are_those_of_fp32_rounded_once(name, inputs):
    def both(x):
        values, pull = jax.vjp(ACTIVATIONS[name], x)
        return values, pull(jnp.ones_like(x))[0]

    ours, wide = both(inputs), both(inputs.astype(jnp.float32))
    for found, exact in zip(ours, wide, strict=True):
        assert found.dtype == inputs.dtype
        np.testing.assert_array_equal(found, exact.astype(inputs.dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_keeps_nothing_in_fp32(name, inputs):
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(ACTIVATIONS[name], x)[1], inputs))
    assert {leaf.dtype for leaf in kept} <= {jnp.dtype(jnp.bfloat16), jnp.dtype(bool)}
