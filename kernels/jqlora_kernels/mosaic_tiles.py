"""What the Pallas-Mosaic kernels share: decoding one tile of codes in registers.

Two things have no Pallas primitive and are written against Mosaic itself, each with a plain
counterpart that the interpreter can run: looking a nibble up in a table that lies in registers
(``prmt`` picks bytes of a register pair by four selectors at once), and reading single elements of
an array in global memory (``gather``). All arithmetic around them is ordinary ``jax.numpy``.

A codebook entry is an fp32 number, four bytes. The table therefore has four planes, byte b of all
16 entries, four words each. Of a plane, ``prmt`` fetches the bytes of four nibbles among entries
0 ... 7 and among 8 ... 15, and then for each nibble the one that its top bit asks for; eight more
assemble the bytes of four planes into numbers. 23 instructions give four exact fp32 values.
"""

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

from jqlora_kernels.scales import GROUP, add_rounded

HALF = 64
"""Rows that a warp group decodes at once, and columns in either half of a span of codes."""
WORDS = 16
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""One value for each row of a tile in ``Layout.WGMMA``, where the lanes that own the row see it."""

Refs = Sequence[Any]


def table_words(codebook: jax.Array) -> jax.Array:
    """int32 [16]: the planes of a codebook fp32 [16], four words each, lowest byte first."""
    octets = lax.bitcast_convert_type(codebook, jnp.uint8)  # [16, 4], little-endian
    planes = octets.T.reshape(4, 4, 4)
    return lax.bitcast_convert_type(planes, jnp.int32).reshape(WORDS)


def look_up_nibbles(word: Any, words: Sequence[Any], prmt: Callable, constant: Callable) -> list:
    """Bits of the fp32 values of the eight nibbles of ``word``, from the lowest nibble up.

    Written over ``&``, ``|``, ``>>`` (logical), ``prmt(a, b, selectors)`` and ``constant``, so that
    the instructions emitted for a GPU are the ones that the tests run on a CPU.
    """
    values = []
    for _ in range(2):
        entry = word & constant(0x7777)
        upper = ((word >> constant(1)) & constant(0x4444)) | constant(0x3210)
        planes = []
        for i in range(0, WORDS, 4):
            below, above = (prmt(words[i + j], words[i + j + 1], entry) for j in (0, 2))
            planes.append(prmt(below, above, upper))
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


def decode(codes: Any, words: Sequence[Any], plain: bool) -> tuple[jax.Array, jax.Array]:
    """fp32 codebook values [64, 64] of the (low, high) nibbles of a tile of codes, in order.

    ``codes`` is a tile uint8 [64, 64] in shared memory, laid out as ``layouts.HOPPER``; ``words``
    are the 16 words of the table.
    """
    if plain:
        return decode_plain(codes[...], words)
    tile = plgpu.ShapeDtypeStruct((HALF, HALF), jnp.float32, layout=plgpu.Layout.WGMMA)
    splat = plgpu.Layout.WG_SPLAT(())
    kinds = (plgpu.Layout.WGMMA_8BIT, *[splat] * WORDS)
    emit = plgpu.inline_mgpu(arg_types=kinds, return_type=(tile, tile))(decode_registers)
    return emit(load(codes, plgpu.Layout.WGMMA_8BIT), *words)


def decode_plain(codes: jax.Array, words: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """What ``decode_registers`` computes, for the interpreter."""
    octets = lax.bitcast_convert_type(jnp.stack(words).reshape(4, 4), jnp.uint8)
    codebook = lax.bitcast_convert_type(octets.reshape(4, WORDS).T, jnp.float32)
    # axes: row, sixteen, lane, upper eight, odd; the middle ones change places
    lanes = codes.astype(jnp.int32).reshape(HALF, 4, 4, 2, 2)
    ordered = jnp.swapaxes(lanes, 2, 3).reshape(HALF, HALF)
    return codebook[ordered & 15], codebook[ordered >> 4]


def decode_registers(_: Any, codes: Any, *table: Any) -> tuple[Any, Any]:
    """Every lane: a word of four codes into the four low and the four high values that it owns."""
    words = [Word(entry.registers.flat[0]) for entry in table]
    shape = mgpu.WGMMA_LAYOUT.registers_shape((HALF, HALF))
    halves = np.empty(shape, object), np.empty(shape, object)
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), f32)
    for place, register in np.ndenumerate(codes.registers):
        word = Word(mgpu.utils.bitcast(register, i32))
        found = look_up_nibbles(word, words, Word.prmt, Word.constant)
        values = [arith.bitcast(f32, value.value) for value in found]
        for nibble, half in enumerate(halves):
            for eight in range(2):
                two = values[4 * eight + nibble : 4 * eight + nibble + 3 : 2]
                target = (place[0], 2 * place[1] + eight, *place[2:])
                half[target] = vector.from_elements(pair, two)
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
