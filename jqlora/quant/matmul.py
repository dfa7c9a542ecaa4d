"""The product of activations with a quantized kernel."""

import math

import jax

from jqlora.quant.qtensor import QTensor
from jqlora_kernels.quantized_matmul import quantized_matmul as multiply


def quantized_matmul(x: jax.Array, q: QTensor, index: jax.Array | None = None) -> jax.Array:
    """``x`` [..., K] times the kernel (K, N) of ``q``: [..., N] in ``x.dtype``.

    Equals ``x @ q.dequantize(x.dtype)`` with products accumulated in fp32. ``q`` has no lead axes,
    or exactly one and ``index`` (int32 scalar) says which of its matrices to use; stacks are meant
    to be indexed this way inside a scan over layers, because slicing one copies the slice.

    The gradient goes to ``x`` only, and what it keeps for the backward pass are the codes. Raises
    ``ValueError`` for shapes that do not fit.
    """
    inputs, outputs = q.matrix_shape
    if x.shape[-1] != inputs:
        raise ValueError(
            f"x has {x.shape[-1]} features, the quantized kernel {q.shape} takes {inputs}"
        )
    if len(q.lead) != (index is not None):
        raise ValueError(
            f"a quantized kernel {q.shape} needs {'an' if q.lead else 'no'} index: "
            "one lead axis with an index, or none without"
        )
    rows = x.reshape(math.prod(x.shape[:-1]), inputs)
    y = multiply(
        rows, *q.kernel_operands(), index, block=q.block, features=outputs, layout=q.layout
    )
    return y.reshape(*x.shape[:-1], outputs)
