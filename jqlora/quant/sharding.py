"""Where the pieces of quantized kernels lie on a mesh of devices.

Products find their rule in the shardings of the arrays alone (``jqlora_kernels``), so a tree placed
as told here is trained by the same compiled step as any other: every device multiplies by its own
pieces, and only activations travel.
"""

import dataclasses

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jqlora.errors import ConfigError
from jqlora.quant.qtensor import NestedScales, QTensor
from jqlora_kernels.layouts import BITSANDBYTES, SPAN


def split_outputs(q: QTensor, mesh: Mesh, axis: str) -> QTensor:
    """Shardings that split the kernel [*lead, K, N] of ``q`` along N over the mesh axis ``axis``.

    Its result is split likewise, and no value travels for it; of the gradient, partial sums do. The
    leaves are ``NamedSharding``, for ``jax.device_put(q, split_outputs(q, mesh, "model"))``. Raises
    ``ConfigError`` where the pieces would not be even, and where blocks run on from output to
    output.
    """
    return _split(q, mesh, axis, "outputs", q.matrix_shape[1])


def split_inputs(q: QTensor, mesh: Mesh, axis: str) -> QTensor:
    """As :func:`split_outputs`, along K: every piece takes its features of ``x`` (what a kernel
    split along N before it gives) and partial products are summed. Pieces must end with blocks."""
    unit = q.block if q.layout == BITSANDBYTES else max(q.block, SPAN)
    return _split(q, mesh, axis, "inputs", q.matrix_shape[0] // unit)


def _split(q: QTensor, mesh: Mesh, axis: str, over: str, units: int) -> QTensor:
    pieces = mesh.shape[axis]
    if q.matrix_shape[0] % q.block or units % pieces:
        raise ConfigError(
            f"kernel {q.shape} in blocks of {q.block} does not split over its {over} into {pieces} "
            "even pieces of whole rows and blocks"
        )
    lead = (None,) * len(q.lead)
    split = (axis, None) if over == "outputs" else (None, axis)
    matrix = NamedSharding(mesh, PartitionSpec(*lead, *split))
    whole = NamedSharding(mesh, PartitionSpec())
    nested = None
    if q.nested is not None:
        nested = NestedScales(absmax=whole, offset=whole)  # pyright: ignore
    zeros, order = (None if q.zeros is None else matrix), (None if q.order is None else whole)
    return dataclasses.replace(
        q, codes=matrix, scales=matrix, nested=nested, zeros=zeros, order=order
    )
