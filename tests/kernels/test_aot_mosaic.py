"""The kernels for Hopper compiled for one that is absent, and what the assembler says of them."""

import re

import jax
import jax.numpy as jnp
import pytest

from jqlora_kernels import aot
from jqlora_kernels.aot_targets import TARGETS
from jqlora_kernels.layouts import HOPPER

pallas_mosaic = pytest.importorskip("jqlora_kernels.quantized_matmul.pallas_mosaic")

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
]
LAYERS, OUTPUTS, INPUTS = 3, 1024, 2048
CASES = [
    ("quantized_matmul", 16, "bfloat16", 64, True, False),
    ("quantized_matmul", 256, "bfloat16", 64, True, False),
    ("quantized_matmul", 256, "bfloat16", 64, True, True),
    ("quantized_matmul", 128, "float16", 128, False, False),
    ("transposed", 64, "float16", 256, False, False),
    ("transposed", 128, "bfloat16", 64, True, False),
    ("transposed", 128, "bfloat16", 64, True, True),
]


def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def stack(block, nested):
    """Kernel operands of a stack of layers, as shapes."""
    blocks = INPUTS // block
    codes, codebook = shape(jnp.uint8, LAYERS, OUTPUTS, INPUTS // 2), shape(jnp.float32, 16)
    if not nested:
        return codes, shape(jnp.float32, LAYERS, OUTPUTS, blocks), codebook, None
    groups = -(-OUTPUTS * blocks // 256)
    second = shape(jnp.float32, LAYERS, groups), shape(jnp.float32, LAYERS), shape(jnp.float32, 256)
    return codes, shape(jnp.uint8, LAYERS, OUTPUTS, blocks), codebook, second


@pytest.mark.parametrize(("name", "rows", "dtype", "block", "nested", "fast"), CASES)
def test_nothing_spills_and_codes_are_used_where_they_lie(
    name, rows, dtype, block, nested, fast, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    wide, narrow = (INPUTS, OUTPUTS) if name == "quantized_matmul" else (OUTPUTS, INPUTS)

    def product(x, operands, index):
        options = {"block": block, "features": narrow, "layout": HOPPER, "rows": rows}
        return getattr(pallas_mosaic, name)(x, *operands, index, **options, fast=fast)

    x = shape(dtype, 2 * rows, wide)
    index = shape(jnp.int32)
    compiled = aot.compile_for(TARGETS["h100"], product, x, stack(block, nested), index)
    assert compiled.memory_analysis().temp_size_in_bytes < INPUTS
    (report,) = tmp_path.glob("*.ptxas")
    assert "sm_90a" in report.read_text()
    assert re.findall(r"(\d+) bytes spill", report.read_text()) == ["0", "0"]
