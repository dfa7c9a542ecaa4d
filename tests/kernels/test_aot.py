"""Every kernel compiled for GPUs that are not there, and what the assembler says of it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jqlora_kernels import aot
from jqlora_kernels.aot_targets import TARGETS
from jqlora_kernels.quantized_matmul import quantized_matmul

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
]
compiles = [
    pytest.mark.aot,
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
]
MAX_REGISTERS = 255


def named(case):
    storage = f"{case.bits}bit-{case.block}{'-nested' if case.nested else ''}"
    return f"{case.kernel}-{case.dtype}-{storage}-{case.rows}x{case.inputs}x{case.outputs}"


@pytest.mark.parametrize("case", [*aot.cases()], ids=named)
@pytest.mark.parametrize("device", [pytest.param(name, marks=compiles) for name in TARGETS])
def test_every_kernel_fits_the_device_without_spilling(device, case):
    target = TARGETS[device]
    (kernel,) = aot.measure(target, case)["kernels"]
    assert kernel["shared"] <= target.shared
    if jax.__version_info__ >= (0, 11):
        assert kernel["registers"] is None  # XLA dumps no PTX there; when it does, drop this line
        return
    assert kernel["spilled"] == 0
    assert 0 < kernel["registers"] <= MAX_REGISTERS


@pytest.mark.parametrize("device", [pytest.param(name, marks=compiles) for name in TARGETS])
@pytest.mark.parametrize("rows", [2, 64, 2048])
def test_stacked_codes_are_used_where_they_lie(device, rows):
    layers, width = 3, 512
    case = aot.Case(
        kernel="quantized_matmul", dtype="bfloat16", rows=rows, inputs=width, outputs=width
    )
    x, *operands, _ = case.arguments(layers)
    multiply = functools.partial(quantized_matmul, block=64, features=width, backend="triton")

    def loss(x, *operands):
        def layer(x, i):
            return multiply(x, *operands, i), None

        y, _ = jax.lax.scan(layer, x, jnp.arange(layers))
        return (y.astype(jnp.float32) ** 2).sum()

    text = aot.compile_for(TARGETS[device], jax.grad(loss), x, *operands).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
    codes = f"{layers},{width},{width // 2}"
    assert f"u8[{codes}]" in text
    assert f"u8[1,{codes[2:]}]" not in text
    assert f"u8[{codes[2:]}]" not in text
    assert not [line for line in text.splitlines() if "copy(" in line and "u8[" in line]


@pytest.mark.parametrize(("lacking", "told"), [("installed", "plugin"), ("assembler", "ptxas")])
def test_the_command_says_which_extra_is_missing(lacking, told, monkeypatch, capsys):
    monkeypatch.setattr(aot, "installed", lambda _: True)
    monkeypatch.setattr(aot, "assembler", lambda: "ptxas")
    monkeypatch.setattr(aot, lacking, lambda *_: None)
    assert aot.main([]) == 2
    assert told in (said := capsys.readouterr().err)
    assert "pip install 'jqlora[aot]'" in said
    with pytest.raises(aot.MissingPieces, match="jqlora"):
        aot.mesh.__wrapped__(TARGETS["h100"])


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_the_command_prints_a_line_a_kernel(words, monkeypatch, capsys):
    monkeypatch.setattr(aot, "missing", lambda: None)
    kernel = {"name": "decode", "shared": 2048, "registers": None, "spilled": None}
    monkeypatch.setattr(
        aot, "measure", lambda _, case: vars(case) | {"seconds": 0.5, "kernels": [kernel]}
    )
    assert aot.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(aot.cases()))
    assert all("2048" in line and "float" in line for line in lines)
