"""Lowering for a GPU that is not there."""

import contextlib

import jax
import pytest


def absent_gpu():
    """From jax 0.11 on, Pallas asks for the device it lowers for; before, it could not be told."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.fixture(scope="session")
def cuda_text():
    """A function from (function, *shapes) to the StableHLO that it lowers to for CUDA."""

    def lower(function, *shapes):
        with absent_gpu():
            lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
        return lowered.as_text()

    return lower
