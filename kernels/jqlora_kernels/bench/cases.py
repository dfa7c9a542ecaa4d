"""What is timed: decoding, and both products, on random matrices of real shapes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqlora_kernels.bench import timing
from jqlora_kernels.bench.timing import Contender
from jqlora_kernels.dequantize_blockwise import dequantize_blockwise
from jqlora_kernels.layouts import BITSANDBYTES, HOPPER, SPAN, repack
from jqlora_kernels.optional import lazily
from jqlora_kernels.quantized_matmul import reference
from jqlora_kernels.scales import GROUP
from jqlora_kernels.tuning import Tuning

BLOCK = 64
DTYPE = "bfloat16"
# Limits that send every number of rows to one of the Pallas-Triton kernels.
ALWAYS = 2**30
FORCED = {
    "triton vector": Tuning(ALWAYS, ALWAYS, ALWAYS, measured=False),
    "triton fused": Tuning(0, ALWAYS, ALWAYS, measured=False),
    "triton decode+gemm": Tuning(0, 0, 0, measured=False),
}
MOST_ROWS = {"triton vector": 64, "triton fused": 4096, "jax_triton": 256}
"""Where a kernel is hopeless, it is not timed."""


@dataclass(frozen=True)
class Case:
    """One operation on the layers of one shape; ``rows`` is 0 for decoding."""

    operation: str
    layer: str
    inputs: int
    outputs: int
    rows: int
    double_quant: bool = True

    def __str__(self) -> str:
        rows = f" M={self.rows}" if self.rows else ""
        scales = "" if self.double_quant else " fp32 scales"
        return f"{self.operation} {self.layer} ({self.inputs}, {self.outputs}){rows}{scales}"

    @property
    def stored_bytes(self) -> int:
        """Codes and scales of one matrix."""
        blocks = self.inputs * self.outputs // BLOCK
        scales = blocks + 4 * -(-blocks // GROUP) if self.double_quant else 4 * blocks
        return self.inputs * self.outputs // 2 + scales

    @property
    def moved_bytes(self) -> int:
        """What an ideal kernel reads and writes."""
        if self.operation == "decode":
            return self.stored_bytes + 2 * self.inputs * self.outputs
        return self.stored_bytes + 2 * self.rows * (self.inputs + self.outputs)

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


def stored_matrix(case: Case, seed: int) -> tuple[Any, ...]:
    """Kernel operands of a random matrix, all of whose bits a quantizer could have written."""
    rng = np.random.default_rng(seed)
    shape = (1, case.outputs, case.inputs // BLOCK)
    codes = jnp.asarray(rng.integers(0, 256, (1, case.outputs, case.inputs // 2), np.uint8))
    levels = jnp.linspace(-1, 1, 16, dtype=jnp.float32)
    if not case.double_quant:
        return codes, jnp.asarray(rng.uniform(0.01, 0.1, shape).astype(np.float32)), levels, None
    scales = jnp.asarray(rng.integers(0, 256, shape, np.uint8))
    groups = -(-shape[1] * shape[2] // GROUP)
    nested = (
        jnp.full((1, groups), 0.01, jnp.float32),
        jnp.full(1, 0.05, jnp.float32),
        jnp.linspace(-1, 1, 256, dtype=jnp.float32),
    )
    return codes, scales, levels, nested


Calls = dict[str, Callable[[], Contender]]


def contenders(case: Case, interpret: bool) -> tuple[Calls, dict[str, Callable[[], Any]]]:
    """What to time, to be built when called, and for each the result of one call, to be checked.

    The first one is the baseline that the others are reported against.
    """
    layers = 1 if interpret else timing.layers_for(case.stored_bytes)
    turns = 1 if interpret else timing.turns_for(case.moved_bytes, case.operations, layers)
    stored = [stored_matrix(case, seed) for seed in range(layers)]
    if case.operation == "decode":
        return _decoders(case, stored, turns, interpret)
    return _products(case, stored, turns, interpret)


def _decoders(case, stored, turns, interpret):
    zero = jnp.int32(0)  # the layer's number, which ties a call to the one before at no cost
    words = case.moved_bytes // 8
    sources = [jnp.arange(words, dtype=jnp.uint32) for _ in stored]

    def decode(index, operands, backend, layout):
        options = {"block": BLOCK, "columns": case.inputs, "dtype": DTYPE}
        options |= {"backend": backend, "layout": layout}
        return dequantize_blockwise(*operands, index, **options)  # pyright: ignore

    def copy(index, source):
        # Every word read, changed and written: the traffic of a copy, which XLA might leave out.
        return source ^ (index + 1).astype(jnp.uint32)

    suffix = "_interpret" if interpret else ""
    names = ["reference", f"triton{suffix}", "jax_triton"]
    hopper = packed(case, stored)
    names += [f"mosaic{suffix}"] if hopper else []
    calls: Calls = {"copy": lambda: timing.looped("copy", copy, zero, sources, turns)}
    results = {}
    for name in names:
        layout, operands = (HOPPER, hopper) if "mosaic" in name else (BITSANDBYTES, stored)
        call = functools.partial(decode, backend=name, layout=layout)
        calls[name] = functools.partial(timing.looped, name, call, zero, operands, turns)
        results[name] = functools.partial(jax.jit(call), zero, operands[0])
    return calls, results


def _products(case, stored, turns, interpret):
    forward = case.operation == "forward"
    wide, features = case.inputs, case.outputs
    if not forward:
        wide, features = features, wide
    x = jax.random.normal(jax.random.key(0), (case.rows, wide)).astype(DTYPE)
    function = "quantized_matmul" if forward else "transposed"
    module = "jqlora_kernels.quantized_matmul"
    options = {"block": BLOCK, "features": features}
    emulated = {"interpret": True} if interpret else {}
    hopper = packed(case, stored)

    def plain(x, weight):
        return reference.contract(x, weight, 1 if forward else 0)

    def multiply(x, operands, kernel):
        return kernel(x, *operands, jnp.int32(0))

    def dense():
        key = jax.random.key(1)
        weights = [
            jax.random.normal(jax.random.fold_in(key, i), (case.outputs, case.inputs), DTYPE)
            for i in range(len(stored))
        ]
        return timing.looped("bf16", plain, x, weights, turns)

    kernels: dict[str, Callable[..., Any]] = {}
    kernels["reference"] = functools.partial(getattr(reference, function), **options)
    for name, tuned in FORCED.items():
        kernels[name] = lazily(
            f"{module}.pallas_triton", function, **options, **emulated, tuned=tuned
        )
    kernels["jax_triton"] = lazily(f"{module}.jax_triton", function, **options)
    mosaic = functools.partial(lazily, f"{module}.pallas_mosaic", function, **options)
    kernels["mosaic"] = mosaic(layout=HOPPER, fused_rows=ALWAYS, **emulated)
    kernels["mosaic decode+gemm"] = mosaic(layout=HOPPER, fused_rows=0, **emulated)
    if not interpret:  # the same kernel but for what the emulator does not run
        kernels["mosaic fast"] = mosaic(layout=HOPPER, fused_rows=ALWAYS, fast=True)
    calls: Calls = {"bf16": dense}
    results = {}
    for name, kernel in kernels.items():
        if case.rows > MOST_ROWS.get(name, ALWAYS) or ("mosaic" in name and not hopper):
            continue
        operands = hopper if "mosaic" in name else stored
        call = functools.partial(multiply, kernel=kernel)
        calls[name] = functools.partial(timing.looped, name, call, x, operands, turns)
        results[name] = functools.partial(jax.jit(call), x, operands[0])
    return calls, results


def packed(case: Case, stored: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The same matrices in the layout for Hopper; none where there is no such layout for them."""
    if case.inputs % SPAN:
        return []
    return [(repack(codes, BITSANDBYTES, HOPPER), *others) for codes, *others in stored]
