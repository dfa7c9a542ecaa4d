"""Equal layers one after the other: scanned over stacked parameters, or looped.

A layer is called as ``layer(x, attending, own, cache)``, where ``own`` is its element of what the
layers do not share, and returns ``(x, (fresh, hidden))`` as in :class:`~jqlora.models.llama`.
"""

from typing import Any, Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.errors import ConfigError
from jqlora.models.attention import Attention, LayerCache
from jqlora.models.masks import Attending
from jqlora.models.projection import KEPT

Remat: TypeAlias = Literal["none", "dots", "full"]
POLICIES = {"dots": jax.checkpoint_policies.save_only_these_names(KEPT), "full": None}


def check_options(remat: str, attention: str) -> None:
    """ConfigError for a way to run that does not exist."""
    for name, value, accepted in (
        ("remat", remat, get_args(Remat)),
        ("attention", attention, get_args(Attention)),
    ):
        if value not in accepted:
            raise ConfigError(f"{name}={value!r} is unknown; accepted: {', '.join(accepted)}")


def stacked(layer: Any, depth: int, *, scan: bool, remat: Remat, **fields: Any) -> Any:
    """``depth`` layers with these fields, for a ``setup`` to name: one scanned module or a list."""
    if remat != "none":
        layer = nn.remat(layer, prevent_cse=not scan, policy=POLICIES[remat])
    if not scan:
        return [layer(**fields) for _ in range(depth)]
    layer = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType] flax says int
        length=depth,
    )
    return layer(**fields)


def run(
    layers: Any, x: jax.Array, attending: Attending, own: jax.Array, cache: LayerCache | None
) -> tuple[jax.Array, tuple[LayerCache | None, jax.Array | None]]:
    """x [B, T, D] through what :func:`stacked` made; ``own`` and ``cache`` have lead axes [L].

    Returns x and, stacked on [L], the fresh keys and values and the hidden states.
    """
    if isinstance(layers, nn.Module):
        scanned: Any = layers
        return scanned(x, attending, own, cache)
    emitted = []
    for i, layer in enumerate(layers):
        layer_cache = None if cache is None else (cache[0][i], cache[1][i])
        x, item = layer(x, attending, own[i], layer_cache)
        emitted.append(item)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *emitted)
