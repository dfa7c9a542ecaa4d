"""Quantization runs once per weight, at memory speed through XLA: the reference is the backend."""

import jax

from jqlora_kernels import dispatch
from jqlora_kernels.quantize_blockwise import reference


def quantize_blockwise(
    values: jax.Array,
    levels: jax.Array,
    codes: jax.Array,
    *,
    block: int,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Packed codes and scales of ``values`` [n]; see ``reference.quantize_blockwise``."""

    def by_reference() -> tuple[jax.Array, jax.Array]:
        return reference.quantize_blockwise(values, levels, codes, block=block)

    return dispatch.run("quantize_blockwise", {"reference": by_reference}, backend)


def quantize_scales(
    scales: jax.Array, table: jax.Array, *, backend: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Second-level codes, group scales and offset; see ``reference.quantize_scales``."""

    def by_reference() -> tuple[jax.Array, jax.Array, jax.Array]:
        return reference.quantize_scales(scales, table)

    return dispatch.run("quantize_scales", {"reference": by_reference}, backend)
