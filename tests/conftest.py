"""Strict settings for every test: no implicit promotion, two CPU devices, no network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
os.environ["JQLORA_CACHE"] = "off"  # nothing of a test stays behind
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach the hub must fail, not wait

import itertools

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey():
    """A function that hands out a fresh PRNG key at each call, the same sequence in every run."""
    counter = itertools.count()
    return lambda: jax.random.key(next(counter))


@pytest.fixture(scope="module")
def compile_quickly():
    """For programs that run but briefly: optimizing them costs more than it gains.

    Not for tests that hang on the last bit, or on what a compiled program looks like.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
