"""What the Pallas-Triton kernels share: operands laid out alike, and decoding of one tile.

Every kernel takes whole arrays with a layer axis in front and indexes them inside. XLA would copy
the slice of a stack before handing it to a kernel; a layer number as an operand costs nothing.

Triton knows neither ragged arrays nor gathers from values. So tiles are powers of two, what lies
beyond an edge is masked, and tables are read from memory, where they stay cached.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from jqlora_kernels.packing import codes_per_byte
from jqlora_kernels.scales import GROUP, Nested, add_rounded

WHOLE = pl.BlockSpec(memory_space=pl.ANY)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
Refs = tuple[Any, ...]


def flat_operands(
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    nested: Nested | None,
    index: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """(layer numbers, codes [L, bytes], scales [L, blocks], codebook, *nested [L, ...]).

    Without ``index`` there is one layer number for every element of the lead axes, else just that.
    """
    lead = codes.shape[:-2] if index is None else codes.shape[:1]
    count = 1
    for size in lead:
        count *= size
    layers = jnp.arange(count, dtype=jnp.int32) if index is None else index.reshape(1)
    operands = (layers, codes.reshape(count, -1), scales.reshape(count, -1), codebook)
    if nested is None:
        return operands
    absmax, offset, table = nested
    return (*operands, absmax.reshape(count, -1), offset.reshape(count), table)


def check_dtype(dtype: DTypeLike) -> None:
    """Refuses what the tensor cores, and so these kernels, do not take."""
    if jnp.dtype(dtype) not in map(jnp.dtype, DTYPES):
        raise NotImplementedError(
            f"{jnp.dtype(dtype)}: the kernel takes float32, bfloat16, float16"
        )


def load_scales(scales: Any, nested: Refs, layer: jax.Array, block: jax.Array, mask: jax.Array):
    """fp32 scales of the blocks numbered ``block`` (any shape) of one layer; 0 where masked."""
    stored = plt.load(scales.at[layer, block], mask=mask, other=0)
    if not nested:
        return stored
    absmax, offset, table = nested
    values = table[stored.astype(jnp.int32)]
    group_scale = plt.load(absmax.at[layer, block // GROUP], mask=mask, other=0)
    return add_rounded(values * group_scale, offset[layer])


def decode(codes: Any, codebook: Any, layer: jax.Array, byte: jax.Array, mask: jax.Array):
    """fp32 codebook values of the bytes numbered ``byte``: those of the high and low nibbles, or of
    whole bytes, a tuple of one for each code in a byte."""
    packed = plt.load(codes.at[layer, byte], mask=mask, other=0).astype(jnp.int32)
    if codes_per_byte(codebook) == 1:
        return (codebook[packed],)
    return codebook[packed >> 4], codebook[packed & 15]


def call(
    kernel: Callable[..., None],
    operands: tuple[jax.Array, ...],
    *,
    grid: tuple[int, ...],
    out: jax.ShapeDtypeStruct,
    warps: int,
    stages: int,
    interpret: bool,
    name: str,
) -> jax.Array:
    """One kernel over whole operands."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[WHOLE] * len(operands),
        out_specs=WHOLE,
        out_shape=out,
        # Always explicit: without them the backend that Pallas picks differs between JAX versions.
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*operands)
