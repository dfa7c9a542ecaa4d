"""Every kernel compiled for GPUs that are not there, and what the assembler says of it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jqlora_kernels import aot, aot_assembly
from jqlora_kernels.aot_cases import Case, cases
from jqlora_kernels.aot_targets import TARGETS
from jqlora_kernels.layouts import BITSANDBYTES, HOPPER
from jqlora_kernels.quantized_matmul import quantized_matmul

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
]
compiles = [
    pytest.mark.aot,
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
]
MAX_REGISTERS = 255
DEVICES = ("h100", "a100")
CALLS = {"triton": "__gpu$xla.gpu.triton", "mosaic": 'custom_call_target="mosaic_gpu'}


def named(case):
    storage = f"{case.bits}bit-{case.block}{'-nested' if case.nested else ''}"
    shape = f"{case.rows}x{case.inputs}x{case.outputs}"
    return f"{case.backend}-{case.kernel}-{case.dtype}-{storage}-{shape}"


CASES = [
    pytest.param(device, case, id=f"{device}-{named(case)}", marks=compiles)
    for device in DEVICES
    for case in cases(TARGETS[device])
]


@pytest.mark.parametrize(("device", "case"), CASES)
def test_every_kernel_fits_the_device_without_spilling(device, case):
    target = TARGETS[device]
    try:
        (kernel,) = aot.measure(target, case)["kernels"]
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    assert kernel["shared"] <= target.shared
    assert kernel["spilled"] == 0
    assert 0 < kernel["registers"] <= MAX_REGISTERS


STACKED = [
    *(("triton", device, rows) for device in DEVICES for rows in (2, 64, 2048)),
    *(("mosaic", "h100", rows) for rows in (64, 2048)),
]


@pytest.mark.parametrize(
    ("backend", "device", "rows"), [pytest.param(*case, marks=compiles) for case in STACKED]
)
def test_stacked_codes_are_used_where_they_lie(backend, device, rows):
    layers, width = 3, 512
    case = Case(kernel="quantized_matmul", dtype="bfloat16", rows=rows, inputs=width, outputs=width)
    layout = HOPPER if backend == "mosaic" else BITSANDBYTES
    x, *operands, _ = case.arguments(layers)
    multiply = functools.partial(
        quantized_matmul, block=64, features=width, backend=backend, layout=layout
    )

    def loss(x, *operands):
        def layer(x, i):
            return multiply(x, *operands, i), None

        y, _ = jax.lax.scan(layer, x, jnp.arange(layers))
        return (y.astype(jnp.float32) ** 2).sum()

    text = aot.compile_for(TARGETS[device], jax.grad(loss), x, *operands).as_text()
    assert text.count(CALLS[backend]) == 2
    codes = f"{layers},{width},{width // 2}"
    assert f"u8[{codes}]" in text
    assert f"u8[1,{codes[2:]}]" not in text
    assert f"u8[{codes[2:]}]" not in text
    assert not [line for line in text.splitlines() if "copy(" in line and "u8[" in line]


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_nothing_is_kept_of_a_program_that_cannot_be_loaded(keep_programs, programs):
    def absent(x):
        return jnp.sin(x)

    def present(x):
        return jnp.cos(x)

    for _ in range(2):
        aot.compile_for(TARGETS["h100"], absent, jnp.ones(8))
    jax.jit(present)(jnp.ones(8))
    kept = {path.name.split("-")[0] for path in programs.iterdir()}
    assert "jit_present" in kept
    assert "jit_absent" not in kept


def test_a_message_is_read_field_by_field():
    message = bytes([0x08, 0x96, 0x01, 0x12, 2]) + b"ok" + bytes([0x1D, 1, 2, 3, 4, 0x08, 7])
    assert aot_assembly.fields(message) == {1: 150, 2: b"ok", 3: bytes([1, 2, 3, 4])}


@pytest.mark.parametrize(("lacking", "told"), [("installed", "plugin"), ("assemblers", "ptxas")])
def test_the_command_says_which_extra_is_missing(lacking, told, monkeypatch, capsys):
    monkeypatch.setattr(aot, "installed", lambda _: True)
    monkeypatch.setattr(aot, "assemblers", lambda: ["ptxas"])
    monkeypatch.setattr(aot, lacking, lambda *_: None)
    assert aot.main([]) == 2
    assert told in (said := capsys.readouterr().err)
    assert "pip install 'jqlora[aot]'" in said
    with pytest.raises(aot.MissingPieces, match="jqlora"):
        aot.mesh.__wrapped__(TARGETS["h100"])


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_the_command_prints_a_line_a_kernel(words, monkeypatch, capsys):
    monkeypatch.setattr(aot, "missing", lambda: None)
    kernel = {"name": "decode", "shared": 2048, "registers": 96, "spilled": 0}

    def measure(_, case):
        if case.backend == "jax_triton":
            raise NotImplementedError("jax_triton: not installed")
        return vars(case) | {"seconds": 0.5, "kernels": [kernel]}

    monkeypatch.setattr(aot, "measure", measure)
    assert aot.main(words) == 0
    said = capsys.readouterr()
    target = TARGETS["h100"]
    measured = [case for case in cases(target) if case.backend != "jax_triton"]
    lines = said.out.splitlines()
    assert len(lines) == len(measured)
    assert all(
        "2048" in line and "96" in line and case.backend in line
        for line, case in zip(lines, measured, strict=True)
    )
    assert said.err.count("not compiled: jax_triton") == 1
