"""Looking codes up in registers, for the Pallas-Mosaic kernels.

A table of 16 lies in registers: ``prmt`` picks bytes of a register pair by four selectors at once.
It has no Pallas primitive and is written against Mosaic itself, with a plain counterpart that the
interpreter can run.

A codebook entry is an fp32 number, four bytes. The table therefore has four planes, byte b of all
16 entries, four words each. Of a plane, ``prmt`` fetches the bytes of four nibbles among entries
0 ... 7 and among 8 ... 15, and then for each nibble the one that its top bit asks for; eight more
assemble the bytes of four planes into numbers. 23 instructions give four exact fp32 values.

A table of 16-bit entries has two planes, and 11 instructions give four values already paired as the
operand wants them: twice as fast, at the price of a codebook rounded beforehand.

A table of 256 fp32 entries, for codes of 8 bits, fits no registers: it is copied into shared memory
once a program, and every value is one load from there.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

HALF = 64
"""Rows that a warp group decodes at once, and columns in either half of a span of codes."""


def table_operand(codebook: jax.Array, entry: Any) -> jax.Array:
    """What a kernel reads of a codebook: of one of 16 the words of a table of dtype ``entry``."""
    return table_words(codebook.astype(entry)) if codebook.shape == (16,) else codebook


def table_scratch(codebook: jax.Array, groups: int) -> dict[str, Any]:
    """Shared memory for one of 256, a copy for each warp group, so that none waits for another."""
    if codebook.shape == (16,):
        return {}
    return {"table": plgpu.SMEM((groups, *codebook.shape), codebook.dtype)}


def table_of(operand: Any, shared: Any, plain: bool) -> Any:
    """The table as ``decode`` takes it: words in registers, or the reference ``shared``."""
    if shared is not None:
        return shared
    return operand[...] if plain else [operand[i] for i in range(operand.shape[0])]


def fill_table(operand: Any, shared: Any, plain: bool) -> None:
    """Copies the table into ``shared``, unless it is in registers; each warp group its own."""
    if shared is not None:
        strided = plgpu.Layout.WG_STRIDED((256,), 2)
        shared[...] = operand[...] if plain else load(operand, strided)
        plgpu.commit_smem()


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


def decode(codes: Any, table: Any, parts: int, entry: Any, plain: bool) -> list[jax.Array]:
    """Codebook values [64, 64] of the left and the right half of a tile of codes, in order.

    ``codes`` is a tile in shared memory, laid out as ``layouts.HOPPER``: uint8 [64, 64] with two
    ``parts`` to a byte or [64, 128] with one. ``table`` is what ``table_of`` returns for a table of
    dtype ``entry``.
    """
    if parts == 2:
        return decode_nibbles(codes, table, entry, plain)
    halves = [codes.at[:, pl.ds(half * HALF, HALF)] for half in range(2)]
    if plain:
        return [table[...][in_order(half[...])] for half in halves]
    tile = plgpu.ShapeDtypeStruct((HALF, HALF), entry, layout=plgpu.Layout.WGMMA)
    kinds = (plgpu.Layout.WGMMA_8BIT, plgpu.RefType())
    emit = plgpu.inline_mgpu(arg_types=kinds, return_type=tile)(byte_registers)
    return [emit(load(half, plgpu.Layout.WGMMA_8BIT), table) for half in halves]


def decode_nibbles(codes: Any, words: Any, entry: Any, plain: bool) -> list[jax.Array]:
    """:func:`decode` for the table whose words are in registers."""
    if plain:
        octets = lax.bitcast_convert_type(words, jnp.uint8)
        codebook = lax.bitcast_convert_type(octets.reshape(-1, 16).T, entry)
        ordered = in_order(codes[...])
        return [codebook[ordered & 15], codebook[ordered >> 4]]
    tile = plgpu.ShapeDtypeStruct((HALF, HALF), entry, layout=plgpu.Layout.WGMMA)
    splat = plgpu.Layout.WG_SPLAT(())
    kinds = (plgpu.Layout.WGMMA_8BIT, *[splat] * len(words))
    registers = functools.partial(nibble_registers, dtype=entry)
    emit = plgpu.inline_mgpu(arg_types=kinds, return_type=(tile, tile))(registers)
    return [*emit(load(codes, plgpu.Layout.WGMMA_8BIT), *words)]


def in_order(codes: jax.Array) -> jax.Array:
    """Bytes [64, 64] of the layout as int32 in the order of the elements, for the interpreter."""
    # axes: row, sixteen, lane, upper eight, odd; the middle ones change places
    lanes = codes.astype(jnp.int32).reshape(HALF, 4, 4, 2, 2)
    return jnp.swapaxes(lanes, 2, 3).reshape(HALF, HALF)


def byte_registers(_: Any, codes: Any, table: Any) -> Any:
    """Every lane: a word of four codes into the four values that it owns, a load for each."""
    shape = mgpu.WGMMA_LAYOUT.registers_shape((HALF, HALF))
    registers = np.empty(shape, object)
    i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.F32Type.get())
    for place, register in np.ndenumerate(codes.registers):
        word = Word(mgpu.utils.bitcast(register, i32))
        values = []
        for _ in range(4):
            code = (word & Word.constant(0xFF)).value
            values.append(memref.load(table, [arith.index_cast(ir.IndexType.get(), code)]))
            word = word >> Word.constant(8)
        for eight in range(2):
            target = (place[0], 2 * place[1] + eight, *place[2:])
            registers[target] = vector.from_elements(pair, values[2 * eight : 2 * eight + 2])
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def nibble_registers(_: Any, codes: Any, *table: Any, dtype: Any) -> tuple[Any, Any]:
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


def load(ref: Any, layout: Any) -> jax.Array:
    """``plgpu.load`` of a whole reference; JAX 0.10 wants an index there."""
    if "idx" in inspect.signature(plgpu.load).parameters:
        return plgpu.load(ref, (), layout=layout)
    return plgpu.load(ref, layout=layout)  # pyright: ignore
