"""A matrix in pieces on several devices is worked on where it lies: what the rules of the
operations share.

A kernel is opaque to the compiler, which would gather all codes before it. A rule tells it, under a
plain ``jit`` and from the shardings that arrays already have, that the rows and blocks of the
matrix may be split: each device then runs the kernel of its choice on its piece. Nothing is asked
of the caller, and on one device nothing remains of it. Where pieces would end inside a block, and
where blocks run on from row to row, there are no pieces of the matrix, and codes are gathered.

Second-level scales are whole on every device, 1/64 of the bytes of the scales. Pieces that have
whole groups of 256 scales take their share of them; elsewhere the scales of the piece are decoded
beforehand, and with an index the piece of the one matrix's codes is copied out of its stack.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jqlora_kernels.layouts import BITSANDBYTES, SPAN
from jqlora_kernels.operands import Operands, select
from jqlora_kernels.scales import GROUP, Affine, add_rounded, look_up

WHOLE = PartitionSpec()


class Split(Protocol):
    """How one call is split: where its arguments and its result lie, and what a device does."""

    @property
    def specs(self) -> tuple[Any, ...]: ...

    @property
    def result(self) -> PartitionSpec: ...

    @property
    def run(self) -> Callable[..., jax.Array]: ...


def in_pieces(
    whole: Callable[..., jax.Array],
    split: Callable[..., Split],
    rule: dict[str, Any],
    *arguments: Any,
) -> jax.Array:
    """``whole(*arguments)``, or what ``split(mesh, *shapes)`` makes of it on several devices.

    ``rule`` is what the compiler's own propagation of shardings goes by.
    """
    # one device named beforehand has no pieces, and may be an absent one, which JAX cannot lower a
    # partitioned call for
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size == 1:
        return whole(*arguments)
    scalars = [leaf.ndim == 0 for leaf in jax.tree.leaves(arguments)]

    @custom_partitioning
    def call(*arguments: Any) -> jax.Array:
        return whole(*without_axes(arguments, scalars))

    def partition(mesh: Mesh, shapes: Any, _: Any) -> Any:
        chosen = split(mesh, *shapes)

        def piece(*arguments: Any) -> jax.Array:
            return chosen.run(*without_axes(arguments, scalars))

        def place(spec: PartitionSpec) -> NamedSharding:
            return NamedSharding(mesh, spec)

        def is_spec(leaf: Any) -> bool:
            return isinstance(leaf, PartitionSpec)

        placed = jax.tree.map(place, chosen.specs, is_leaf=is_spec)
        return mesh, piece, place(chosen.result), placed

    call.def_partition(partition=partition, **rule)
    # the partitioner's words know no arrays without axes
    return call(*jax.tree.map(lambda leaf: leaf[None] if leaf.ndim == 0 else leaf, arguments))


def without_axes(arguments: Any, scalars: list[bool]) -> Any:
    """Arguments whose scalars are scalars again."""
    leaves, structure = jax.tree.flatten(arguments)
    found = [leaf[0] if scalar else leaf for leaf, scalar in zip(leaves, scalars, strict=True)]
    return jax.tree.unflatten(structure, found)


class Blocks(NamedTuple):
    """How the rows of a matrix of ``columns`` may be cut: ``unit`` elements, ``parts`` to a byte,
    stay together, that is a block, and in a layout of its own a span."""

    columns: int
    block: int
    parts: int
    unit: int

    @classmethod
    def of(cls, columns: int, block: int, parts: int, layout: str) -> "Blocks":
        unit = block if layout == BITSANDBYTES else max(block, SPAN)
        return cls(columns, block, parts, unit)

    @property
    def divisible(self) -> bool:
        """Whether rows of the matrix end with units, so that it can have pieces."""
        return self.columns % self.unit == 0

    @property
    def several(self) -> bool:
        """Whether a row has units to be told apart; the rule has no word for a single one."""
        return self.divisible and self.columns > self.unit

    @property
    def values(self) -> str:
        """An axis of the matrix's columns in the words of the rule."""
        return "(s r)" if self.several else "k"

    def stored(self, operands: Operands) -> list[str]:
        """The operands in the words of the rule: ``n`` rows and ``s`` units of the matrix, of ``r``
        elements, ``q`` bytes and ``u`` blocks; all that has another letter is whole."""
        codes, scales, _, nested, index = operands
        lead = lead_words(codes.ndim - 2)
        matrix = [f"{lead}a b", f"{lead}d e"]
        if self.divisible:
            matrix = [f"{lead}n b", f"{lead}n d"]
        if self.several:
            matrix = [f"{lead}n (s q)", f"{lead}n {'s' if self.unit == self.block else '(s u)'}"]
        second = [f"{lead}g", lead or "o", "t"] if nested is not None else []
        matrix += matrix[1:] * (len(jax.tree.leaves(scales)) - 1)  # zero points lie as scales do
        return [*matrix, "c", *second, *(["i"] if index is not None else [])]

    def rule(self, words: str, contracted: str, free: str = "") -> dict[str, Any]:
        """Of a call in these ``words``; ``contracted`` letters are summed, ``free`` ones may be
        split beside those of the matrix."""
        split = ("n", "s") if self.several else ("n",) if self.divisible else ()
        sizes = {"r": self.unit, "q": self.unit // self.parts}
        if self.unit != self.block:  # then no axis is of units alone, which tells their number
            sizes |= {"u": self.unit // self.block, "s": self.columns // self.unit}
        letters = dict.fromkeys(re.findall(r"[a-z]\d*", words))  # the verifier wants this order
        return {
            "sharding_rule": words,
            "reduction_factors": tuple(letter for letter in contracted if letter in split),
            "need_replication_factors": tuple(
                letter for letter in letters if letter not in (*split, *free)
            ),
            **{name: size for name, size in sizes.items() if name in letters},
        }

    def pieces(self, mesh: Mesh, operands: Any) -> "Pieces":
        """Those that the matrix is in already."""
        codes, scales = operands[0], jax.tree.leaves(operands[1])[0]
        rows, columns = axes(codes, -2), axes(codes, -1)
        if not self.divisible or scales.shape[-2] % size(mesh, rows):
            rows = ()
        if not self.divisible or self.columns // self.unit % size(mesh, columns):
            columns = ()
        return Pieces(rows, columns, scales.shape[-2:])


def lead_words(count: int) -> str:
    """Names of the axes before the matrix, each with a space behind it."""
    return "".join(f"l{axis} " for axis in range(count))


def axes(array: Any, dimension: int) -> tuple[str, ...]:
    """The mesh axes that an array's dimension is split over."""
    spec = array.sharding.spec
    spec = (*spec, *[None] * (len(array.shape) - len(spec)))
    found = spec[dimension]
    return () if found is None else found if isinstance(found, tuple) else (found,)


def size(mesh: Mesh, names: tuple[str, ...]) -> int:
    """How many pieces splitting over these axes makes."""
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count


class Pieces(NamedTuple):
    """The mesh axes that a matrix's rows and columns are split over, and its (rows, blocks)."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    shape: tuple[int, int]

    def matrix(self, lead: int) -> PartitionSpec:
        """Of what has the matrix's axes behind ``lead`` others."""
        return PartitionSpec(*[None] * lead, self.rows, self.columns)

    def specs(self, operands: Operands) -> Any:
        """Of the operands."""
        codes, scales, _, nested, index = operands
        matrix = self.matrix(codes.ndim - 2)
        second = None if nested is None else (WHOLE, WHOLE, WHOLE)
        beside = jax.tree.map(lambda _: matrix, scales)
        return matrix, beside, WHOLE, second, None if index is None else WHOLE

    def local(self, operands: Operands) -> Operands:
        """Operands of this device's piece, with the second-level scales that are its own."""
        codes, scales, codebook, nested, index = operands
        if nested is None or isinstance(scales, Affine) or not (self.rows or self.columns):
            return operands
        absmax, offset, table = nested
        count = scales.shape[-2] * scales.shape[-1]
        if self.columns or count % GROUP:
            return self.with_plain_scales(operands)
        groups = count // GROUP
        first = lax.axis_index(self.rows) * groups
        absmax = lax.dynamic_slice_in_dim(absmax, first, groups, axis=-1)
        return codes, scales, codebook, (absmax, offset, table), index

    def with_plain_scales(self, operands: Operands) -> Operands:
        """Operands of one piece, of the one matrix if there is an index, with the scales decoded by
        their numbers in the whole matrix."""
        codes, scales, codebook, nested, index = operands
        codes, scales, nested = select(codes, scales, nested, index)
        assert nested is not None
        absmax, offset, table = nested
        row, column = (jnp.arange(count, dtype=jnp.int32) for count in scales.shape[-2:])
        if self.rows:
            row = row + lax.axis_index(self.rows) * scales.shape[-2]
        if self.columns:
            column = column + lax.axis_index(self.columns) * scales.shape[-1]
        group = (row[:, None] * self.shape[1] + column[None, :]) // GROUP
        scaled = look_up(table, scales) * jnp.take(absmax, group, axis=-1)
        return codes, add_rounded(scaled, offset[..., None, None]), codebook, None, None
