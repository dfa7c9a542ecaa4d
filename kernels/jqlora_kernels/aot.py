"""Compiles every kernel for a GPU that need not be there, and prints what the assembler made of it.

    python -m jqlora_kernels.aot --device h100

One line a kernel, dtype, storage and number of rows: registers and spilled bytes a thread, shared
memory a block, seconds to compile. It needs neither GPU nor driver, only the pieces that the extra
``aot`` of jqlora installs; without them it says so and ends. Registers and spills are told by the
assembler, for the PTX that XLA dumps: jax 0.10 does so, later versions do not and leave a ``?``.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, or no plugin can compile

import argparse
import contextlib
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jqlora_kernels.aot_targets import TARGETS, Target
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.quantized_matmul import pallas_triton
from jqlora_kernels.tuning import of_device

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


class MissingPieces(RuntimeError):
    """What compiling without a GPU needs is not installed."""


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not any(installed(name) for name in PLUGINS):
        return "no CUDA plugin of jax is installed: pip install 'jqlora[aot]'"
    if assembler() is None:
        return "there is no ptxas: pip install 'jqlora[aot]'"
    return None


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing more than its parent."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def assembler() -> str | None:
    """The path of ptxas, from NVIDIA's package if it is installed."""
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec("nvidia")
        for folder in (spec and spec.submodule_search_locations) or ():
            for found in sorted(Path(folder).glob("*/bin/ptxas")):
                return str(found)
    return shutil.which("ptxas")


@functools.cache
def mesh(target: Target) -> jax.sharding.Mesh:
    """One absent device. Raises ``MissingPieces`` where it cannot be made."""
    if reason := missing():
        raise MissingPieces(reason)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target.text(), topology="1x1x1"
    )
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))


def compile_for(
    target: Target, function: Callable[..., Any], *arguments: Any, **options: Any
) -> jax.stages.Compiled:
    """``function`` (jitted or not) compiled for ``target`` and the shapes of ``arguments``.

    ``options`` go to the compiler. Raises ``MissingPieces``, and what XLA raises: for a kernel that
    asks for more shared memory than there is, among others.
    """
    sharding = jax.sharding.NamedSharding(mesh(target), jax.sharding.PartitionSpec())

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    placed = jax.tree.map(place, arguments)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    with jax.sharding.use_abstract_mesh(mesh(target).abstract_mesh):
        return jitted.lower(*placed).compile(options or None)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One compilation: ``rows`` of ``x`` (0 for decoding alone) times a layer of a stack."""

    kernel: str
    dtype: str
    bits: int = 4
    block: int = 64
    nested: bool = True
    rows: int
    inputs: int = 4096
    outputs: int = 1024

    def function(self, target: Target) -> Callable[..., jax.Array]:
        """Of ``(x, codes, scales, codebook, nested, index)``."""
        if not self.rows:
            decode = functools.partial(
                dequantize_blockwise, block=self.block, columns=self.inputs, dtype=self.dtype
            )
            return lambda x, *operands: decode(*operands, backend="triton")
        product = getattr(pallas_triton, self.kernel)
        features = self.inputs if self.kernel == "transposed" else self.outputs
        tuned = of_device(target.name)
        return functools.partial(product, block=self.block, features=features, tuned=tuned)

    def arguments(self, layers: int = 2) -> tuple[Any, ...]:
        """Their shapes."""
        shape = jax.ShapeDtypeStruct
        blocks = self.inputs // self.block
        width = self.outputs if self.kernel == "transposed" else self.inputs
        scales = shape((layers, self.outputs, blocks), jnp.uint8 if self.nested else jnp.float32)
        nested = None
        if self.nested:
            groups = -(-self.outputs * blocks // 256)
            nested = (
                shape((layers, groups), jnp.float32),
                shape((layers,), jnp.float32),
                shape((256,), jnp.float32),
            )
        return (
            shape((max(self.rows, 1), width), self.dtype),
            shape((layers, self.outputs, self.inputs * self.bits // 8), jnp.uint8),
            scales,
            shape((2**self.bits,), jnp.float32),
            nested,
            shape((), jnp.int32),
        )


def cases() -> Iterator[Case]:
    """Every kernel and dtype, 4 and 8 bits, scales plain and nested, whole tiles and ragged ones;
    the block sizes in bfloat16. Rows: one for each kernel that they choose."""
    works = [("decode", 0)]
    works += [("quantized_matmul", rows) for rows in (1, 16, 64, 2048)]
    works += [("transposed", rows) for rows in (16, 64, 2048)]
    for kernel, rows in works:
        for dtype in ("bfloat16", "float16", "float32"):
            yield Case(kernel=kernel, dtype=dtype, rows=rows)
            if rows <= 64 and dtype != "float16":
                yield Case(kernel=kernel, dtype=dtype, rows=rows, bits=8, nested=False)
        if rows <= 64:
            for block in (32, 128, 256) if rows in (0, 1, 64) else ():
                yield Case(kernel=kernel, dtype="bfloat16", rows=rows, block=block)
            ragged = rows + 3 if rows else 0
            yield Case(kernel=kernel, dtype="bfloat16", rows=ragged, inputs=576, outputs=100)


@dataclass(frozen=True)
class Assembled:
    """What the launch and, unless None, the assembler say of one kernel."""

    name: str
    shared: int
    registers: int | None
    spilled: int | None


def assembled(folder: Path) -> list[Assembled]:
    """The Triton kernels in XLA's dump of one compilation; PTX is assembled again to hear of it."""
    launches = "".join(file.read_text() for file in folder.glob("*thunk_sequence.txt"))
    shared = dict(re.findall(r"\] (\w+) grid: .* shared_memory: (\d+) bytes", launches))
    heard: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.ptx")):
        heard |= heard_of(file)
    return [
        Assembled(name, int(size), *heard.get(name, (None, None)))
        for name, size in shared.items()
        if name.startswith(("quantized_matmul", "dequantize_blockwise"))
    ]


