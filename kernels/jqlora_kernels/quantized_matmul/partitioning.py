"""The partitioning rule of the products: the rows of ``x`` may be split too, and only activations
travel.

Products that were split along the contracted axis are summed. The matrix decides: where ``x`` is
split by the same devices along its own rows, ``x`` is gathered. See ``jqlora_kernels.partitioning``
for what becomes of the matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jqlora_kernels.operands import Operands
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.partitioning import Blocks, Pieces, axes, in_pieces, size

Product = Callable[[jax.Array, Operands, int], jax.Array]


def partitionable(product: Product, *, block: int, layout: str, transposed: bool) -> Product:
    """``product(x, operands, features)`` with the rule above, ``features`` being the result's.

    ``transposed`` products contract the rows of the matrix, the others its columns.
    """

    def call(x: jax.Array, operands: Operands, features: int) -> jax.Array:
        columns = features if transposed else x.shape[1]
        blocks = Blocks.of(columns, block, codes_per_byte(operands[2]), layout)
        outer, inner = ("n", blocks.values) if transposed else (blocks.values, "n")
        words = f"{', '.join([f'm {outer}', *blocks.stored(operands)])} -> m {inner}"

        def split(mesh: Mesh, x: Any, stored: Any) -> SplitProduct:
            pieces = blocks.pieces(mesh, stored)
            batch = axes(x, 0)
            if {*pieces.rows, *pieces.columns} & {*batch} or x.shape[0] % size(mesh, batch):
                batch = ()
            kept, summed = pieces.rows, pieces.columns
            if transposed:
                kept, summed = summed, kept
            local = features // size(mesh, kept)
            return SplitProduct(product, local, batch, kept, summed, pieces, stored)

        rule = blocks.rule(words, contracted="n" if transposed else "s", free="m")
        return in_pieces(lambda x, stored: product(x, stored, features), split, rule, x, operands)

    return call


class SplitProduct(NamedTuple):
    """One product whose ``x`` is split over ``batch`` along its rows; the result's ``features`` of
    a device are what ``kept`` leaves, and ``summed`` holds parts of the sum."""

    product: Product
    features: int
    batch: tuple[str, ...]
    kept: tuple[str, ...]
    summed: tuple[str, ...]
    pieces: Pieces
    stored: Any

    @property
    def specs(self) -> tuple[Any, ...]:
        return PartitionSpec(self.batch, self.summed), self.pieces.specs(self.stored)

    @property
    def result(self) -> PartitionSpec:
        return PartitionSpec(self.batch, self.kept)

    def run(self, x: jax.Array, operands: Operands) -> jax.Array:
        """This device's part."""
        y = self.product(x, self.pieces.local(operands), self.features)
        return lax.psum(y, self.summed) if self.summed else y
