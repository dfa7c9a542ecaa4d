"""What the Pallas-Mosaic kernels share: what they serve, their operands, one tile of weights.

Scales are read where they lie, a few bytes a step: single elements of an array in global memory
(``gather``), which is written against Mosaic itself for want of a Pallas primitive, with a plain
counterpart that the interpreter can run. All arithmetic is ordinary ``jax.numpy``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from jqlora_kernels.layouts import HOPPER, SPAN
from jqlora_kernels.mosaic_lookup import HALF, decode, table_operand
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.scales import GROUP, Nested, add_rounded

CAPABILITY = "9.0"
SHARED_MEMORY = 224 * 1024
"""Bytes that a program may have for tiles: the device's 227 KiB less what barriers take."""
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""One value for each row of a tile in ``Layout.WGMMA``, where the lanes that own the row see it."""
BYTES = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(HALF))
"""How tiles of codes lie in shared memory."""


class Storage(NamedTuple):
    """What a kernel is compiled for: ``parts`` codes to a byte, rows of ``columns`` elements in
    blocks of ``block``, table entries of dtype ``entry``; ``plain`` where it is interpreted."""

    parts: int
    columns: int
    block: int
    entry: Any
    plain: bool

    @property
    def span_bytes(self) -> int:
        """Bytes of a span of codes."""
        return SPAN // self.parts


def check(codebook: jax.Array, shape: tuple[int, int], rows: int, block: int, layout: str) -> None:
    """Refuses what the kernels cannot decode of a matrix (N, K), ``rows`` of them a program, and a
    GPU of another kind than theirs."""
    if layout != HOPPER:
        raise NotImplementedError(f"{layout=}: the kernel reads {HOPPER!r} alone")
    codes_per_byte(codebook)
    features, columns = shape
    if columns % math.lcm(block, SPAN):
        raise NotImplementedError(f"K={columns} is no multiple of {SPAN} and of {block=}")
    if features % rows:
        raise NotImplementedError(f"N={features} is no multiple of {rows}")
    if jax.default_backend() == "gpu":
        capability = str(jax.local_devices()[0].compute_capability)
        if capability != CAPABILITY:
            raise NotImplementedError(f"compute capability {capability}: wgmma is {CAPABILITY}'s")


def flat_operands(
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None,
    index: jax.Array | None,
    entry: Any = jnp.float32,
) -> tuple[jax.Array, ...]:
    """(layers, codes [L, N, bytes], table of dtype ``entry``, scales [L, blocks], *nested).

    Without ``index`` there is one layer number for every element of the lead axes, else just that.
    """
    count = math.prod(codes.shape[:-2])
    layers = jnp.arange(count, dtype=jnp.int32) if index is None else index.reshape(1)
    stack = codes.reshape(count, *codes.shape[-2:])
    operands = (layers, stack, table_operand(codebook, entry), scales.reshape(count, -1))
    if nested is None:
        return operands
    absmax, offset, table = nested
    return (*operands, absmax.reshape(count, -1), offset.reshape(count), table)


def kernel(
    body: Any,
    out: Any,
    scratch: dict[str, Any],
    grid: dict[str, int],
    interpret: bool,
    groups: int = 1,
) -> Any:
    """``body`` as a kernel of so many warp groups a program; of several each has a number."""
    options: dict[str, Any] = {}
    if groups > 1:
        options |= {"num_threads": groups, "thread_name": "group"}
    if interpret:
        if not hasattr(plgpu, "InterpretGPUParams"):
            raise NotImplementedError("interpreting a Mosaic kernel needs JAX 0.11 or later")
        options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)  # pyright: ignore
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **options,
    )


def weight_tile(
    codes: Any, table: Any, scales: Any, layer: Any, row: Any, span: Any, dtype: Any, of: Storage
) -> list[jax.Array]:
    """The weights [64, 64] of either half of a span of the rows numbered ``row``."""
    tile = []
    for half, values in enumerate(decode(codes, table, of.parts, of.entry, of.plain)):
        first = span * SPAN + half * HALF
        scale = [
            load_scales(scales, layer, row * (of.columns // of.block) + start // of.block, of.plain)
            for start in ((first,) if of.block >= HALF else (first, first + of.block))
        ]
        spread = [lax.broadcast_in_dim(s.astype(of.entry), values.shape, (0,)) for s in scale]
        if len(spread) == 2:
            left = column_numbers(of.plain) < of.block
            spread = [jnp.where(left, *spread)]
        tile.append((values * spread[0]).astype(dtype))
    return tile


def gather(source: Any, places: jax.Array, plain: bool) -> jax.Array:
    """Elements of a one-dimensional array in global memory, one for each row; bytes as int32."""
    bytes_ = source.dtype == jnp.uint8
    if plain:
        values = source[...].at[places].get(mode="promise_in_bounds")
        return values.astype(jnp.int32) if bytes_ else values
    dtype = jnp.int32 if bytes_ else source.dtype
    result = plgpu.ShapeDtypeStruct(places.shape, dtype, layout=ROWS)
    emit = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS), return_type=result)
    return emit(gather_registers)(source, places)


def gather_registers(_: Any, source: Any, places: Any) -> Any:
    """One load of one element for every register of ``places``."""
    registers = np.empty(places.registers.shape, object)
    i32 = ir.IntegerType.get_signless(32)
    element = ir.MemRefType(source.type).element_type
    bytes_ = element == ir.IntegerType.get_signless(8)
    out = ir.VectorType.get((1,), i32 if bytes_ else element)
    for at, register in np.ndenumerate(places.registers):
        place = vector.extract(register, dynamic_position=[], static_position=[0])
        value = memref.load(source, [arith.index_cast(ir.IndexType.get(), place)])
        registers[at] = vector.broadcast(out, arith.extui(i32, value) if bytes_ else value)
    return mgpu.FragmentedArray(
        _registers=registers, _layout=places.layout, _is_signed=True if bytes_ else None
    )


def load_scales(refs: Sequence[Any], layer: jax.Array, blocks: jax.Array, plain: bool) -> jax.Array:
    """fp32 scales of the blocks of one layer numbered ``blocks``, int32 [64], one for each row.

    ``refs`` are scales [L, count], and with a second level absmax [L, groups], offset [L] and the
    table [256].
    """
    scales, *nested = refs
    stored = gather(scales.at[layer], blocks, plain)
    if not nested:
        return stored
    absmax, offset, table = nested
    values = gather(table, stored, plain)
    group_scale = gather(absmax.at[layer], blocks // GROUP, plain)
    return add_rounded(values * group_scale, offset[layer])


def row_numbers(plain: bool) -> jax.Array:
    """int32 [64]: 0 ... 63, each where the lanes that own the row see it."""
    if plain:
        return jnp.arange(HALF, dtype=jnp.int32)
    return plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROWS)


def column_numbers(plain: bool) -> jax.Array:
    """int32 [64, 64]: 0 ... 63 along every row."""
    if plain:
        return lax.broadcasted_iota(jnp.int32, (HALF, HALF), 1)
    return plgpu.broadcasted_iota(jnp.int32, (HALF, HALF), 1, layout=plgpu.Layout.WGMMA)


def turned(ref: Any) -> Any:
    """The reference to a matrix, transposed; JAX 0.10 has a function for it, 0.12 a property."""
    return ref.T if hasattr(ref, "T") else plgpu.transpose_ref(ref, (1, 0))
