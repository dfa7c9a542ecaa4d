"""The linear layers of a decoder, each a plain ``nn.Dense`` whose output has a name.

The name is what rematerialization goes by: remat "dots" keeps the named outputs and computes
everything between them again. A policy that kept every product instead would keep whatever an
interpreter of the module puts in its place, partial sums of a quantized product in fp32 included.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jqlora.models.linear import Dense

KEPT = "projection"
"""The name of the outputs that remat "dots" keeps."""


def project(
    x: jax.Array,
    features: int,
    name: str,
    *,
    use_bias: bool,
    initializer_range: float,
    dtype: Any,
    param_dtype: Any,
) -> jax.Array:
    """x [..., K] -> [..., ``features``] through the submodule ``name`` of the module whose compact
    call this is."""
    dense = Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nn.initializers.normal(initializer_range),
        name=name,
    )
    return keep(dense(x))


@jax.custom_jvp
def keep(y: jax.Array) -> jax.Array:
    """y, by the name under which remat "dots" finds it."""
    return _named(y)


@keep.defjvp
def _named_jvp(primals: tuple[jax.Array], tangents: tuple[Any]) -> tuple[jax.Array, Any]:
    return _named(*primals), tangents[0]


def _named(y: jax.Array) -> jax.Array:
    """What has 16 bits is named as integers: XLA on a CPU writes a layer into a bf16 stack by
    converting the whole stack to fp32 and back, at every layer."""
    if y.dtype.itemsize != 2:
        return checkpoint_name(y, KEPT)
    bits = checkpoint_name(lax.bitcast_convert_type(y, jnp.uint16), KEPT)
    return lax.bitcast_convert_type(bits, y.dtype)
