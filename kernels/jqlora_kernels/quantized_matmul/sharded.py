"""Products with a matrix that lies in pieces on several devices: every piece is multiplied where it
lies, and only activations travel.

Under plain ``jit`` the pure XLA backend is partitioned by the compiler; a kernel is opaque to it,
which would gather all codes first. Here the pieces are told, and each device runs its own kernel.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jqlora_kernels import layouts
from jqlora_kernels.dequantize_blockwise.reference import select
from jqlora_kernels.quantized_matmul.api import quantized_matmul
from jqlora_kernels.scales import GROUP, Nested, add_rounded, look_up


def sharded_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None = None,
    index: jax.Array | None = None,
    *,
    block: int,
    features: int,
    mesh: Mesh,
    axis: str,
    over: Literal["outputs", "inputs"],
    layout: str = layouts.BITSANDBYTES,
    backend: str | None = None,
) -> jax.Array:
    """``quantized_matmul`` with rows ("outputs") or columns ("inputs") of the matrix split over the
    mesh axis ``axis``; the result [M, N] is split along N, or summed and whole.

    Over outputs ``x`` is whole on every device and no value travels. Over inputs ``x`` is split
    along K and the partial products are added up. Second-level scales are split along whole groups
    of 256 where the pieces have such; elsewhere every device has them all, decodes the scales of
    its piece beforehand, and copies its piece of the one matrix's codes out of the stack. Raises
    ``ValueError`` where the pieces do not end with rows, or with blocks.
    """
    parts, (rows, blocks) = mesh.shape[axis], scales.shape[-2:]
    split = rows if over == "outputs" else blocks
    if rows != features or split % parts:
        raise ValueError(
            f"{rows} rows of {blocks} blocks do not split into {parts} pieces over {over}"
        )
    aligned = over == "outputs" and (rows // parts * blocks) % GROUP == 0
    lead = (None,) * (codes.ndim - 2)
    by_rows = over == "outputs"
    matrix = PartitionSpec(*lead, axis, None) if by_rows else PartitionSpec(*lead, None, axis)
    whole = PartitionSpec()
    groups = PartitionSpec(*lead, axis) if aligned else whole
    second = None if nested is None else (groups, whole, whole)

    def piece(x: jax.Array, *operands) -> jax.Array:
        if nested is not None and not aligned:
            operands = with_plain_scales(operands, lax.axis_index(axis), by_rows, blocks)
        local = features // parts if by_rows else features
        y = quantized_matmul(
            x, *operands, block=block, features=local, layout=layout, backend=backend
        )
        return y if by_rows else lax.psum(y, axis)

    run = jax.shard_map(
        piece,
        mesh=mesh,
        in_specs=(
            whole if by_rows else PartitionSpec(None, axis),
            matrix,
            matrix,
            whole,
            second,
            None if index is None else whole,
        ),
        out_specs=PartitionSpec(None, axis) if by_rows else whole,
        check_vma=False,
    )
    return run(x, codes, scales, codebook, nested, index)


def with_plain_scales(
    operands: tuple[Any, ...], piece: jax.Array, by_rows: bool, blocks: int
) -> tuple[Any, ...]:
    """Operands of one piece with the scales of its one matrix decoded, by their numbers in the
    whole matrix, which has ``blocks`` to a row."""
    codes, scales, codebook, nested, index = operands
    codes, scales, nested = select(codes, scales, nested, index)
    assert nested is not None
    absmax, offset, table = nested
    row, column = (jnp.arange(size, dtype=jnp.int32) for size in scales.shape)
    if by_rows:
        row = row + piece * scales.shape[0]
    else:
        column = column + piece * scales.shape[1]
    group = (row[:, None] * blocks + column[None, :]) // GROUP
    plain = add_rounded(look_up(table, scales) * absmax[group], offset)
    return codes, plain, codebook, None, None
