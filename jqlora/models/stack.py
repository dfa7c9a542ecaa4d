"""Equal layers one after the other: scanned over stacked parameters, or looped.

A layer is called as ``layer(x, shared, own, cache)``, where ``shared``, such as ``Attending``, is
the same for all, and ``own`` its element of what they do not share. It returns
``(x, (fresh, hidden))`` as in :class:`~jqlora.models.llama`.
"""

from typing import Any, Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.errors import ConfigError
from jqlora.models.attention import Attention
from jqlora.models.projection import KEPT

Remat: TypeAlias = Literal["none", "dots", "full"]


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
}


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
