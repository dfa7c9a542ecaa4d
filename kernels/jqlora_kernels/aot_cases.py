"""What is compiled ahead of time: every kernel of every backend, in each form that it takes."""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jqlora_kernels.aot_targets import Target
from jqlora_kernels.layouts import HOPPER
from jqlora_kernels.tuning import of_device

MODULES = {
    "triton": "pallas_triton",
    "mosaic": "pallas_mosaic",
    "mosaic_fast": "pallas_mosaic",
    "jax_triton": "jax_triton",
}
PRODUCTS = ("quantized_matmul", "transposed")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One compilation: ``rows`` of ``x`` (0 for decoding alone) times a layer of a stack."""

    backend: str = "triton"
    kernel: str
    dtype: str
    bits: int = 4
    block: int = 64
    nested: bool = True
    rows: int
    inputs: int = 4096
    outputs: int = 1024

    def function(self, target: Target) -> Callable[..., jax.Array]:
        """Of ``(x, codes, scales, codebook, nested, index)``.

        Raises ``NotImplementedError`` where the backend's package is not installed.
        """
        options = {"block": self.block} | self.of_backend(target)
        folder = "quantized_matmul" if self.rows else "dequantize_blockwise"
        try:
            module = importlib.import_module(f"jqlora_kernels.{folder}.{MODULES[self.backend]}")
        except ImportError as error:
            raise NotImplementedError(f"{self.backend}: {error}") from error
        if not self.rows:
            options |= {"columns": self.inputs, "dtype": self.dtype}
            decode = functools.partial(module.dequantize_blockwise, **options)
            return lambda x, *operands: decode(*operands)
        features = self.inputs if self.kernel == "transposed" else self.outputs
        return functools.partial(getattr(module, self.kernel), **options, features=features)

    def of_backend(self, target: Target) -> dict[str, Any]:
        """The options that this backend alone has."""
        if self.backend == "jax_triton":
            major, minor = target.capability
            return {"compute_capability": 10 * major + minor}
        tuned = of_device(target.name)
        if self.backend == "triton":
            return {"tuned": tuned} if self.rows else {}
        products = {"fused_rows": tuned.hopper_rows, "fast": self.backend == "mosaic_fast"}
        return {"layout": HOPPER} | (products if self.rows else {})

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


def cases(target: Target) -> Iterator[Case]:
    """All of them that the device can run."""
    yield from triton_cases()
    yield from jax_triton_cases()
    if target.capability == (9, 0):
        yield from mosaic_cases()


def triton_cases() -> Iterator[Case]:
    """Every kernel and dtype, 4 and 8 bits, scales plain and nested, whole tiles and ragged ones;
    the block sizes in bfloat16. Rows: one for each kernel that they choose; many of them are
    multiplied by what the decoding kernel made."""
    works = [("decode", 0)]
    works += [("quantized_matmul", rows) for rows in (1, 16, 64)]
    works += [("transposed", rows) for rows in (16, 64)]
    for kernel, rows in works:
        for dtype in ("bfloat16", "float16", "float32"):
            yield Case(kernel=kernel, dtype=dtype, rows=rows)
            if dtype != "float16":
                yield Case(kernel=kernel, dtype=dtype, rows=rows, bits=8, nested=False)
        for block in (32, 128, 256) if rows != 16 else ():
            yield Case(kernel=kernel, dtype="bfloat16", rows=rows, block=block)
        ragged = rows + 3 if rows else 0
        yield Case(kernel=kernel, dtype="bfloat16", rows=ragged, inputs=576, outputs=100)


def jax_triton_cases() -> Iterator[Case]:
    """Every kernel and dtype, 4 and 8 bits; the product has one tile, whatever the rows."""
    for kernel, rows in (("decode", 0), *((name, 64) for name in PRODUCTS)):
        case = functools.partial(Case, backend="jax_triton", kernel=kernel, rows=rows)
        for dtype in ("bfloat16", "float16", "float32"):
            yield case(dtype=dtype)
        yield case(dtype="bfloat16", bits=8, nested=False)
        yield case(dtype="bfloat16", block=32)


def mosaic_cases() -> Iterator[Case]:
    """Every kernel and dtype, 4 and 8 bits, one scale and two to a tile's row; the narrowest and
    the widest tile of either product, and the fast mode."""
    works = [("decode", 0), *((name, rows) for name in PRODUCTS for rows in (16, 512))]
    for kernel, rows in works:
        case = functools.partial(Case, backend="mosaic", kernel=kernel, rows=rows)
        yield case(dtype="bfloat16")
        yield case(dtype="bfloat16", block=32)
        yield case(dtype="bfloat16", bits=8)
        yield case(dtype="float32" if kernel == "decode" else "float16", block=128, nested=False)
        if rows == 512:
            yield case(dtype="bfloat16", bits=8, block=32)
            yield Case(backend="mosaic_fast", kernel=kernel, dtype="bfloat16", rows=rows)
