"""``x @ W`` for a frozen block-quantized ``W``: differentiable in ``x`` alone.

The residuals of the backward pass are the operands themselves, codes and scales. Automatic
differentiation would have kept the decoded matrix, and in a scan over layers all of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jqlora_kernels import dispatch, layouts
from jqlora_kernels.batching import batchable_product
from jqlora_kernels.dispatch import Choice
from jqlora_kernels.operands import Operands, limited
from jqlora_kernels.optional import lazily
from jqlora_kernels.quantized_matmul import pallas_triton, reference
from jqlora_kernels.quantized_matmul.partitioning import partitionable
from jqlora_kernels.scales import Nested, Scales


class Static(NamedTuple):
    """What a product is compiled for, beside shapes and dtypes."""

    block: int
    layout: str
    backend: str | None


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: Scales,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    features: int,
    layout: str = layouts.BITSANDBYTES,
    backend: str | None = None,
) -> jax.Array:
    """``x`` [M, K] times the matrix of ``features`` rows: [M, N] in ``x.dtype``.

    See ``reference.quantized_matmul`` for the operands. With ``index`` (int32 scalar) every stored
    operand has one lead axis, and that element of it is used without being copied out first.
    Cotangents reach ``x`` only. ``backend`` and ``layout`` as in ``dequantize_blockwise``; besides,
    "mosaic" for Hopper, "mosaic_fast" (codes and scales rounded to bf16) and "mosaic_interpret", by
    name only until a device has run them.

    Under ``vmap`` a batch of ``x`` becomes more rows; a batch of matrices is multiplied one by one.
    Under ``jit`` a matrix in pieces on several devices is multiplied where it lies, see
    ``jqlora_kernels.partitioning``.
    """
    operands = (codes, scales, codebook, nested, index)
    return differentiable(x, operands, features, Static(block, layout, backend))


def choose(
    x: jax.Array,
    codes: jax.Array,
    scales: Scales,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    features: int,
    layout: str = layouts.BITSANDBYTES,
    backend: str | None = None,
) -> tuple[Choice, Choice]:
    """Which backend would multiply these operands (``ShapeDtypeStruct`` will do), and which would
    take the gradient; nothing runs. Raises what ``quantized_matmul`` raises.
    """
    operands = (codes, scales, codebook, nested, index)
    static = Static(block, layout, backend)
    g = jax.ShapeDtypeStruct((x.shape[0], features), x.dtype)

    def answer(name: str, x: Any, features: int) -> Choice:
        return dispatch.choose(name, backends(name, features, static), backend, x, *operands)

    return answer("quantized_matmul", x, features), answer("transposed", g, x.shape[1])


def backends(name: str, features: int, static: Static) -> dict[str, Callable[..., jax.Array]]:
    """What implements ``quantized_matmul`` or ``transposed`` (its counterpart for the gradient):
    functions of ``(x, codes, scales, codebook, nested, index)``, in no order."""
    options: dict[str, Any] = {"block": static.block, "features": features}
    kernel = functools.partial(getattr(pallas_triton, name), **options)
    kernel = layouts.only_bitsandbytes(kernel, static.layout)
    options["layout"] = static.layout
    mosaic = functools.partial(lazily, f"{__package__}.pallas_mosaic", name, **options)
    found = {
        "triton": kernel,
        "triton_interpret": functools.partial(kernel, interpret=True),
        "jax_triton": lazily(f"{__package__}.jax_triton", name, **options),
        "mosaic": mosaic(),
        "mosaic_fast": mosaic(fast=True),
        "mosaic_interpret": mosaic(interpret=True),
        "reference": functools.partial(getattr(reference, name), **options),
    }
    return limited(found, static.block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def differentiable(x: jax.Array, operands: Operands, features: int, static: Static) -> jax.Array:
    """The product on the chosen backend, with the gradient rule below."""
    return product("quantized_matmul", x, operands, features, static)


def forward(
    x: jax.Array, operands: Operands, features: int, static: Static
) -> tuple[jax.Array, tuple[Operands, int]]:
    """The product, and codes and scales as residuals."""
    return product("quantized_matmul", x, operands, features, static), (operands, x.shape[1])


def backward(
    features: int, static: Static, residuals: tuple[Operands, int], g: jax.Array
) -> tuple[jax.Array, None]:
    """``g @ W.T`` for ``x``, nothing for the stored operands."""
    operands, columns = residuals
    return product("transposed", g, operands, columns, static), None


differentiable.defvjp(forward, backward)


def product(
    name: str, x: jax.Array, operands: Operands, features: int, static: Static
) -> jax.Array:
    """``quantized_matmul`` or ``transposed`` on a backend, with rules for batches and pieces."""

    def serve(x: jax.Array, operands: Operands, features: int) -> jax.Array:
        found = backends(name, features, static)
        return dispatch.run(name, found, static.backend, x, *operands)

    split = partitionable(
        serve, block=static.block, layout=static.layout, transposed=name == "transposed"
    )
    if static.backend == "mosaic_interpret":
        split = serve  # the emulator's ordered callbacks belong to one device
    return batchable_product(lambda x, operands: split(x, operands, features))(x, operands)
