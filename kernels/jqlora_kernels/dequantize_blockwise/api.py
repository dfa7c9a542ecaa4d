"""Decoding, by the backend that the platform prefers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import DTypeLike

from jqlora_kernels import dispatch, layouts
from jqlora_kernels.batching import batchable_decode
from jqlora_kernels.dequantize_blockwise import pallas_triton, reference
from jqlora_kernels.dequantize_blockwise.partitioning import partitionable
from jqlora_kernels.operands import Operands, limited
from jqlora_kernels.optional import lazily
from jqlora_kernels.scales import Nested, Scales


def dequantize_blockwise(
    codes: jax.Array,
    scales: Scales,
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

    Under ``vmap`` a batch of matrices is one more lead axis. Under ``jit`` a matrix in pieces on
    several devices is decoded where it lies, see ``jqlora_kernels.partitioning``.
    """

    def serve(operands: Operands, columns: int) -> jax.Array:
        found = backends(block=block, columns=columns, dtype=dtype, layout=layout)
        return dispatch.run("dequantize_blockwise", found, backend, *operands)

    split = partitionable(serve, block=block, layout=layout)
    if backend == "mosaic_interpret":
        split = serve  # the emulator's ordered callbacks belong to one device
    decode = batchable_decode(lambda operands: split(operands, columns))
    return decode((codes, scales, codebook, nested, index))


def backends(*, block: int, layout: str, **static: Any) -> dict[str, Callable[..., jax.Array]]:
    """What implements decoding: functions of ``(codes, scales, codebook, nested, index)``."""
    static["block"] = block
    kernel = functools.partial(pallas_triton.dequantize_blockwise, **static)
    kernel = layouts.only_bitsandbytes(kernel, layout)
    optional = functools.partial(lazily, name="dequantize_blockwise", **static, layout=layout)
    found = {
        "triton": kernel,
        "triton_interpret": functools.partial(kernel, interpret=True),
        "jax_triton": optional(f"{__package__}.jax_triton"),
        "mosaic": optional(f"{__package__}.pallas_mosaic"),
        "mosaic_interpret": optional(f"{__package__}.pallas_mosaic", interpret=True),
        "reference": functools.partial(reference.dequantize_blockwise, **static, layout=layout),
    }
    return limited(found, block)
