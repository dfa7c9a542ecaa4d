"""Lowering for a GPU that is not there."""

import jax
import pytest

from tests.absent_gpu import absent_gpu


@pytest.fixture(scope="session")
def cuda_text():
    """A function from (function, *shapes) to the StableHLO that it lowers to for CUDA."""

    def lower(function, *shapes):
        with absent_gpu():
            lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
        return lowered.as_text()

    return lower
