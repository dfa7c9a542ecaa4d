"""An encoder's layers one after another: scanned or looped, with or without remat."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.models.stack import Remat, rematerialized


def run_stack(
    layer: Any,
    x: jax.Array,
    shared: Any,
    *,
    depth: int,
    name: str,
    scan: bool,
    remat: Remat,
    **fields: Any,
) -> tuple[jax.Array, Any]:
    """x [...] through ``depth`` layers of the class ``layer`` with these ``fields``, as submodules
    of the module whose compact call this is.

    A layer maps ``(x, shared, first)`` to ``(x, emitted)``, where ``shared`` is the same for all
    and ``first`` bool [] says that it is the first. Emitted leaves come back stacked [depth, ...].
    Scanned, the submodule is ``name`` with parameters [depth, ...]; looped, ``name_0`` and so on.
    """
    layer = rematerialized(layer, remat, scan=scan)
    first = jnp.arange(depth) == 0
    if scan:
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] flax says int
            length=depth,
        )
        return scanned(**fields, name=name)(x, shared, first)
    emitted = []
    for i in range(depth):
        x, item = layer(**fields, name=f"{name}_{i}")(x, shared, first[i])
        emitted.append(item)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *emitted)
