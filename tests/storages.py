"""Every kind of storage, and matrices in it: what is calibrated elsewhere is rounded here instead.

A new kind is a row of ``STORAGES``; the relations that all must meet go through the table.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jqlora.quant import FP4, INT8, NF4, GroupInt, QTensor, RowInt8, quantize
from jqlora.quant.params import is_quantized_path
from jqlora.tree import flatten, unflatten
from jqlora_kernels.packing import pack

STORAGES = {
    "nf4": NF4(),
    "fp4": FP4(block=128),
    "nf4 twice": NF4(double_quant=True),
    "nf4 in large blocks": NF4(block=4096, double_quant=True),
    "int8": INT8(block=32, double_quant=True),
    "llm.int8": RowInt8(),
    "gptq": GroupInt(format="gptq", group=32, symmetric=True),
    "gptq in order": GroupInt(format="gptq_v2", group=32, ordered=True),
    "gptq of 8 bits": GroupInt(format="gptq", bits=8, group=-1, symmetric=True),
    "awq": GroupInt(format="awq", group=64),
}


def fits(spec, inputs):
    """Whether a matrix of so many inputs can be stored so: groups end with its rows."""
    return not isinstance(spec, GroupInt) or inputs % spec.block_in(inputs) == 0


def stored(kernel, spec, seed=0):
    """``kernel`` [*lead, K, N] as a ``QTensor``."""
    if not isinstance(spec, GroupInt):
        return quantize(kernel, spec)
    *lead, inputs, outputs = kernel.shape
    matrices = np.asarray(kernel, np.float32).reshape(-1, inputs, outputs)
    parts = [rounded(matrix.T, spec, seed + i) for i, matrix in enumerate(matrices)]
    leaves: dict[str, Any] = {
        name: None
        if parts[0][name] is None
        else jnp.asarray(np.stack([p[name] for p in parts]).reshape(*lead, *parts[0][name].shape))
        for name in parts[0]
    }
    return QTensor(
        **leaves, nested=None, spec=spec, matrix_shape=(inputs, outputs), dtype=kernel.dtype
    )


def rounded(weight, spec, seed):
    """The leaves of one W [N, K]: codes nearest to it, zero points where they fit best."""
    outputs, inputs = weight.shape
    block, middle = spec.block_in(inputs), 2 ** (spec.bits - 1)
    order = np.random.default_rng(seed).permutation(inputs) if spec.ordered else np.arange(inputs)
    groups = weight[:, order].reshape(outputs, -1, block)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    if spec.symmetric:
        high = np.maximum(high, -low)
        low = -high
    scales = np.maximum((high - low) / (2 * middle - 1), 1e-6).astype(np.float16)
    scales = scales.astype(np.float32)
    least = 1 if spec.format == "gptq" else 0  # its files hold the zero point less one
    zeros = np.clip(np.round(-low / scales), least, 2 * middle - 1) if spec.zeros else middle
    codes = np.round(groups / scales[..., None]) + np.reshape(zeros, (*np.shape(zeros), 1))
    codes = np.clip(codes, 0, 2 * middle - 1).astype(np.uint8).reshape(outputs, inputs)
    return {
        "codes": codes if spec.bits == 8 else np.stack([pack(jnp.asarray(row)) for row in codes]),
        "scales": scales,
        "zeros": (zeros - middle).astype(np.int16) if spec.zeros else None,
        "order": order.astype(np.int32) if spec.ordered else None,
    }


def stored_params(params, spec, skip=()):
    """``jqlora.quant.quantize_params`` for any storage."""
    return unflatten(
        {
            path: stored(leaf, spec) if is_quantized_path(path, leaf.ndim, skip) else leaf
            for path, leaf in flatten(params).items()
        }
    )
