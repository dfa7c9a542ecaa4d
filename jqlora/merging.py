"""Folding adapters into the base: W + ΔW, so that the plain model computes what the bound one did.

Adding a small ΔW to a rounded matrix rounds again, so the sum is taken in fp32 and rounded once to
the base's dtype. A quantized matrix becomes a dense one; putting it back on its grid is a loss of
its own, done only when asked for and reported.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jqlora.errors import MergeError
from jqlora.graft import dense, override
from jqlora.methods import FULL, Placement, Plan, method_of
from jqlora.quant import GroupInt, QTensor, quantize, with_layout
from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, Params


def merge(plan: Plan, params: Params, adapters: Adapters) -> dict[str, Any]:
    """``params`` with ``adapters`` folded in: every leaf dense, in the base's dtype.

    Raises :class:`MergeError` where a method's term is no matrix, and for an adapter on an
    embedding that is the output head as well.
    """
    check_mergeable(plan)
    flat = {path: dense(leaf) for path, leaf in override(params, adapters.get(FULL, {})).items()}
    for placement in plan.placements:
        path = placement.site.leaf_path
        flat[path] = _added(flat[path], delta(placement, adapters))
    return unflatten(flat)


def check_mergeable(plan: Plan) -> None:
    """Raise :class:`MergeError` for an adapter on an embedding that is the output head as well."""
    for site in plan.sites:
        if site.attended:
            raise MergeError(
                f"{site.names[0]} is also the output head (tied embeddings), and its adapter "
                "serves the input only: merged, it would change the head. Keep it unmerged, or "
                f"exclude {site.path[-1]} from the targets"
            )


def delta(placement: Placement, adapters: Adapters, layer: int | None = None) -> jax.Array:
    """ΔW of one site, fp32 ``[*lead, K, N]``, or of one of its layers ``[K, N]``.

    Raises :class:`MergeError` where a method's term is no matrix.
    """
    site, method = placement.site, method_of(placement.spec)
    leaves: Any = adapters[method.collection]
    for name in site.path:
        leaves = leaves[name]
    if layer is not None and site.lead:
        depth = len(site.lead)
        leaves = {n: v.reshape(-1, *v.shape[depth:])[layer] for n, v in leaves.items()}
        placement = placement.layer(layer)
    added = method.delta(leaves, placement)
    if added is None:
        raise MergeError(
            f"{site.names[0]}: {method.collection} adds no matrix that could be merged"
        )
    return added


@jax.jit
def _added(matrix: jax.Array, added: jax.Array) -> jax.Array:
    total = matrix.astype(jnp.float32) + added.reshape(matrix.shape)
    return total.astype(matrix.dtype)


def requantize(merged: Params, like: Params) -> tuple[dict[str, Any], dict[str, float]]:
    """``merged`` with the leaves that ``like`` holds quantized put back on the same grid.

    Also returns what that cost: for each such module ‖W - Q(W)‖ / ‖W‖ (Frobenius, fp32). Raises
    :class:`MergeError` for codes that come out of a calibration (GPTQ, AWQ).
    """
    originals = flatten(like)
    flat: dict[tuple[str, ...], Any] = {}
    errors: dict[str, float] = {}
    for path, leaf in flatten(merged).items():
        original = originals[path]
        if not isinstance(original, QTensor):
            flat[path] = leaf
            continue
        if isinstance(original.spec, GroupInt):
            raise MergeError(
                f"{'.'.join(path)} of {original.spec.format} was quantized by a calibration, which "
                "is not done here: keep the merged matrix dense, or quantize it anew"
            )
        stored = quantize(leaf, original.spec, dtype=original.dtype)
        flat[path] = with_layout(stored, original.layout)
        errors[".".join(path[:-1])] = float(_relative_error(leaf, flat[path]))
    return unflatten(flat), errors


@jax.jit
def _relative_error(matrix: jax.Array, stored: QTensor) -> jax.Array:
    exact = matrix.astype(jnp.float32)
    return jnp.linalg.norm((exact - stored.dequantize(jnp.float32)).ravel()) / jnp.linalg.norm(
        exact.ravel()
    )
