"""Strict settings for every test: no implicit promotion, two CPU devices, no network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
os.environ["JQLORA_CACHE"] = "off"  # nothing of a test stays behind
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach the hub must fail, not wait

import gc
import itertools

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.draws import draws

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(50_000)


def pytest_collection_finish():
    """What is imported stays: looking through it for garbage took a fifteenth of the suite."""
    gc.freeze()


@pytest.fixture
def getkey():
    """A function that hands out a fresh PRNG key at each call, the same sequence in every run."""
    counter = itertools.count()
    return lambda: jax.random.key(next(counter))


def configured(**options):
    """Set options of JAX until this generator goes on; what they decide is decided anew."""
    before = {name: jax.config.values[name] for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


@pytest.fixture
def draw():
    """``draw(shape, scale, dtype)``: normal numbers, other ones at each call."""
    return draws()


@pytest.fixture(scope="module")
def compile_quickly():
    """For programs that run but briefly: optimizing them costs more than it gains.

    Not for tests that hang on the last bit, or on what a compiled program looks like.
    """
    # the second option says nothing to a CPU, but it is part of the key by which JAX finds what it
    # compiled before: so the optimized programs of other modules stay apart from these
    yield from configured(jax_disable_most_optimizations=True, jax_xla_profile_version=1)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Where compiled programs are kept, of this process alone: they are not written at one blow."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def keep_programs(programs):
    """For runs of programs that other tests run as well: each is compiled but once."""
    yield from configured(
        jax_compilation_cache_dir=str(programs),
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )
