"""Products with a block-quantized matrix as Pallas-Triton kernels.

Few rows of ``x``: one fused kernel reads codes and scales and feeds what it decodes to the tensor
cores. Many rows: the matrix is decoded once by the decoding kernel and multiplied by the vendor's
GEMM, because a fused kernel would decode it again for every tile of rows.

The nibbles of a byte are neighbouring columns. Rather than interleave what it decodes, the fused
kernel takes ``x`` as even columns and odd columns, [2, M, K/2], and adds two products.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jqlora_kernels import triton_tiles
from jqlora_kernels.dequantize_blockwise.pallas_triton import dequantize_blockwise
from jqlora_kernels.quantized_matmul.reference import contract
from jqlora_kernels.scales import Nested

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
    fused_rows: int = FUSED_ROWS,
    interpret: bool = False,
) -> jax.Array:
    """As ``reference.quantized_matmul``, up to the order of summation.

    Raises ``NotImplementedError`` for other dtypes than fp32, bf16 and fp16, and, with few enough
    rows to be fused, where blocks do not end with the rows (K no multiple of ``block``).
    """
    shape = (features, x.shape[1])
    if x.shape[0] > fused_rows:
        operands = (codes, scales, codebook, nested, index)
        return contract(x, decoded(*operands, shape, block, x.dtype, interpret), 1)
    check(x, shape, block)
    even_odd = jnp.stack([x[:, 0::2], x[:, 1::2]])
    bytes_ = min(block // 2, BYTES)
    return call(
        functools.partial(forward_tile, block=block, bytes_=bytes_, shape=(x.shape[0], *shape)),
        (even_odd, *triton_tiles.flat_operands(codes, scales, codebook, nested, index)),
        grid=(pl.cdiv(x.shape[0], ROWS), pl.cdiv(features, FEATURES)),
        out=jax.ShapeDtypeStruct((x.shape[0], features), x.dtype),
        interpret=interpret,
        name="quantized_matmul",
    )


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
    fused_rows: int = FUSED_ROWS,
    interpret: bool = False,
) -> jax.Array:
    """As ``reference.transposed``; refuses what ``quantized_matmul`` refuses."""
    shape = (g.shape[1], features)
    if g.shape[0] > fused_rows:
        # Tied to g, or XLA would keep the forward pass's decoded matrix for this one.
        codebook, g = lax.optimization_barrier((codebook, g))
        operands = (codes, scales, codebook, nested, index)
        return contract(g, decoded(*operands, shape, block, g.dtype, interpret), 0)
    check(g, shape, block)
    bytes_ = min(block // 2, BYTES)
    even_odd = call(
        functools.partial(transposed_tile, block=block, bytes_=bytes_, shape=(g.shape[0], *shape)),
        (g, *triton_tiles.flat_operands(codes, scales, codebook, nested, index)),
        grid=(pl.cdiv(g.shape[0], ROWS), features // 2 // bytes_),
        out=jax.ShapeDtypeStruct((2, g.shape[0], features // 2), g.dtype),
        interpret=interpret,
        name="quantized_matmul_transposed",
    )
    return jnp.moveaxis(even_odd, 0, -1).reshape(g.shape[0], features)


def decoded(codes, scales, codebook, nested, index, shape, block, dtype, interpret) -> jax.Array:
    """The decoded matrix [N, K] = ``shape``."""
    rows = codes.shape[-2]
    values = dequantize_blockwise(
        codes,
        scales,
        codebook,
        nested,
        index,
        block=block,
        columns=shape[0] * shape[1] // rows,
        dtype=dtype,
        interpret=interpret,
    )
    return values.reshape(shape)


def check(x: jax.Array, shape: tuple[int, int], block: int) -> None:
    """Refuses what the fused kernels cannot multiply by a matrix of ``shape`` (N, K)."""
    triton_tiles.check_dtype(x.dtype)
    if shape[1] % block:
        raise NotImplementedError(
            f"K={shape[1]} is no multiple of {block=}: rows end inside blocks"
        )


def call(kernel, operands, *, grid, out, interpret, name) -> jax.Array:
    """One kernel over whole operands."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[triton_tiles.WHOLE] * len(operands),
        out_specs=triton_tiles.WHOLE,
        out_shape=out,
        compiler_params=triton_tiles.compiler_params(warps=4, stages=3),
        interpret=interpret,
        name=name,
    )(*operands)


