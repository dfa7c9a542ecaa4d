"""The partitioning rule of the products: a matrix in pieces on several devices is multiplied where
it lies, and only activations travel.

A kernel is opaque to the compiler, which would gather all codes before it. The rule tells it, under
a plain ``jit`` and from the shardings that arrays already have, that the rows of ``x`` and the rows
and blocks of the matrix may be split: each device then runs the kernel of its choice on its piece,
and products that were split along the contracted axis are summed. Nothing is asked of the caller,
and on one device nothing remains of it.

The matrix decides: where ``x`` is split by the same devices along its own rows, ``x`` is gathered.
Where pieces would end inside a block, and where blocks run on from row to row, there are no pieces
of the matrix, and codes are gathered.

Second-level scales are whole on every device, 1/64 of the bytes of the scales. Pieces that have
whole groups of 256 scales take their share of them; elsewhere the scales of the piece are decoded
beforehand, and the piece of the one matrix's codes is copied out of its stack.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jqlora_kernels.batching import Operands
from jqlora_kernels.dequantize_blockwise.reference import select
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.scales import GROUP, add_rounded, look_up


def partitionable(
    product: Callable[[jax.Array, Operands, int], jax.Array], *, block: int, transposed: bool
) -> Callable[[jax.Array, Operands, int], jax.Array]:
    """``product(x, operands, features)`` with the rule above, ``features`` being the result's.

    ``transposed`` products contract the rows of the matrix, the others its columns.
    """

    def call(x: jax.Array, operands: Operands, features: int) -> jax.Array:
        # one device named beforehand has no pieces, and may be an absent one, which JAX cannot
        # lower a partitioned call for
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.size == 1:
            return product(x, operands, features)
        rule = Rule(transposed, block, codes_per_byte(operands[2]), x.shape[1], features)
        scalars = [leaf.ndim == 0 for leaf in jax.tree.leaves(operands)]

        @custom_partitioning
        def whole(x: jax.Array, operands: Operands) -> jax.Array:
            return product(x, without_axes(operands, scalars), features)

        def partition(mesh: Mesh, arguments: Any, _: Any) -> Any:
            split = rule.split(mesh, *arguments)

            def piece(x: jax.Array, operands: Operands) -> jax.Array:
                local = split.local(without_axes(operands, scalars))
                y = product(x, local, features // size(mesh, split.kept))
                return lax.psum(y, split.summed) if split.summed else y

            def place(spec: PartitionSpec) -> NamedSharding:
                return NamedSharding(mesh, spec)

            specs = split.specs(arguments[1])
            placed = jax.tree.map(place, specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
            return mesh, piece, place(split.result), placed

        whole.def_partition(partition=partition, **rule.shardy(operands))
        # the partitioner's words know no arrays without axes
        return whole(x, jax.tree.map(lambda leaf: leaf[None] if leaf.ndim == 0 else leaf, operands))

    return call


def without_axes(operands: Operands, scalars: list[bool]) -> Operands:
    """Operands whose scalars are scalars again."""
    leaves, structure = jax.tree.flatten(operands)
    found = [leaf[0] if scalar else leaf for leaf, scalar in zip(leaves, scalars, strict=True)]
    return jax.tree.unflatten(structure, found)


class Rule(NamedTuple):
    """What the pieces of one product may be."""

    transposed: bool
    block: int
    parts: int
    width: int
    features: int

    @property
    def columns(self) -> int:
        """K of the matrix."""
        return self.features if self.transposed else self.width

    @property
    def divisible(self) -> bool:
        """Whether rows of the matrix end with blocks, so that it can have pieces."""
        return self.columns % self.block == 0

    def shardy(self, operands: Operands) -> dict[str, Any]:
        """The rule in the partitioner's words: ``m`` rows of x, ``n`` rows and ``s`` blocks of the
        matrix, of ``r`` elements and ``q`` bytes; all that has another letter is whole."""
        codes, _, _, nested, index = operands
        lead = "l " * (codes.ndim - 2)
        inputs, matrix = "k", [f"{lead}a b", f"{lead}d e"]
        if self.divisible:
            inputs, matrix = "(s r)", [f"{lead}n (s q)", f"{lead}n s"]
        x, result = ("n", inputs) if self.transposed else (inputs, "n")
        stored = [f"m {x}", *matrix, "c"]
        stored += [f"{lead}g", lead or "o", "t"] if nested is not None else []
        stored += ["i"] if index is not None else []
        free = {"m", "n", "s"} if self.divisible else {"m"}
        sizes = {"r": self.block, "q": self.block // self.parts} if self.divisible else {}
        rule = f"{', '.join(stored)} -> m {result}"
        contracted = ("n" if self.transposed else "s",) if self.divisible else ()
        letters = dict.fromkeys(re.findall("[a-z]", rule))  # the verifier wants them in this order
        whole = tuple(letter for letter in letters if letter not in free)
        factors = {"reduction_factors": contracted, "need_replication_factors": whole}
        return {"sharding_rule": rule} | factors | sizes

    def split(self, mesh: Mesh, x: Any, operands: Any) -> "Split":
        """The pieces that the matrix is in already, and rows of x by the devices left."""
        codes, scales = operands[0], operands[1]
        rows, columns = axes(codes, -2), axes(codes, -1)
        if not self.divisible or scales.shape[-2] % size(mesh, rows):
            rows = ()
        if not self.divisible or scales.shape[-1] % size(mesh, columns):
            columns = ()
        taken = {*rows, *columns}
        batch = axes(x, 0)
        if taken & {*batch} or x.shape[0] % size(mesh, batch):
            batch = ()
        return Split(self, batch, rows, columns, scales.shape[-2:])


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


class Split(NamedTuple):
    """How one product is split: mesh axes of ``x``'s rows, the matrix's rows and its columns, which
    has ``shape`` (rows, blocks)."""

    rule: Rule
    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    shape: tuple[int, int]

    @property
    def kept(self) -> tuple[str, ...]:
        """The mesh axes that the result's features are split over."""
        return self.columns if self.rule.transposed else self.rows

    @property
    def summed(self) -> tuple[str, ...]:
        """The mesh axes that hold parts of the sum."""
        return self.rows if self.rule.transposed else self.columns

    @property
    def result(self) -> PartitionSpec:
        """Of the product."""
        return PartitionSpec(self.batch, self.kept)

    def specs(self, operands: Operands) -> Any:
        """Of ``(x, operands)``."""
        codes, _, _, nested, index = operands
        whole = PartitionSpec()
        matrix = PartitionSpec(*[None] * (codes.ndim - 2), self.rows, self.columns)
        second = None if nested is None else (whole, whole, whole)
        stored = (matrix, matrix, whole, second, None if index is None else whole)
        return PartitionSpec(self.batch, self.summed), stored

    def local(self, operands: Operands) -> Operands:
        """Operands of this device's piece, with the second-level scales that are its own."""
        codes, scales, codebook, nested, index = operands
        if nested is None or not (self.rows or self.columns):
            return operands
        absmax, offset, table = nested
        count = scales.shape[-2] * scales.shape[-1]
        if self.columns or count % GROUP:
            return with_plain_scales(operands, self)
        groups = count // GROUP
        first = lax.axis_index(self.rows) * groups
        absmax = lax.dynamic_slice_in_dim(absmax, first, groups, axis=-1)
        return codes, scales, codebook, (absmax, offset, table), index


def with_plain_scales(operands: Operands, split: Split) -> Operands:
    """Operands of one piece with the scales of its one matrix decoded, by their numbers in the
    whole matrix."""
    codes, scales, codebook, nested, index = operands
    codes, scales, nested = select(codes, scales, nested, index)
    assert nested is not None
    absmax, offset, table = nested
    row, column = (jnp.arange(count, dtype=jnp.int32) for count in scales.shape)
    if split.rows:
        row = row + lax.axis_index(split.rows) * scales.shape[0]
    if split.columns:
        column = column + lax.axis_index(split.columns) * scales.shape[1]
    group = (row[:, None] * split.shape[1] + column[None, :]) // GROUP
    plain = add_rounded(look_up(table, scales) * absmax[group], offset)
    return codes, plain, codebook, None, None
