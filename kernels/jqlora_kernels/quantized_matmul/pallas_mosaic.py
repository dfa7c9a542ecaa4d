"""Products with a block-quantized matrix for Hopper, as Pallas-Mosaic kernels.

Compiled for sm_90 and interpreted on a CPU, but never yet run on a device: until it has been, no
platform's order of backends holds it, and it serves only who asks for ``backend="mosaic"``.

Three warp groups a program. One moves tiles of codes and activations into shared memory by TMA; two
decode 64 rows of the matrix each and multiply. Scales are read where they lie, a few bytes a step.
The codes must lie in the layout ``HOPPER``: then the bytes that a lane loads as one word are the
very elements of the 16-bit operand that it owns, and decoded weights never leave the registers.

``y = x @ W.T`` is computed as ``W @ x.T``, because only the left operand of wgmma may be in
registers. For ``dx = g @ W`` the decoded tile is the right operand, contracted over its rows: it
goes through shared memory, decoded by halves, where both warp groups use the whole.

Weights are decoded exactly: fp32 code times fp32 scale, rounded once to the activations' dtype. The
fast mode rounds code, scale and product to bf16: with u = 2^-8 a weight is off by 3u at most (to
first order) where the exact mode is off by u, and half of the instructions are saved. It is for
4-bit codes: those of 8 bits are looked up in shared memory, one load a value whatever the entry.

Activations are bf16 or fp16. wgmma multiplies fp32 as TF32 alone, cut to 10 bits of mantissa where
the definition keeps 23; splitting both operands into three bf16 parts would keep them at six to
nine times the products, for activations that no training step here has.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jqlora_kernels import tuning
from jqlora_kernels.dequantize_blockwise.pallas_mosaic import dequantize_blockwise
from jqlora_kernels.layouts import SPAN
from jqlora_kernels.mosaic_lookup import HALF, fill_table, table_of, table_scratch
from jqlora_kernels.mosaic_tiles import (
    BYTES,
    SHARED_MEMORY,
    Storage,
    check,
    flat_operands,
    kernel,
    row_numbers,
    turned,
    weight_tile,
)
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.quantized_matmul import decode_first
from jqlora_kernels.scales import Nested

GROUPS = 2
"""Warp groups that multiply; one more moves memory."""
FEATURES = GROUPS * HALF
ROWS = (16, 32, 64, 128, 256)
"""Rows of ``x`` in a tile of the forward product, the right operand's width in wgmma."""
GRADIENT_ROWS = (64, 128)
"""Rows of ``g`` that a warp group multiplies."""
HALVES = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(2 * HALF))
MEMORY_REGISTERS = 24


