"""The linear layers of a decoder, each a plain ``nn.Dense`` whose output has a name.

The name is what rematerialization goes by: remat "dots" keeps the named outputs and computes
everything between them again. A policy that kept every product instead would keep whatever an
interpreter of the module puts in its place, partial sums of a quantized product in fp32 included.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

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
    dense = nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nn.initializers.normal(initializer_range),
        name=name,
    )
    return checkpoint_name(dense(x), KEPT)
