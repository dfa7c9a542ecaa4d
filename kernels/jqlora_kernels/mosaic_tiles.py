"""What the Pallas-Mosaic kernels share: decoding one tile of codes in registers.

Two things have no Pallas primitive and are written against Mosaic itself, each with a plain
counterpart that the interpreter can run: looking a nibble up in a table that lies in registers
(``prmt`` picks bytes of a register pair by four selectors at once), and reading single elements of
an array in global memory (``gather``). All arithmetic around them is ordinary ``jax.numpy``.

A codebook entry is an fp32 number, four bytes. The table therefore has four planes, byte b of all
16 entries, four words each. Of a plane, ``prmt`` fetches the bytes of four nibbles among entries
0 ... 7 and among 8 ... 15, and then for each nibble the one that its top bit asks for; eight more
assemble the bytes of four planes into numbers. 23 instructions give four exact fp32 values.

A table of 16-bit entries has two planes, and 11 instructions give four values already paired as the
operand wants them: twice as fast, at the price of a codebook rounded beforehand.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from jqlora_kernels.scales import GROUP, Nested, add_rounded

GROUPS = 2
"""Warp groups that multiply; one more moves memory."""
HALF = 64
"""Rows that a warp group decodes at once, and columns in either half of a span of codes."""
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""One value for each row of a tile in ``Layout.WGMMA``, where the lanes that own the row see it."""

Refs = Sequence[Any]


def flat_operands(
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None,
    index: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """(layer [1], codes [L, N, K/2], table words, scales [L, blocks], *nested [L, ...])."""
    layer = jnp.zeros(1, jnp.int32) if index is None else index.reshape(1)
    stack = (codes.shape[0] if index is not None else 1, *codes.shape[-2:])
    operands = (layer, codes.reshape(stack), table_words(codebook), scales.reshape(stack[0], -1))
    if nested is None:
        return operands
    absmax, offset, table = nested
    return (*operands, absmax.reshape(stack[0], -1), offset.reshape(stack[0]), table)


def kernel(
    body: Any, out: Any, scratch: dict[str, Any], grid: dict[str, int], interpret: bool
) -> Any:
    """``body`` as a kernel of two warp groups that multiply and one that moves memory."""
    options: dict[str, Any] = {}
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
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **options,
    )


def table_words(codebook: jax.Array) -> jax.Array:
    """int32 [16] or [8]: the planes of a codebook [16] of 32 or of 16 bits, lowest byte first."""
    octets = lax.bitcast_convert_type(codebook, jnp.uint8)  # [16, bytes], little-endian
    planes = octets.T.reshape(-1, 4, 4)
    return lax.bitcast_convert_type(planes, jnp.int32).reshape(-1)


def look_up_nibbles(word: Any, words: Sequence[Any], prmt: Callable, constant: Callable) -> list:
    """Bits of the entries for the eight nibbles of ``word``.

    Of a table of 32-bit entries (16 words) eight values, from the lowest nibble up. Of 16-bit
    entries (8 words) four pairs: bytes 0 and 1, their low nibbles, then their high ones; bytes 2
    and 3 likewise.

    Written over ``&``, ``|``, ``>>`` (logical), ``prmt(a, b, selectors)`` and ``constant``, so that
    the instructions emitted for a GPU are the ones that the tests run on a CPU.
    """
    values = []
    for _ in range(2):
        entry = word & constant(0x7777)
        upper = ((word >> constant(1)) & constant(0x4444)) | constant(0x3210)
        planes = []
        for i in range(0, len(words), 4):
            below, above = (prmt(words[i + j], words[i + j + 1], entry) for j in (0, 2))
            planes.append(prmt(below, above, upper))
        if len(planes) == 2:
            values += [prmt(planes[0], planes[1], constant(s)) for s in (0x6240, 0x7351)]
        else:
            low = [prmt(planes[0], planes[1], constant(s)) for s in (0x5140, 0x7362)]
            high = [prmt(planes[2], planes[3], constant(s)) for s in (0x5140, 0x7362)]
            for a, b in zip(low, high, strict=True):
                values += [prmt(a, b, constant(s)) for s in (0x5410, 0x7632)]
        word = word >> constant(16)
    return values


