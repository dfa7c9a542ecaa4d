"""``s · (x a) b`` with a gradient rule that never transposes an activation.

Left to automatic differentiation, the gradients of ``a`` and ``b`` contract the token axis with
the wide operand on the left, and XLA copies every [M, K] activation into its transpose first, which
on a CPU costs as much as the products. Here the narrow operand, [M, R], is the one that is turned.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jqlora.errors import UnsupportedSite
from jqlora.methods.base import Leaves, Placement
from jqlora.products import contract


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """``scale · (x a) b``, [M, N] in the dtype of ``x`` [M, K].

    ``a`` [K, R] and ``b`` [R, N] are multiplied in that dtype, and products accumulate in fp32; the
    gradients of ``a`` and ``b``, which are sums over all tokens, are rounded to their own dtype
    only. ``scale``, fp32 [], is a constant: its cotangent is zero.
    """
    return forward(x, a, b, scale)[0]


def forward(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array):
    """The product, and what its gradient needs."""
    h = (contract(x, a.astype(x.dtype), 1, 0) * scale).astype(x.dtype)
    return contract(h, b.astype(x.dtype), 1, 0).astype(x.dtype), (x, a, b, h, scale)


def backward(residuals, g: jax.Array):
    """Cotangents of ``x``, ``a`` and ``b``."""
    x, a, b, h, scale = residuals
    gh = (contract(g, b.astype(g.dtype), 1, 1) * scale).astype(x.dtype)
    dx = contract(gh, a.astype(x.dtype), 1, 1).astype(x.dtype)
    da = contract(gh, x, 0, 0).T.astype(a.dtype)
    db = contract(h, g, 0, 0).astype(b.dtype)
    return dx, da, db, jnp.zeros_like(scale)


low_rank.defvjp(forward, backward)


def add_low_rank(
    x: jax.Array,
    y: jax.Array,
    a: jax.Array,
    b: jax.Array,
    leaves: Leaves,
    placement: Placement,
    key: jax.Array | None,
) -> jax.Array:
    """``y + scale · (x a) b`` for one layer of a site; a row of ``a`` per token in an embedding.

    ``x`` and ``y`` are the module's input and output; ``leaves`` hold :func:`low_rank_constants`.
    The products take y's dtype. ``key`` is for the dropout of x, which embeddings have none of;
    None is none.
    """
    scale = leaves["scale"]
    if placement.site.kind == "embed":
        h = jnp.take(a, x, axis=0).astype(jnp.float32) * scale
        return y + h.astype(y.dtype) @ b.astype(y.dtype)
    x = x.astype(y.dtype)
    if key is not None and "dropout" in leaves:
        share = 1.0 - leaves["dropout"]
        keep = jax.random.bernoulli(key, share, x.shape)
        x = jnp.where(keep, x / share.astype(x.dtype), jnp.zeros((), x.dtype))
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    # rounded before it is added: so XLA's GPU compiler adds y in the product's own kernel, where a
    # sum in fp32 would be written out twice as wide
    return y + low_rank(tokens, a, b, scale).reshape(y.shape)


def low_rank_constants(placement: Placement, scales: Sequence[float]) -> dict[str, np.ndarray]:
    """``scale [*lead]`` of every layer and, where there is any, ``dropout [*lead]``; fp32."""
    lead, rate = placement.site.lead, placement.spec.dropout
    found = {"scale": np.asarray(scales, np.float32).reshape(lead)}
    return found | ({"dropout": np.full(lead, rate, np.float32)} if rate else {})


def check_rank_fits(rank: int, placement: Placement) -> None:
    """Raise :class:`UnsupportedSite` for a rank that the site's matrix cannot hold."""
    site = placement.site
    limit = min(site.features_in, site.features_out)
    if rank > limit:
        raise UnsupportedSite(
            f"rank {rank} at {placement.names[0]}: its matrix is "
            f"{site.features_in} x {site.features_out}, so ranks above {limit} add nothing"
        )
