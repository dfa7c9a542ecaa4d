"""Equal layers one after the other: scanned over stacked parameters, or looped.

A layer is called as ``layer(x, shared, own, cache)``, where ``shared``, such as ``Attending``, is
the same for all, and ``own`` its element of what they do not share. It returns
``(x, (fresh, hidden))`` as in :class:`~jqlora.models.llama`.
"""

from typing import Any, Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jqlora.errors import ConfigError
from jqlora.models.attention import Attention
from jqlora.models.projection import KEPT

Remat: TypeAlias = Literal["none", "dots", "full", "offload"]
ENTERED = "layer input"
"""The name of what remat "offload" keeps in host memory."""


def attention_results(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy that keeps what cuDNN's attention returns, its output and the sums of its softmax.

    Its backward pass takes both as they are. A name on the output would not do: the sums have none,
    and the whole attention would be computed again for them.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(KEPT), attention_results
    ),
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ENTERED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def check_options(remat: str, attention: str) -> None:
    """ConfigError for a way to run that does not exist."""
    for name, value, accepted in (
        ("remat", remat, get_args(Remat)),
        ("attention", attention, get_args(Attention)),
    ):
        if value not in accepted:
            raise ConfigError(f"{name}={value!r} is unknown; accepted: {', '.join(accepted)}")


def entering(x: jax.Array) -> jax.Array:
    """x [B, T, D], by the name under which remat finds a layer's input."""
    return checkpoint_name(x, ENTERED)


def rematerialized(layer: Any, remat: Remat, *, scan: bool) -> Any:
    """The class of a layer, or one that computes it again in the backward pass."""
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=not scan, policy=POLICIES[remat])


def stacked(layer: Any, depth: int, *, scan: bool, remat: Remat, **fields: Any) -> Any:
    """``depth`` layers with these fields, for a ``setup`` to name: one scanned module or a list."""
    layer = rematerialized(layer, remat, scan=scan)
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
    layers: Any, x: jax.Array, shared: Any, own: jax.Array, cache: Any
) -> tuple[jax.Array, tuple[Any, jax.Array | None]]:
    """x [B, T, D] through what :func:`stacked` made; ``own`` and the leaves of ``cache`` have lead
    axes [L].

    Returns x and, stacked on [L], the fresh keys and values and the hidden states.
    """
    if isinstance(layers, nn.Module):
        scanned: Any = layers
        return scanned(x, shared, own, cache)
    emitted = []
    for i, layer in enumerate(layers):
        layer_cache = jax.tree.map(lambda leaf, i=i: leaf[i], cache)
        x, item = layer(x, shared, own[i], layer_cache)
        emitted.append(item)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *emitted)