class Options(NamedTuple):
    """How a product is made: ``rows`` of ``x`` to a tile, ``steps`` tiles in flight, each by
    default what there is room for. More than ``fused_rows`` rows, by default this device's limit,
    are multiplied by the matrix decoded beforehand.

    ``fast`` rounds codes and scales to bf16 before they are multiplied (a matrix decoded beforehand
    is exact all the same). ``interpret`` emulates the
    kernel on a CPU and looks for races (JAX 0.11 and later). The emulator can neither hold an
    operand in registers nor run instructions written for the device: it needs ``staged`` (its
    default there), which takes the decoded tile through shared memory, and it decodes by a plain
    look-up.
    """

    rows: int | None = None
    steps: int | None = None
    fused_rows: int | None = None
    fast: bool = False
    interpret: bool = False
    staged: bool | None = None

    @property
    def entry(self) -> Any:
        """The dtype of the table's entries and of scales."""
        return jnp.bfloat16 if self.fast else jnp.float32

    def decodes_first(self, rows: int) -> bool:
        """Whether so many rows are too many for the fused kernel."""
        return rows > (tuning.here().hopper_rows if self.fused_rows is None else self.fused_rows)


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
    layout: str,
    **options: Any,
) -> jax.Array:
    """As ``reference.quantized_matmul``, up to the order of summation; ``options`` as ``Options``.

    Raises ``NotImplementedError`` for what ``check`` and ``check_product`` refuse.
    """
    made = Options(**options)
    shape = (features, x.shape[1])
    check(codebook, shape, FEATURES, block, layout)
    check_product(x, codebook, made.fast)
    if made.decodes_first(x.shape[0]):
        operands = (codes, scales, codebook, nested, index)
        return decode_first.multiply(decoder(block, layout, made), x, operands, features)
    staged = made.interpret if made.staged is None else made.staged
    rows = made.rows or next((r for r in ROWS if r >= x.shape[0]), ROWS[-1])
    count = x.shape[0]
    x = padded(x, rows)
    scratch = {"out": plgpu.SMEM((GROUPS, rows, HALF), x.dtype, transforms=HALVES)}
    if staged:
        kept = (GROUPS, 2, HALF, HALF)
        scratch["weights"] = plgpu.SMEM(kept, x.dtype, transforms=HALVES)
    of = Storage(codes_per_byte(codebook), shape[1], block, made.entry, made.interpret)
    beside = GROUPS * rows * HALF + (FEATURES * SPAN if staged else 0)
    steps = made.steps or stages(rows, beside, of)
    y = kernel(
        functools.partial(forward_tile, rows=rows, steps=steps, of=of),
        jax.ShapeDtypeStruct((x.shape[0], features), x.dtype),
        scratch | table_scratch(codebook, GROUPS),
        {"rows": x.shape[0] // rows, "features": features // FEATURES},
        made.interpret,
        GROUPS + 1,
    )(x, *flat_operands(codes, scales, codebook, nested, index, made.entry))
    return y[:count]


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
    layout: str,
    **options: Any,
) -> jax.Array:
    """As ``reference.transposed``; options and refusals are those of ``quantized_matmul``."""
    made = Options(**options)
    check(codebook, (g.shape[1], features), FEATURES, block, layout)
    check_product(g, codebook, made.fast)
    if made.decodes_first(g.shape[0]):
        operands = (codes, scales, codebook, nested, index)
        decode = decoder(block, layout, made)
        return decode_first.multiply_transposed(decode, g, operands, features)
    # With two scales to a row, the wider tile spilled registers.
    many = block >= HALF and g.shape[0] > GROUPS * GRADIENT_ROWS[0]
    rows = made.rows or GRADIENT_ROWS[many]
    count = g.shape[0]
    g = padded(g, GROUPS * rows)
    scratch = {
        "weights": plgpu.SMEM((GROUPS, FEATURES, SPAN), g.dtype, transforms=HALVES),
        "ready": plgpu.Barrier(num_arrivals=GROUPS),
    }
    of = Storage(codes_per_byte(codebook), features, block, made.entry, made.interpret)
    steps = made.steps or stages(GROUPS * rows, GROUPS * FEATURES * SPAN, of)
    dx = kernel(
        functools.partial(gradient_tile, rows=rows, steps=steps, of=of),
        jax.ShapeDtypeStruct((g.shape[0], features), g.dtype),
        scratch | table_scratch(codebook, GROUPS),
        {"rows": g.shape[0] // (GROUPS * rows), "spans": features // SPAN},
        made.interpret,
        GROUPS + 1,
    )(g, *flat_operands(codes, scales, codebook, nested, index, made.entry))
    return dx[:count]


def check_product(x: jax.Array, codebook: jax.Array, fast: bool) -> None:
    """Refuses activations that wgmma does not multiply exactly, and a fast mode that is none."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"{x.dtype}: the kernel takes bfloat16 and float16, wgmma would cut fp32 to TF32"
        )
    if fast and x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{x.dtype}: the fast mode takes bfloat16, whose range is fp32's")
    if fast and codes_per_byte(codebook) == 1:
        raise NotImplementedError(
            "the fast mode is for codes of 4 bits: of 8 it would save nothing"
        )


def decoder(block: int, layout: str, made: Options) -> Any:
    """The decoding kernel, for ``decode_first``."""
    options = {"block": block, "layout": layout, "interpret": made.interpret}
    return functools.partial(dequantize_blockwise, **options)


def stages(rows: int, elements: int, of: Storage) -> int:
    """How many tiles of codes and of ``rows`` activations fit beside ``elements`` 16-bit ones."""
    table = 0 if of.parts == 2 else GROUPS * 1024
    room = SHARED_MEMORY - 2 * elements - table
    return min(4, room // (2 * rows * SPAN + FEATURES * of.span_bytes))


def padded(x: jax.Array, rows: int) -> jax.Array:
    """``x`` with zeros up to a multiple of ``rows``."""
    return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))


def forward_tile(
    x, layer_ref, codes, book, *refs, out, weights=None, table=None, rows, steps, of
) -> None:
    """``rows`` x 128 of the product, along all of K; each warp group has 64 of the 128 features."""
    *scales, y = refs
    group = lax.axis_index("group")
    first = lax.axis_index("features") * FEATURES
    row_slice = pl.ds(lax.axis_index("rows") * rows, rows)
    layer = layer_ref[0]
    shared = None if table is None else table.at[group]
    found = table_of(book, shared, of.plain)

    def context(run):
        fill_table(book, shared, of.plain)

        def accumulate(total):
            run(total)
            values = total[...].astype(x.dtype)
            values = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
            turned(out.at[group])[...] = values
            plgpu.commit_smem()
            target = y.at[row_slice, pl.ds(first + group * HALF, HALF)]
            plgpu.copy_smem_to_gmem(out.at[group], target)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(accumulate, plgpu.ACC((HALF, rows), jnp.float32))  # pyright: ignore

    def step(place, codes_tile, x_tile, total):
        (span,) = place
        row = first + group * HALF + row_numbers(of.plain)
        tile = codes_tile.at[pl.ds(group * HALF, HALF)]
        pair = weight_tile(tile, found, scales, layer, row, span, x.dtype, of)
        for half, weight in enumerate(pair):
            if weights is not None:
                weights[group, half] = weight
                plgpu.commit_smem()
                weight = weights.at[group, half]
            plgpu.wgmma(total, weight, turned(x_tile).at[pl.ds(half * HALF, HALF)])
        plgpu.wgmma_wait(0)
        return total

    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(of.columns // SPAN,),
        in_specs=[
            plgpu.BlockSpec((FEATURES, of.span_bytes), lambda s: (0, s), transforms=BYTES),
            plgpu.BlockSpec((rows, SPAN), lambda s: (0, s), transforms=HALVES),
        ],
        max_concurrent_steps=min(steps, of.columns // SPAN),
        memory_registers=MEMORY_REGISTERS,
        wg_axis="group",
        num_compute_wgs=GROUPS,
        compute_context=context,
    )(codes.at[layer, pl.ds(first, FEATURES)], x.at[row_slice])


def gradient_tile(
    g, layer_ref, codes, book, *refs, weights, ready, table=None, rows, steps, of
) -> None:
    """``2 * rows`` x 128 of the gradient, along all of N; each warp group has ``rows`` of them."""
    *scales, dx = refs
    features = codes.shape[1]
    group = lax.axis_index("group")
    span = lax.axis_index("spans")
    first = lax.axis_index("rows") * GROUPS * rows
    layer = layer_ref[0]
    shared = None if table is None else table.at[group]
    found = table_of(book, shared, of.plain)

    def context(run):
        fill_table(book, shared, of.plain)

        def accumulate(total):
            run(total)
            values = total[...].astype(g.dtype)
            # Once both groups have read the last weights, there is room for what they made of them.
            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)
            out = weights.at[group, pl.ds(0, rows)]
            out[...] = values
            plgpu.commit_smem()
            target = dx.at[pl.ds(first + group * rows, rows), pl.ds(span * SPAN, SPAN)]
            plgpu.copy_smem_to_gmem(out, target)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(accumulate, plgpu.ACC((rows, SPAN), jnp.float32))  # pyright: ignore

    def step(place, codes_tile, g_tile, total):
        (n,) = place
        row = n * FEATURES + group * HALF + row_numbers(of.plain)
        slot = lax.rem(n, 2)
        tile = codes_tile.at[pl.ds(group * HALF, HALF)]
        pair = weight_tile(tile, found, scales, layer, row, span, g.dtype, of)
        for half, weight in enumerate(pair):
            target = weights.at[slot, pl.ds(group * HALF, HALF), pl.ds(half * HALF, HALF)]
            target[...] = weight
        plgpu.commit_smem()
        # Who arrives has done with the product of the step before, and so with the other slot.
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)
        plgpu.wgmma(total, g_tile.at[pl.ds(group * rows, rows)], weights.at[slot])
        plgpu.wgmma_wait(0)
        return total

    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(features // FEATURES,),
        in_specs=[
            plgpu.BlockSpec((FEATURES, of.span_bytes), lambda n: (n, span), transforms=BYTES),
            plgpu.BlockSpec((GROUPS * rows, FEATURES), lambda n: (0, n), transforms=HALVES),
        ],
        max_concurrent_steps=min(steps, features // FEATURES),
        memory_registers=MEMORY_REGISTERS,
        wg_axis="group",
        num_compute_wgs=GROUPS,
        compute_context=context,
    )(codes.at[layer], g.at[pl.ds(first, GROUPS * rows)])
