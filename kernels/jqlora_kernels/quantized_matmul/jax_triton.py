"""Products with a block-quantized matrix as Triton kernels proper, called through ``jax_triton``.

Few rows of ``x`` go through one fused kernel, many by the matrix decoded once and the vendor's
GEMM, as in the Pallas kernels. The nibbles of a byte are neighbouring columns: ``x`` is read as its
even and its odd columns, and the product is the sum of two.
"""

import jax
import jax_triton
from jax import lax

from jqlora_kernels.dequantize_blockwise.jax_triton import (
    check,
    dequantize_blockwise,
    flat_operands,
    level_options,
)
from jqlora_kernels.layouts import BITSANDBYTES
from jqlora_kernels.quantized_matmul.reference import contract
from jqlora_kernels.scales import Nested
from jqlora_kernels.triton_language import forward_tile, transposed_tile

FUSED_ROWS = 256
"""Up to how many rows of ``x`` the fused kernel serves: an estimate from instruction counts."""
ROWS = 64
FEATURES = 64
BYTES = 32


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
    layout: str = BITSANDBYTES,
    fused_rows: int = FUSED_ROWS,
    compute_capability: int | None = None,
) -> jax.Array:
    """As ``reference.quantized_matmul``, up to the order of summation.

    Raises ``NotImplementedError`` for what the decoding kernel refuses and, with few enough rows to
    be fused, where blocks do not end with the rows (K no multiple of ``block``).
    """
    operands = (codes, scales, codebook, nested, index)
    shape = (features, x.shape[1])
    check(codebook, x.dtype, layout)
    if x.shape[0] > fused_rows:
        return contract(x, decoded(*operands, shape, block, x, compute_capability), 1)
    return fused("forward", x, operands, shape, block, compute_capability)


def transposed(
    g: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    features: int,
    layout: str = BITSANDBYTES,
    fused_rows: int = FUSED_ROWS,
    compute_capability: int | None = None,
) -> jax.Array:
    """As ``reference.transposed``; refuses what ``quantized_matmul`` refuses."""
    shape = (g.shape[1], features)
    check(codebook, g.dtype, layout)
    if g.shape[0] > fused_rows:
        # Tied to g, or XLA would keep the forward pass's decoded matrix for this one.
        codebook, g = lax.optimization_barrier((codebook, g))
        operands = (codes, scales, codebook, nested, index)
        return contract(g, decoded(*operands, shape, block, g, compute_capability), 0)
    operands = (codes, scales, codebook, nested, index)
    return fused("transposed", g, operands, shape, block, compute_capability)


def decoded(codes, scales, codebook, nested, index, shape, block, x, capability) -> jax.Array:
    """The decoded matrix [N, K] = ``shape`` in the dtype of ``x``."""
    return dequantize_blockwise(
        codes,
        scales,
        codebook,
        nested,
        index,
        block=block,
        columns=shape[0] * shape[1] // codes.shape[-2],
        dtype=x.dtype,
        compute_capability=capability,
    ).reshape(shape)


def fused(name, x, operands, shape, block, capability) -> jax.Array:
    """The fused kernel for ``x`` [M, K] (forward) or [M, N] (transposed) and a matrix (N, K)."""
    features, columns = shape
    if columns % block:
        raise NotImplementedError(f"K={columns} is no multiple of {block=}: rows end inside blocks")
    flat = flat_operands(*operands)
    forward = name == "forward"
    tiles = -(-features // FEATURES) if forward else columns // 2 // min(block // 2, BYTES)
    return jax_triton.triton_call(
        x,
        *flat,
        kernel=forward_tile if forward else transposed_tile,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], features if forward else columns), x.dtype),
        grid=(-(-x.shape[0] // ROWS), tiles),
        num_warps=4,
        num_stages=3,
        compute_capability=capability,
        COUNT=x.shape[0],
        N=features,
        HALF=columns // 2,
        BLOCKS=flat[2].shape[1],
        ROWS=ROWS,
        FEATURES=FEATURES,
        BYTES=min(block // 2, BYTES),
        **level_options(operands[3], block),
    )
