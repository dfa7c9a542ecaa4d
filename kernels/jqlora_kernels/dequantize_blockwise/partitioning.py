"""The partitioning rule of decoding: the pieces of a matrix become the pieces of its values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from jqlora_kernels.operands import Operands
from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.partitioning import Blocks, Pieces, in_pieces, lead_words, size

Decode = Callable[[Operands, int], jax.Array]


def partitionable(decode: Decode, *, block: int, layout: str) -> Decode:
    """``decode(operands, columns)``, [*lead, rows, columns], with the rule above."""

    def call(operands: Operands, columns: int) -> jax.Array:
        blocks = Blocks.of(columns, block, codes_per_byte(operands[2]), layout)
        lead = operands[0].ndim - 2 if operands[-1] is None else 0
        rows = "n" if blocks.divisible else "m"
        result = f"{lead_words(lead)}{rows} {blocks.values}"
        words = f"{', '.join(blocks.stored(operands))} -> {result}"

        def split(mesh: Mesh, stored: Any) -> SplitDecode:
            pieces = blocks.pieces(mesh, stored)
            local = columns // size(mesh, pieces.columns)
            return SplitDecode(decode, local, lead, pieces, stored)

        rule = blocks.rule(words, contracted="")
        return in_pieces(lambda stored: decode(stored, columns), split, rule, operands)

    return call


class SplitDecode(NamedTuple):
    """One decoding, of ``columns`` and all rows of a device's piece, behind ``lead`` axes."""

    decode: Decode
    columns: int
    lead: int
    pieces: Pieces
    stored: Any

    @property
    def specs(self) -> tuple[Any, ...]:
        return (self.pieces.specs(self.stored),)

    @property
    def result(self) -> PartitionSpec:
        return self.pieces.matrix(self.lead)

    def run(self, operands: Operands) -> jax.Array:
        """This device's part."""
        return self.decode(self.pieces.local(operands), self.columns)
