"""What ``jqlora plan`` says of the kernels."""

import jax
import jax.numpy as jnp
import pytest

from jqlora.quant import NF4, quantize_params
from jqlora.run.backends import backends_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


@pytest.fixture
def params():
    shapes = {"even": (3, 128, 64), "also": (3, 128, 64), "ragged": (100, 64), "norm": (64,)}
    abstract = {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
        for name, shape in shapes.items()
    }
    return quantize_params(abstract, NF4(double_quant=True))


def test_a_cpu_is_served_by_the_definition(params):
    (line,) = backends_of(params, 16, "bfloat16")
    assert line == "kernels    reference: 16 rows times even (x3) and 2 more"


def test_a_gpu_is_served_by_kernels_and_what_they_refuse_is_said_with_the_reason(
    params, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernel, refused = backends_of(params, 16, "bfloat16")
    assert kernel == "kernels    triton: 16 rows times even (x3) and 1 more"
    assert refused.startswith("kernels    reference; triton refused: K=100 is no multiple")
    assert refused.endswith(": 16 rows times ragged")


def test_a_base_kept_whole_needs_no_kernel():
    assert backends_of({"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, 16, "float32") == []