def weight_tile(refs, row, first_byte, shape, block, bytes_, dtype):
    """Decoded (even, odd) columns of the matrix's rows ``row``: two [rows, bytes_] of ``dtype``."""
    layers, codes, scales, codebook, *nested = refs
    features, columns = shape
    layer = layers[0]
    inside = row < features
    scale = triton_tiles.load_scales(
        scales, tuple(nested), layer, row * (columns // block) + 2 * first_byte // block, inside
    )
    column = first_byte + jnp.arange(bytes_, dtype=jnp.int32)
    byte = row[:, None] * (columns // 2) + column[None, :]
    mask = jnp.broadcast_to(inside[:, None], byte.shape)
    pair = triton_tiles.decode(codes, codebook, layer, byte, mask)
    return tuple((values * scale[:, None]).astype(dtype) for values in pair)


def forward_tile(x, *refs, block: int, bytes_: int, shape: tuple[int, int, int]) -> None:
    """``ROWS`` x ``FEATURES`` of the product, along all of K."""
    *weight, out = refs
    count, features, columns = shape
    m = pl.program_id(0) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    n = pl.program_id(1) * FEATURES + jnp.arange(FEATURES, dtype=jnp.int32)

    def step(i, total):
        first = i * bytes_
        pair = weight_tile(weight, n, first, (features, columns), block, bytes_, x.dtype)
        column = first + jnp.arange(bytes_, dtype=jnp.int32)
        mask = jnp.broadcast_to((m < count)[:, None], (ROWS, bytes_))
        for parity, values in enumerate(pair):
            tile = plt.load(x.at[parity, m[:, None], column[None, :]], mask=mask, other=0)
            total += dot(tile, values, ((1,), (1,)))
        return total

    zero = jnp.zeros((ROWS, FEATURES), jnp.float32)
    total = lax.fori_loop(0, columns // 2 // bytes_, step, zero)
    mask = (m < count)[:, None] & (n < features)[None, :]
    plt.store(out.at[m[:, None], n[None, :]], total.astype(out.dtype), mask=mask)


def transposed_tile(g, *refs, block: int, bytes_: int, shape: tuple[int, int, int]) -> None:
    """``ROWS`` x ``bytes_`` of the even and of the odd columns of the gradient, along all of N."""
    *weight, out = refs
    count, features, columns = shape
    m = pl.program_id(0) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    first = pl.program_id(1) * bytes_

    def step(i, totals):
        n = i * FEATURES + jnp.arange(FEATURES, dtype=jnp.int32)
        pair = weight_tile(weight, n, first, (features, columns), block, bytes_, g.dtype)
        mask = (m < count)[:, None] & (n < features)[None, :]
        tile = plt.load(g.at[m[:, None], n[None, :]], mask=mask, other=0)
        return tuple(
            total + dot(tile, values, ((1,), (0,)))
            for total, values in zip(totals, pair, strict=True)
        )

    zero = jnp.zeros((ROWS, bytes_), jnp.float32)
    totals = lax.fori_loop(0, pl.cdiv(features, FEATURES), step, (zero, zero))
    column = first + jnp.arange(bytes_, dtype=jnp.int32)
    mask = jnp.broadcast_to((m < count)[:, None], (ROWS, bytes_))
    for parity, total in enumerate(totals):
        store = out.at[parity, m[:, None], column[None, :]]
        plt.store(store, total.astype(out.dtype), mask=mask)


def dot(a: jax.Array, b: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Contraction accumulated in fp32; fp32 operands are not cut to TF32."""
    return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)
