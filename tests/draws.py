"""Normal numbers for tests, drawn by numpy: JAX would compile a program for every shape."""

import jax.numpy as jnp
import numpy as np


def draws(seed: int = 0):
    """A function that gives other numbers at each call, the same in every run."""
    generator = np.random.default_rng(seed)

    def draw(shape, scale=1.0, dtype="float32"):
        values = scale * generator.standard_normal(shape, np.float32)
        return jnp.asarray(values.astype(jnp.dtype(dtype)))

    return draw
