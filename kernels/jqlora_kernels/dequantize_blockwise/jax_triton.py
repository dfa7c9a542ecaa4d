"""Decoding as a Triton kernel proper, called through the package ``jax_triton``.

Pallas' Triton backend is deprecated; this is the same kernel in Triton's own language, which stays
where Pallas' goes. One program decodes ``TILE`` bytes; blocks that end with the rows and blocks
that run on are the same thing in memory, so every matrix is one row of bytes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
from jax.typing import DTypeLike

from jqlora_kernels.layouts import BITSANDBYTES
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.scales import GROUP, Nested
from jqlora_kernels.triton_language import decode_tile

if jax.__version_info__ >= (0, 12) and jax_triton.__version__.startswith("0.4."):
    # JAX hands a rule of jax_triton's call (for dropping what is unused) one argument more
    raise ImportError(f"jax_triton {jax_triton.__version__} cannot be lowered by JAX 0.12 or later")

TILE = 512
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


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
    layout: str = BITSANDBYTES,
    compute_capability: int | None = None,
) -> jax.Array:
    """As ``reference.dequantize_blockwise``; values are equal bit for bit.

    ``compute_capability`` (90 for an H100) is asked of the device unless given, as it must be to
    lower for one that is absent. Raises ``NotImplementedError`` for what ``check`` refuses, and for
    rows that end in half a byte.
    """
    rows = codes.shape[-2]
    check(dtype, layout)
    if rows > 1 and columns % block:
        raise NotImplementedError(
            f"{columns=} is no multiple of {block=}: rows must end with a block"
        )
    count = rows * columns
    if count >= 2**31 - 2 * TILE:
        raise NotImplementedError(f"{count} elements cannot be numbered in an int32")
    lead = codes.shape[:-2] if index is None else ()
    operands = flat_operands(codes, scales, codebook, nested, index)
    values = jax_triton.triton_call(
        *operands,
        kernel=decode_tile,
        out_shape=jax.ShapeDtypeStruct((math.prod(lead), count), jnp.dtype(dtype)),
        grid=(math.prod(lead), -(-operands[1].shape[1] // TILE)),
        num_warps=4,
        num_stages=1,
        compute_capability=compute_capability,
        BYTES=operands[1].shape[1],
        BLOCKS=operands[2].shape[1],
        COUNT=count,
        TILE=TILE,
        **storage_options(codebook, nested, block),
    )
    return values.reshape(*lead, rows, columns)


def check(dtype: DTypeLike, layout: str) -> None:
    """Refuses dtypes and layouts that the kernels do not read."""
    if jnp.dtype(dtype) not in map(jnp.dtype, DTYPES):
        raise NotImplementedError(
            f"{jnp.dtype(dtype)}: the kernel takes float32, bfloat16, float16"
        )
    if layout != BITSANDBYTES:
        raise NotImplementedError(f"{layout=}: the kernel reads {BITSANDBYTES!r} alone")


def flat_operands(
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None,
    index: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """(layer numbers, codes [L, bytes], scales [L, blocks], codebook, absmax, offset, table).

    Without a second level its three places hold the codebook, which nobody reads there.
    """
    lead = codes.shape[:-2] if index is None else codes.shape[:1]
    count = math.prod(lead)
    layers = jnp.arange(count, dtype=jnp.int32) if index is None else index.reshape(1)
    operands = (layers, codes.reshape(count, -1), scales.reshape(count, -1), codebook)
    if nested is None:
        return (*operands, codebook, codebook, codebook)
    absmax, offset, table = nested
    return (*operands, absmax.reshape(count, -1), offset.reshape(count), table)


def storage_options(codebook: jax.Array, nested: Nested | None, block: int) -> dict[str, Any]:
    """The storage that a kernel is compiled for."""
    groups = 1 if nested is None else nested[0].shape[-1]
    second = {"NESTED": nested is not None, "GROUPS": groups, "GROUP": GROUP}
    return {"PARTS": codes_per_byte(codebook), "BLOCK": block} | second
