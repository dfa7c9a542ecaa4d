"""Any method's effect with an adapter of its own for every row of a batch.

The base's product is made once for all rows; what differs is narrow. Per layer, the leaves of the
rows' adapters are gathered from the stack, and the method's effect is taken row by row (``vmap``):
two batched products of [T, K] by [K, R] and [T, R] by [R, N].
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jqlora.errors import UnsupportedSite
from jqlora.methods.base import Placement
from jqlora.methods.table import method_of

ADAPTER_IDS = "adapter_ids"
"""In ``variables``, int32 [B]: which adapter of a stack serves each row of the batch."""


def effect_by_row(
    placement: Placement, ids: jax.Array, x: jax.Array, y: jax.Array, leaves: Mapping[str, Any]
) -> jax.Array:
    """The module's output ``y`` [B, ..., N] with the effects of adapters ``ids`` int32 [B] of
    ``leaves`` [adapters, ...]; rows of a negative id are ``y``'s own. There is no dropout.

    Raises :class:`UnsupportedSite` where a module is called with something else than B rows.
    """
    if x.shape[0] != len(ids):
        raise UnsupportedSite(
            f"{'.'.join(placement.site.path)} is called with {x.shape[0]} rows, not with the "
            f"{len(ids)} of adapter_ids: adapters cannot differ by row there"
        )
    effect = method_of(placement.spec).effect
    chosen = {name: leaf[jnp.maximum(ids, 0)] for name, leaf in leaves.items()}
    served = jax.vmap(lambda x, y, leaves: effect(x, y, leaves, placement, None))(x, y, chosen)
    return jnp.where((ids >= 0).reshape(-1, *(1,) * (y.ndim - 1)), served, y)
