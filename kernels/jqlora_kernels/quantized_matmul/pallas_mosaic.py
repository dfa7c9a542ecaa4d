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
first order) where the exact mode is off by u, and half of the instructions are saved.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jqlora_kernels.layouts import HOPPER, SPAN
from jqlora_kernels.mosaic_tiles import (
    GROUPS,
    HALF,
    decode,
    flat_operands,
    kernel,
    load_scales,
    row_numbers,
    turned,
)
from jqlora_kernels.scales import Nested

CAPABILITY = "9.0"
FEATURES = GROUPS * HALF
ROWS = (16, 32, 64, 128, 256)
"""Rows of ``x`` in a tile of the forward product, the right operand's width in wgmma."""
GRADIENT_ROWS = (64, 128)
"""Rows of ``g`` that a warp group multiplies."""
BYTES = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(HALF))
HALVES = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(2 * HALF))
MEMORY_REGISTERS = 24
SHARED_MEMORY = 224 * 1024
"""Bytes that a program may have for tiles: the device's 227 KiB less what barriers take."""


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
    rows: int | None = None,
    steps: int | None = None,
    fast: bool = False,
    interpret: bool = False,
    staged: bool | None = None,
) -> jax.Array:
    """As ``reference.quantized_matmul``, up to the order of summation.

    ``rows`` of ``x`` make a tile, ``steps`` tiles are in flight (default: what there is room for).
    ``fast`` rounds codes and scales to bf16 before they are multiplied. ``interpret`` emulates the
    kernel on a CPU and looks for races (JAX 0.11 and later). The emulator can neither hold an
    operand in registers nor run instructions written for the device: it needs ``staged`` (its
    default there), which takes the decoded tile through shared memory, and it decodes by a plain
    look-up.

    Raises ``NotImplementedError`` for what ``check`` refuses.
    """
    check(x, codebook, features, x.shape[1], block, layout, fast)
    staged = interpret if staged is None else staged
    rows = rows or next((r for r in ROWS if r >= x.shape[0]), ROWS[-1])
    count = x.shape[0]
    x = padded(x, rows)
    weight = jnp.bfloat16 if fast else jnp.float32
    operands = flat_operands(codes, scales, codebook.astype(weight), nested, index)
    scratch = {"out": plgpu.SMEM((GROUPS, rows, HALF), x.dtype, transforms=HALVES)}
    if staged:
        shape = (GROUPS, 2, HALF, HALF)
        scratch["weights"] = plgpu.SMEM(shape, x.dtype, transforms=HALVES)
    steps = steps or stages(rows, GROUPS * rows * HALF + (FEATURES * SPAN if staged else 0))
    body = functools.partial(
        forward_tile, block=block, rows=rows, steps=steps, entry=weight, plain=interpret
    )
    y = kernel(
        body,
        jax.ShapeDtypeStruct((x.shape[0], features), x.dtype),
        scratch,
        {"rows": x.shape[0] // rows, "features": features // FEATURES},
        interpret,
    )(x, *operands)
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
    rows: int | None = None,
    steps: int | None = None,
    fast: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """As ``reference.transposed``; the options are those of ``quantized_matmul``."""
    check(g, codebook, g.shape[1], features, block, layout, fast)
    rows = rows or GRADIENT_ROWS[g.shape[0] > GROUPS * GRADIENT_ROWS[0]]
    count = g.shape[0]
    g = padded(g, GROUPS * rows)
    weight = jnp.bfloat16 if fast else jnp.float32
    operands = flat_operands(codes, scales, codebook.astype(weight), nested, index)
    scratch = {
        "weights": plgpu.SMEM((GROUPS, FEATURES, SPAN), g.dtype, transforms=HALVES),
        "ready": plgpu.Barrier(num_arrivals=GROUPS),
    }
    steps = steps or stages(GROUPS * rows, GROUPS * FEATURES * SPAN)
    body = functools.partial(
        gradient_tile, block=block, rows=rows, steps=steps, entry=weight, plain=interpret
    )
    dx = kernel(
        body,
        jax.ShapeDtypeStruct((g.shape[0], features), g.dtype),
        scratch,
        {"rows": g.shape[0] // (GROUPS * rows), "spans": features // SPAN},
        interpret,
    )(g, *operands)
    return dx[:count]


def check(
    x: jax.Array,
    codebook: jax.Array,
    features: int,
    columns: int,
    block: int,
    layout: str,
    fast: bool,
) -> None:
    """Refuses what the kernels cannot multiply, and a GPU of another kind than theirs."""
    if layout != HOPPER:
        raise NotImplementedError(f"{layout=}: the kernel reads {HOPPER!r} alone")
    if codebook.shape != (16,):
        raise NotImplementedError(f"{codebook.shape[0]} levels: the kernel reads codes of 4 bits")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{x.dtype}: the kernel takes bfloat16 and float16")
    if fast and x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{x.dtype}: the fast mode takes bfloat16, whose range is fp32's")
    if block < HALF:
        raise NotImplementedError(f"{block=}: the kernel takes blocks of {HALF} and more")
    if columns % math.lcm(block, SPAN):
        raise NotImplementedError(f"K={columns} is no multiple of {SPAN} and of {block=}")
    if features % FEATURES:
        raise NotImplementedError(f"N={features} is no multiple of {FEATURES}")
    if jax.default_backend() == "gpu":
        capability = str(jax.local_devices()[0].compute_capability)
        if capability != CAPABILITY:
            raise NotImplementedError(f"compute capability {capability}: wgmma is {CAPABILITY}'s")


def stages(rows: int, elements: int) -> int:
    """How many tiles of codes and of ``rows`` activations fit beside ``elements`` 16-bit ones."""
    return min(4, (SHARED_MEMORY - 2 * elements) // (2 * rows * SPAN + FEATURES * HALF))


def padded(x: jax.Array, rows: int) -> jax.Array:
    """``x`` with zeros up to a multiple of ``rows``."""
    return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))


def weight_tile(
    codes, words, scales, layer, row, span, columns, block, entry, dtype, plain
) -> list[jax.Array]:
    """The weights [64, 64] of either half of a span of the rows numbered ``row``."""
    block_scales = []
    for half in range(2):
        blocks = row * (columns // block) + (span * SPAN + half * HALF) // block
        block_scales.append(load_scales(scales, layer, blocks, plain).astype(entry))
    return [
        (values * lax.broadcast_in_dim(scale, values.shape, (0,))).astype(dtype)
        for values, scale in zip(decode(codes, words, entry, plain), block_scales, strict=True)
    ]


def forward_tile(
    x, layer_ref, codes, words_ref, *refs, out, weights=None, block, rows, steps, entry, plain
) -> None:
    """``rows`` x 128 of the product, along all of K; each warp group has 64 of the 128 features."""
    *scales, y = refs
    columns = x.shape[1]
    group = lax.axis_index("group")
    first = lax.axis_index("features") * FEATURES
    row_slice = pl.ds(lax.axis_index("rows") * rows, rows)
    layer = layer_ref[0]
    words = [words_ref[i] for i in range(words_ref.shape[0])]

    def step(place, codes_tile, x_tile, total):
        (span,) = place
        row = first + group * HALF + row_numbers(plain)
        tile = codes_tile.at[pl.ds(group * HALF, HALF)]
        pair = weight_tile(
            tile, words, scales, layer, row, span, columns, block, entry, x.dtype, plain
        )
        for half, weight in enumerate(pair):
            if weights is not None:
                weights[group, half] = weight
                plgpu.commit_smem()
                weight = weights.at[group, half]
            plgpu.wgmma(total, weight, turned(x_tile).at[pl.ds(half * HALF, HALF)])
        plgpu.wgmma_wait(0)
        return total

    def context(run):
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

    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(columns // SPAN,),
        in_specs=[
            plgpu.BlockSpec((FEATURES, HALF), lambda s: (0, s), transforms=BYTES),
            plgpu.BlockSpec((rows, SPAN), lambda s: (0, s), transforms=HALVES),
        ],
        max_concurrent_steps=min(steps, columns // SPAN),
        memory_registers=MEMORY_REGISTERS,
        wg_axis="group",
        num_compute_wgs=GROUPS,
        compute_context=context,
    )(codes.at[layer, pl.ds(first, FEATURES)], x.at[row_slice])


def gradient_tile(
    g, layer_ref, codes, words_ref, *refs, weights, ready, block, rows, steps, entry, plain
) -> None:
    """``2 * rows`` x 128 of the gradient, along all of N; each warp group has ``rows`` of them."""
    *scales, dx = refs
    features, columns = codes.shape[1], 2 * codes.shape[2]
    group = lax.axis_index("group")
    span = lax.axis_index("spans")
    first = lax.axis_index("rows") * GROUPS * rows
    layer = layer_ref[0]
    words = [words_ref[i] for i in range(words_ref.shape[0])]

    def step(place, codes_tile, g_tile, total):
        (n,) = place
        row = n * FEATURES + group * HALF + row_numbers(plain)
        slot = lax.rem(n, 2)
        tile = codes_tile.at[pl.ds(group * HALF, HALF)]
        pair = weight_tile(
            tile, words, scales, layer, row, span, columns, block, entry, g.dtype, plain
        )
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

    def context(run):
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

    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(features // FEATURES,),
        in_specs=[
            plgpu.BlockSpec((FEATURES, HALF), lambda n: (n, span), transforms=BYTES),
            plgpu.BlockSpec((GROUPS * rows, FEATURES), lambda n: (0, n), transforms=HALVES),
        ],
        max_concurrent_steps=min(steps, features // FEATURES),
        memory_registers=MEMORY_REGISTERS,
        wg_axis="group",
        num_compute_wgs=GROUPS,
        compute_context=context,
    )(codes.at[layer], g.at[pl.ds(first, GROUPS * rows)])
