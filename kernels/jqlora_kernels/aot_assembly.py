"""What the assembler and the launch say of the kernels in one compilation.

Three compilers leave three traces. XLA's Triton and Mosaic dump files where they are told to:
PTX, which is assembled once more to hear of it, or the assembler's own words. A kernel of
``jax_triton`` is a message inside the program, with its PTX and its launch.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

XLA_OPTIONS = {"xla_dump_emitter_re": "ptx"}
"""From JAX 0.11 on, XLA dumps PTX only if asked for by this name."""
MOSAIC_VARIABLES = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_HOST_LLVM")
FOUND = re.compile(r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) reg", re.DOTALL)

LAUNCH = re.compile(
    r"call void @mosaic_gpu_(?:launch_kernel|build_kernel_spec)"  # up to JAX 0.10, and after
    r"\(ptr %\d+(?:, i32 \d+){9}, i32 (\d+)"  # grid, clusters and threads; then shared memory
)


@dataclass(frozen=True)
class Assembled:
    """One kernel: registers a thread, bytes that it spills, bytes of shared memory a block."""

    name: str
    shared: int
    registers: int
    spilled: int


@contextlib.contextmanager
def dumping(folder: str) -> Iterator[dict[str, Any]]:
    """Options for the compiler under which, in this context, ``folder`` fills with traces."""
    told = {"MOSAIC_GPU_DUMP_TO": folder} | dict.fromkeys(MOSAIC_VARIABLES, "1")
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield {"xla_dump_to": folder} | XLA_OPTIONS
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def assembled(folder: Path, program: Any) -> list[Assembled]:
    """The kernels of a compilation: its dump, and the StableHLO module that was compiled."""
    return [*of_xla(folder), *of_mosaic(folder), *of_jax_triton(program)]


def of_xla(folder: Path) -> Iterator[Assembled]:
    """Pallas-Triton's kernels, among those that XLA made itself."""
    launches = "".join(file.read_text() for file in folder.glob("*thunk_sequence.txt"))
    shared = dict(re.findall(r"\] (\w+) grid: .* shared_memory: (\d+) bytes", launches))
    heard: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("module_*.ptx")):
        heard |= heard_of(file.read_text())
    for name, size in shared.items():
        if name.startswith(("quantized_matmul", "dequantize_blockwise")):
            yield Assembled(name, int(size), *heard[name])


def of_mosaic(folder: Path) -> Iterator[Assembled]:
    """Mosaic's kernels. They are named for their Python function only in some versions."""
    for file in sorted(folder.glob("*.ptxas")):
        (shared,) = LAUNCH.findall(file.with_suffix(".ll").read_text())
        for registers, spilled in listened(file.read_text()).values():
            yield Assembled("mosaic", int(shared), registers, spilled)


def of_jax_triton(program: Any) -> Iterator[Assembled]:
    """``jax_triton``'s kernels, out of the custom calls of a StableHLO module."""
    for operation in operations(program.operation):
        attributes = operation.attributes
        if "triton_kernel_call" not in str(attributes.get("call_target_name", "")):
            continue
        call = fields(zlib.decompress(attributes["backend_config"].value_bytes))[1]
        kernel = fields(fields(call)[1])
        name = kernel[1].decode()
        yield Assembled(name, kernel.get(3, 0), *heard_of(kernel[4].decode())[name])


def operations(operation: Any) -> Iterator[Any]:
    """All operations within one."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from operations(inner.operation)


def fields(message: bytes) -> dict[int, Any]:
    """The first of every field of a protobuf message: numbers, and bytes of what has a length."""
    found: dict[int, Any] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            octet = message[at]
            at += 1
            value |= (octet & 127) << shift
            shift += 7
            if octet < 128:
                return value

    while at < len(message):
        field, kind = divmod(number(), 8)
        if kind == 0:
            value: Any = number()
        else:
            size = number() if kind == 2 else {1: 8, 5: 4}[kind]
            value = message[at : at + size]
            at += size
        found.setdefault(field, value)
    return found


def heard_of(ptx: str) -> dict[str, tuple[int, int]]:
    """(registers, spilled bytes) of every kernel in PTX.

    Raises ``RuntimeError`` with the words of the last assembler where none takes it.
    """
    if ".entry" not in ptx:
        return {}
    (arch,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    said = "no ptxas"
    for assembler in assemblers():
        command = [assembler, "-v", f"-arch={arch}", "-o", os.devnull, "-"]
        done = subprocess.run(command, input=ptx, capture_output=True, text=True)
        if done.returncode == 0:
            return listened(done.stderr)
        said = done.stderr
    raise RuntimeError(said)


def listened(words: str) -> dict[str, tuple[int, int]]:
    """(registers, spilled bytes) of every kernel that ``ptxas -v`` spoke of."""
    return {
        name: (int(registers), int(spilled)) for name, spilled, registers in FOUND.findall(words)
    }


def assemblers() -> list[str]:
    """Every ptxas here: of NVIDIA's package, on the path, and Triton's own, which are the only ones
    that surely know the PTX that Triton writes."""
    found = [*packaged("nvidia", "*/bin/ptxas"), shutil.which("ptxas")]
    found += packaged("triton", "backends/nvidia/bin/ptxas*")
    return [path for path in found if path]


def packaged(package: str, pattern: str) -> list[str]:
    """Files of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return [str(file) for folder in folders for file in sorted(Path(folder).glob(pattern))]