class Word:
    """A 32-bit register, with the operators that ``look_up_nibbles`` is written over."""

    def __init__(self, value: Any):
        self.value = value

    def __and__(self, other: "Word") -> "Word":
        return Word(arith.andi(self.value, other.value))

    def __or__(self, other: "Word") -> "Word":
        return Word(arith.ori(self.value, other.value))

    def __rshift__(self, other: "Word") -> "Word":
        return Word(arith.shrui(self.value, other.value))

    @staticmethod
    def constant(value: int) -> "Word":
        i32 = ir.IntegerType.get_signless(32)
        return Word(arith.constant(i32, ir.IntegerAttr.get(i32, value)))

    @staticmethod
    def prmt(a: "Word", b: "Word", selectors: "Word") -> "Word":
        return Word(mgpu.utils.prmt(a.value, b.value, selectors.value))


def decode(
    codes: Any, words: Sequence[Any], dtype: Any, plain: bool
) -> tuple[jax.Array, jax.Array]:
    """Codebook values [64, 64] of the (low, high) nibbles of a tile of codes, in order.

    ``codes`` is a tile uint8 [64, 64] in shared memory, laid out as ``layouts.HOPPER``; ``words``
    are those of a table whose entries have ``dtype``.
    """
    if plain:
        return decode_plain(codes[...], words, dtype)
    tile = plgpu.ShapeDtypeStruct((HALF, HALF), dtype, layout=plgpu.Layout.WGMMA)
    splat = plgpu.Layout.WG_SPLAT(())
    kinds = (plgpu.Layout.WGMMA_8BIT, *[splat] * len(words))
    registers = functools.partial(decode_registers, dtype=dtype)
    emit = plgpu.inline_mgpu(arg_types=kinds, return_type=(tile, tile))(registers)
    return emit(load(codes, plgpu.Layout.WGMMA_8BIT), *words)


def decode_plain(codes: jax.Array, words: Sequence[Any], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """What ``decode_registers`` computes, for the interpreter."""
    octets = lax.bitcast_convert_type(jnp.stack(words), jnp.uint8)
    codebook = lax.bitcast_convert_type(octets.reshape(-1, 16).T, dtype)
    # axes: row, sixteen, lane, upper eight, odd; the middle ones change places
    lanes = codes.astype(jnp.int32).reshape(HALF, 4, 4, 2, 2)
    ordered = jnp.swapaxes(lanes, 2, 3).reshape(HALF, HALF)
    return codebook[ordered & 15], codebook[ordered >> 4]


def decode_registers(_: Any, codes: Any, *table: Any, dtype: Any) -> tuple[Any, Any]:
    """Every lane: a word of four codes into the four low and the four high values that it owns."""
    words = [Word(entry.registers.flat[0]) for entry in table]
    shape = mgpu.WGMMA_LAYOUT.registers_shape((HALF, HALF))
    halves = np.empty(shape, object), np.empty(shape, object)
    i32 = ir.IntegerType.get_signless(32)
    element = mgpu.utils.dtype_to_ir_type(np.dtype(dtype))
    pair = ir.VectorType.get((2,), element)
    for place, register in np.ndenumerate(codes.registers):
        word = Word(mgpu.utils.bitcast(register, i32))
        found = [value.value for value in look_up_nibbles(word, words, Word.prmt, Word.constant)]
        for nibble, half in enumerate(halves):
            for eight in range(2):
                target = (place[0], 2 * place[1] + eight, *place[2:])
                if len(found) == 4:
                    half[target] = mgpu.utils.bitcast(found[2 * eight + nibble], pair)
                else:
                    two = found[4 * eight + nibble : 4 * eight + nibble + 3 : 2]
                    values = [arith.bitcast(element, value) for value in two]
                    half[target] = vector.from_elements(pair, values)
    low, high = (
        mgpu.FragmentedArray(_registers=half, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)
        for half in halves
    )
    return low, high


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


def load_scales(refs: Refs, layer: jax.Array, blocks: jax.Array, plain: bool) -> jax.Array:
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


def load(ref: Any, layout: Any) -> jax.Array:
    """``plgpu.load`` of a whole reference; JAX 0.10 wants an index there."""
    if "idx" in inspect.signature(plgpu.load).parameters:
        return plgpu.load(ref, (), layout=layout)
    return plgpu.load(ref, layout=layout)  # pyright: ignore


def turned(ref: Any) -> Any:
    """The reference to a matrix, transposed; JAX 0.10 has a function for it, 0.12 a property."""
    return ref.T if hasattr(ref, "T") else plgpu.transpose_ref(ref, (1, 0))
