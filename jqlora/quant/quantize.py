"""From dense matrices to ``QTensor``, on the device that holds them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jqlora.quant.codebooks import dynamic_map, levels
from jqlora.quant.qtensor import NestedScales, QTensor, leaf_shapes
from jqlora.quant.schemes import check_quantizable
from jqlora.quant.spec import Storage
from jqlora_kernels.quantize_blockwise import quantize_blockwise, quantize_scales


def quantize(kernel: jax.Array, spec: Storage, dtype: DTypeLike | None = None) -> QTensor:
    """A dense layer's kernel [*lead, K, N] as a ``QTensor`` that decodes to ``dtype``.

    Takes fp32, bf16 and fp16 (``TypeError`` otherwise); ``dtype`` defaults to the kernel's own. The
    codes are those that bitsandbytes writes for the transposed (N, K) weight, byte for byte.

    >>> q = quantize(jnp.ones((64, 32)), NF4(double_quant=True))
    >>> q.shape, q.codes.shape
    ((64, 32), (32, 32))
    """
    return quantize_rows(jnp.swapaxes(kernel, -1, -2), spec, dtype)


def quantize_rows(weight: jax.Array, spec: Storage, dtype: DTypeLike | None = None) -> QTensor:
    """A weight [*lead, N, K], as Hugging Face stores it (out, in); otherwise like ``quantize``.

    One compiled program a shape; each matrix of the lead axes is quantized by itself.
    """
    check_quantizable(spec)
    if weight.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"cannot quantize {weight.dtype}: expected float32, bfloat16 or float16")
    if weight.ndim < 2:
        raise ValueError(f"cannot quantize an array of shape {weight.shape}: expected a matrix")
    return compiled(weight, spec, np.dtype(weight.dtype if dtype is None else dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def compiled(weight: jax.Array, spec: Storage, dtype: np.dtype) -> QTensor:
    """``quantize_rows`` with everything static decided."""
    *lead, outputs, inputs = weight.shape
    matrices = weight.reshape(math.prod(lead), outputs, inputs)
    stack = jax.vmap(functools.partial(quantize_matrix, spec=spec, dtype=dtype))(matrices)
    return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), stack)


def quantize_matrix(weight: jax.Array, *, spec: Storage, dtype: np.dtype) -> QTensor:
    """One matrix [N, K]."""
    outputs, inputs = weight.shape
    values, written = levels(spec.codebook)
    block = spec.block_in(inputs)
    codes, scales = quantize_blockwise(
        weight.reshape(-1), jnp.asarray(values), jnp.asarray(written), block=block
    )
    nested = None
    if spec.double_quant:
        scales, absmax, offset = quantize_scales(scales, jnp.asarray(dynamic_map()))
        nested = NestedScales(absmax, offset)
    shapes = leaf_shapes((inputs, outputs), spec)
    return QTensor(
        codes.reshape(shapes["codes"]),
        scales.reshape(shapes["scales"]),
        nested,
        spec=spec,
        matrix_shape=(inputs, outputs),
        dtype=dtype,
    )


def empty(
    matrix_shape: tuple[int, int], lead: tuple[int, ...], spec: Storage, dtype: DTypeLike
) -> QTensor:
    """A ``QTensor`` of zeros for kernels [*lead, K, N], to be filled matrix by matrix.

    >>> stack = empty((64, 32), (2,), NF4(), jnp.float32)
    >>> item = quantize(jnp.ones((64, 32)), NF4())
    >>> stack = jax.tree.map(lambda s, t: s.at[1].set(t), stack, item)
    """
    shapes = leaf_shapes(matrix_shape, spec)
    scales = (*lead, *shapes["scales"])
    nested = None
    if spec.double_quant:
        nested = NestedScales(jnp.zeros((*lead, *shapes["absmax"])), jnp.zeros(lead))
    return QTensor(
        jnp.zeros((*lead, *shapes["codes"]), jnp.uint8),
        jnp.zeros(scales, jnp.uint8 if spec.double_quant else jnp.float32),
        nested,
        spec=spec,
        matrix_shape=matrix_shape,
        dtype=np.dtype(dtype),
        zeros=jnp.zeros(scales, jnp.int16) if spec.zeros else None,
        order=jnp.zeros((*lead, matrix_shape[0]), jnp.int32) if spec.ordered else None,
    )
