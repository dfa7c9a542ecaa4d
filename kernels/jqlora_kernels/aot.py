"""Compiles every kernel for a GPU that need not be there, and prints what the assembler made of it.

    python -m jqlora_kernels.aot --device h100

One line a backend, kernel, dtype, storage and number of rows: registers and spilled bytes a thread,
as the assembler tells them, shared memory a block, seconds to compile. It needs neither GPU nor
driver, only the pieces that the extra ``aot`` of jqlora installs; without them it says so and ends.
A backend whose own package is missing gets a line that says which.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, or no plugin can compile

import argparse
import functools
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jqlora_kernels.aot_assembly import assembled, assemblers, dumping
from jqlora_kernels.aot_cases import Case, cases
from jqlora_kernels.aot_targets import TARGETS, Target

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


class MissingPieces(RuntimeError):
    """What compiling without a GPU needs is not installed."""


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not any(installed(name) for name in PLUGINS):
        return "no CUDA plugin of jax is installed: pip install 'jqlora[aot]'"
    if not assemblers():
        return "there is no ptxas: pip install 'jqlora[aot]'"
    return None


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing more than its parent."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


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
    target: Target, function: Callable[..., Any], *arguments: Any
) -> jax.stages.Compiled:
    """``function`` (jitted or not) compiled for ``target`` and the shapes of ``arguments``.

    Raises ``MissingPieces``, and what XLA raises: for a kernel that asks for more shared memory
    than there is, among others.
    """
    return compiled(lower_for(target, function, *arguments))


def compiled(lowered: jax.stages.Lowered, options: Any = None) -> jax.stages.Compiled:
    """A program lowered for a device that is absent, compiled past JAX's cache on the disk.

    A program read back from there would have to be loaded, for which there is no device.
    """
    setting = "jax_enable_compilation_cache"
    before = getattr(jax.config, setting)
    jax.config.update(setting, False)
    compilation_cache.reset_cache()  # JAX asks for the setting but once
    try:
        return lowered.compile(options)
    finally:
        jax.config.update(setting, before)
        compilation_cache.reset_cache()


def lower_for(target: Target, function: Callable[..., Any], *arguments: Any) -> jax.stages.Lowered:
    """``function`` lowered for ``target``, ready to be compiled."""
    sharding = jax.sharding.NamedSharding(mesh(target), jax.sharding.PartitionSpec())

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    placed = jax.tree.map(place, arguments)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    with jax.sharding.use_abstract_mesh(mesh(target).abstract_mesh):
        return jitted.lower(*placed)


def measure(target: Target, case: Case) -> dict[str, Any]:
    """Compile one case: its fields, its kernels' figures, and seconds.

    Raises ``NotImplementedError`` where the backend's package is not installed.
    """
    function = case.function(target)
    with tempfile.TemporaryDirectory() as folder, dumping(folder) as options:
        start = time.perf_counter()
        lowered = lower_for(target, function, *case.arguments())
        compiled(lowered, options)
        seconds = time.perf_counter() - start
        found = assembled(Path(folder), lowered.compiler_ir("stablehlo"))
    return asdict(case) | {"seconds": round(seconds, 2), "kernels": [asdict(k) for k in found]}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    storage = f"{row['bits']}-bit/{row['block']}{' nested' if row['nested'] else ''}"
    shape = f"{row['rows']}x{row['inputs']}x{row['outputs']}"
    figures = "; ".join(
        f"{k['registers']:>3} registers {k['spilled']} spilled {k['shared']:>6} shared"
        for k in row["kernels"]
    )
    kind = f"{row['backend']:<12}{row['kernel']:<17}{row['dtype']:<9} {storage:<16}{shape:<16}"
    return f"{kind}{figures}  {row['seconds']} s"


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
    refusals: set[str] = set()
    for case in cases(target):
        try:
            row = measure(target, case)
        except NotImplementedError as refusal:
            refusals.add(str(refusal))
            continue
        print(json.dumps(row) if chosen.json else line(row), flush=True)
    for refusal in sorted(refusals):
        print(f"not compiled: {refusal}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
