"""Decoding, by the backend that the platform prefers."""

import functools

import jax
from jax.typing import DTypeLike

from jqlora_kernels import dispatch, layouts
from jqlora_kernels.batching import Operands, batchable_decode
from jqlora_kernels.dequantize_blockwise import pallas_triton, reference
from jqlora_kernels.optional import lazily
from jqlora_kernels.scales import Nested


def dequantize_blockwise(
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    columns: int,
    dtype: DTypeLike,
    layout: str = layouts.BITSANDBYTES,
    backend: str | None = None,
) -> jax.Array:
    """Values [*lead, rows, columns]; see ``reference.dequantize_blockwise`` for the operands.

    ``backend``: "reference", "triton", "triton_interpret" (the same kernel emulated on a CPU),
    "jax_triton" (without Pallas), "mosaic" (for Hopper) and "mosaic_interpret" (never run on a
    device yet, so by name only), or None for the platform's choice. ``layout`` is one of
    ``layouts.LAYOUTS``. Raises what ``dispatch.run`` raises.
    """
    static = {"block": block, "columns": columns, "dtype": dtype}
    kernel = functools.partial(pallas_triton.dequantize_blockwise, **static)
    kernel = layouts.only_bitsandbytes(kernel, layout)
    optional = functools.partial(lazily, name="dequantize_blockwise", **static, layout=layout)
    backends = {
        "triton": kernel,
        "triton_interpret": functools.partial(kernel, interpret=True),
        "jax_triton": optional(f"{__package__}.jax_triton"),
        "mosaic": optional(f"{__package__}.pallas_mosaic"),
        "mosaic_interpret": optional(f"{__package__}.pallas_mosaic", interpret=True),
        "reference": functools.partial(reference.dequantize_blockwise, **static, layout=layout),
    }

    def serve(operands: Operands) -> jax.Array:
        return dispatch.run("dequantize_blockwise", backends, backend, *operands)

    return batchable_decode(serve)((codes, scales, codebook, nested, index))