def heard_of(file: Path) -> dict[str, tuple[int, int]]:
    """(registers, spilled bytes) of every kernel in a file of PTX."""
    text = file.read_text()
    if ".entry" not in text:
        return {}
    (arch,) = re.findall(r"^\.target (\w+)", text, re.MULTILINE)
    command = [str(assembler()), "-v", f"-arch={arch}", "-o", os.devnull, str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(pattern, said, re.DOTALL)
    return {name: (int(registers), int(spilled)) for name, spilled, registers in found}


def measure(target: Target, case: Case) -> dict[str, Any]:
    """Compile one case: its fields, its kernels' figures, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        compile_for(target, case.function(target), *case.arguments(), xla_dump_to=folder)
        seconds = time.perf_counter() - start
        found = assembled(Path(folder))
    return asdict(case) | {"seconds": round(seconds, 2), "kernels": [asdict(k) for k in found]}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    storage = f"{row['bits']}-bit/{row['block']}{' nested' if row['nested'] else ''}"
    shape = f"{row['rows']}x{row['inputs']}x{row['outputs']}"
    figures = "; ".join(
        f"{k['name']} {told(k['registers']):>3} registers {told(k['spilled'])} spilled "
        f"{k['shared']:>6} shared"
        for k in row["kernels"]
    )
    kind = f"{row['kernel']:<17}{row['dtype']:<9} {storage:<16}{shape:<16}"
    return f"{kind}{figures}  {row['seconds']} s"


def told(figure: int | None) -> str:
    """A figure, or that the assembler was not heard."""
    return "?" if figure is None else str(figure)


def main(words: list[str] | None = None) -> int:
    """Print the table, or its rows as JSON lines."""
    parser = argparse.ArgumentParser(prog="jqlora_kernels.aot", description=__doc__)
    parser.add_argument("--device", choices=TARGETS, default="h100")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    chosen = parser.parse_args(words)
    if reason := missing():
        print(f"cannot compile for an absent GPU: {reason}", file=sys.stderr)
        return 2
    target = TARGETS[chosen.device]
    print(f"{target.name}, jax {jax.__version__}", file=sys.stderr)
    for case in cases():
        row = measure(target, case)
        print(json.dumps(row) if chosen.json else line(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
