"""``x @ W`` for a frozen block-quantized ``W``: differentiable in ``x`` alone.

The residuals of the backward pass are the operands themselves, codes and scales. Automatic
differentiation would have kept the decoded matrix, and in a scan over layers all of them.
"""

import functools
from typing import Any

import jax

from jqlora_kernels import dispatch, layouts
from jqlora_kernels.quantized_matmul import pallas_triton, reference
from jqlora_kernels.scales import Nested

Operands = tuple[jax.Array, jax.Array, jax.Array, Nested | None, jax.Array | None]


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
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
    Cotangents reach ``x`` only. ``backend`` and ``layout`` as in ``dequantize_blockwise``.
    """
    operands = (codes, scales, codebook, nested, index)
    return differentiable(x, operands, block, features, layout, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def differentiable(
    x: jax.Array, operands: Operands, block: int, features: int, layout: str, backend: str | None
) -> jax.Array:
    """The product on the chosen backend, with the gradient rule below."""
    return product("quantized_matmul", x, operands, block, features, layout, backend)


def forward(
    x: jax.Array, operands: Operands, block: int, features: int, layout: str, backend: str | None
) -> tuple[jax.Array, tuple[Operands, int]]:
    """The product, and codes and scales as residuals."""
    y = product("quantized_matmul", x, operands, block, features, layout, backend)
    return y, (operands, x.shape[1])


def backward(
    block: int,
    features: int,
    layout: str,
    backend: str | None,
    residuals: tuple[Operands, int],
    g: jax.Array,
) -> tuple[jax.Array, None]:
    """``g @ W.T`` for ``x``, nothing for the stored operands."""
    operands, columns = residuals
    return product("transposed", g, operands, block, columns, layout, backend), None


differentiable.defvjp(forward, backward)


def product(
    name: str,
    x: jax.Array,
    operands: Operands,
    block: int,
    features: int,
    layout: str,
    backend: str | None,
) -> jax.Array:
    """``quantized_matmul`` or ``transposed`` (its counterpart for the gradient) on a backend."""
    static: dict[str, Any] = {"block": block, "features": features}
    kernel = functools.partial(getattr(pallas_triton, name), x, *operands, **static)
    kernel = layouts.only_bitsandbytes(kernel, layout)
    backends = {
        "triton": kernel,
        "triton_interpret": functools.partial(kernel, interpret=True),
        "reference": functools.partial(
            getattr(reference, name), x, *operands, **static, layout=layout
        ),
    }
    return dispatch.run(f"quantized_matmul ({name})", backends, backend)
