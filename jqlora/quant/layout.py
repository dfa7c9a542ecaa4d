"""Quantized leaves in the layout that a kernel wants, and back in the one that files have."""

import dataclasses
from typing import Any

import jax

from jqlora import tree
from jqlora.errors import ConfigError
from jqlora.quant.qtensor import QTensor
from jqlora.types import Params
from jqlora_kernels.layouts import BITSANDBYTES, check_layout, repack


def with_layout(q: QTensor, layout: str) -> QTensor:
    """The same matrices with their codes in ``layout``, one of ``jqlora_kernels.layouts.LAYOUTS``.

    Values stay the same bit for bit, and going there and back gives the same bytes. Leaves may be
    ``ShapeDtypeStruct``. Raises ``ConfigError`` for an unknown layout, and where the matrix cannot
    have it: its K must be a multiple of the layout's span and of the block.

    >>> q = quantize(jnp.ones((128, 32)), NF4())
    >>> with_layout(q, "hopper").layout
    'hopper'
    """
    inputs, _ = q.matrix_shape
    try:
        check_layout(layout, inputs)
    except ValueError as error:
        raise ConfigError(f"kernel {q.shape}: {error}") from error
    if layout != BITSANDBYTES and inputs % q.block:
        raise ConfigError(
            f"kernel {q.shape}: {layout=} needs rows that end with a block of {q.block}"
        )
    if layout == q.layout:
        return q
    if isinstance(q.codes, jax.ShapeDtypeStruct):
        return dataclasses.replace(q, layout=layout)
    codes = _repack(q.codes, q.layout, layout, q.spec.codes_per_byte)
    return dataclasses.replace(q, codes=codes, layout=layout)


_repack = jax.jit(repack, static_argnums=(1, 2, 3))


def params_with_layout(params: Params, layout: str) -> dict[str, Any]:
    """The tree with every ``QTensor`` that can have ``layout`` in it; the others stay."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, QTensor):
            return leaf
        try:
            return with_layout(leaf, layout)
        except ConfigError:
            return leaf

    return tree.unflatten({path: convert(leaf) for path, leaf in tree.flatten(params).items()})
