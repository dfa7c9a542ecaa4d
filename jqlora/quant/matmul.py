"""The product of activations with a quantized kernel."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jqlora.quant.qtensor import QTensor
from jqlora_kernels.dispatch import Choice
from jqlora_kernels.quantized_matmul import choose
from jqlora_kernels.quantized_matmul import quantized_matmul as multiply


def quantized_matmul(x: jax.Array, q: QTensor, index: jax.Array | None = None) -> jax.Array:
    """``x`` [..., K] times the kernel (K, N) of ``q``: [..., N] in ``x.dtype``.

    Equals ``x @ q.dequantize(x.dtype)`` with products accumulated in fp32; of 8-bit integers
    (LLM.int8) too, whose activations are not rounded. ``q`` has no lead axes,
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
    if q.order is not None:
        order = q.order if index is None else q.order[index]
        rows = rows.at[:, order].get(unique_indices=True, mode="promise_in_bounds")
    y = multiply(
        rows, *q.kernel_operands(), index, block=q.block, features=outputs, layout=q.layout
    )
    return y.reshape(*x.shape[:-1], outputs)


def choose_backends(q: QTensor, rows: int, dtype: DTypeLike) -> tuple[Choice, Choice]:
    """What would multiply ``rows`` rows of ``dtype`` by a kernel of ``q``, which may be abstract,
    and what would take the gradient; nothing runs, one matrix of a stack stands for all.

    >>> choose_backends(quantize(jnp.ones((64, 32)), NF4()), 512, "float32")[0].backend
    'reference'
    """
    inputs, outputs = q.matrix_shape
    flat = jax.eval_shape(lambda q: q.flat_lead() if q.lead else q, q)
    codes, scales, codebook, nested = jax.eval_shape(lambda q: q.kernel_operands(), flat)
    index: Any = jax.ShapeDtypeStruct((), jnp.int32) if q.lead else None
    x: Any = jax.ShapeDtypeStruct((rows, inputs), dtype)
    return choose(
        x, codes, scales, codebook, nested, index, block=q.block, features=outputs, layout=q.layout
    )
